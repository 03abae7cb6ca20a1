"""`generate` and transformers' pipeline give what `diffusion_generate` gives."""

import pytest
import torch
from transformers import GenerationConfig, pipeline

QUESTIONS = ["What?", "What is unusual in this picture, and why?"]


@pytest.fixture(scope="module")
def asked(make, picture):
    model, processor = make(generation_defaults={"max_new_tokens": 5})
    pictures = [picture(40, 40), picture(90, 40, seed=1)]
    inputs = processor([[p] for p in pictures], prompts=QUESTIONS)
    expected = model.diffusion_generate(pictures, prompts=QUESTIONS, processor=processor)
    return model, processor, pictures, inputs, expected


def ended(ids: list[int], end: int) -> list[int]:
    """Ids with everything past the first end replaced by ends."""
    stop = ids.index(end) if end in ids else len(ids)
    return ids[:stop] + [end] * (len(ids) - stop)


def test_prompts_and_answers_come_back(asked):
    model, _, _, inputs, expected = asked
    out = model.generate(**inputs)
    length = inputs["input_ids"].shape[1]
    assert torch.equal(out[:, :length], inputs["input_ids"])
    wanted = [ended(row[0], model.config.eot_token_id) for row in expected.token_ids]
    assert out[:, length:].tolist() == wanted


def test_bare_ids_are_enough_for_a_text(asked):
    model, processor, *_ = asked
    ids = processor.tokenizer("Hello there", return_tensors="pt")["input_ids"]
    inputs = processor(text="Hello there", max_new_tokens=3)
    expected = model.diffusion_generate(inputs=inputs).token_ids[0][0]
    out = model.generate(ids, max_new_tokens=3)[0, ids.shape[1] :].tolist()
    assert out == ended(expected, model.config.eot_token_id)


def test_a_generation_configs_length_is_taken(asked):
    model, _, _, inputs, _ = asked
    out = model.generate(**inputs, generation_config=GenerationConfig(max_new_tokens=2))
    assert out.shape[1] == inputs["input_ids"].shape[1] + 2
    assert model.generate(**inputs).shape[1] == inputs["input_ids"].shape[1] + 5


def test_sampling_has_to_be_asked_for(asked):
    model, _, _, inputs, _ = asked
    with pytest.raises(ValueError, match="no temperature without do_sample, got 0.7"):
        model.generate(**inputs, do_sample=False, temperature=0.7)
    greedy = model.generate(**inputs, do_sample=False)
    hot = model.generate(**inputs, do_sample=True, temperature=5.0, seed=1)
    assert not torch.equal(greedy, hot)
    by_config = GenerationConfig(do_sample=True, temperature=5.0)
    assert torch.equal(hot, model.generate(**inputs, generation_config=by_config, seed=1))
    by_config = GenerationConfig(do_sample=True, temperature=5.0, top_k=3)
    few = model.generate(**inputs, do_sample=True, temperature=5.0, top_k=3, seed=1)
    assert torch.equal(few, model.generate(**inputs, generation_config=by_config, seed=1))
    assert not torch.equal(few, hot)


def test_an_unknown_option_is_refused(asked):
    model, _, _, inputs, _ = asked
    with pytest.raises(ValueError, match="expected options among .*, got .'num_beams'."):
        model.generate(**inputs, num_beams=3)
    with pytest.raises(ValueError, match="return_dict_in_generate False, got True"):
        model.generate(**inputs, return_dict_in_generate=True)


def test_padding_on_the_right_is_refused(asked):
    model, *_ = asked
    ids, mask = torch.ones(1, 3, dtype=torch.long), torch.tensor([[1, 1, 0]])
    with pytest.raises(ValueError, match="padded on the left"):
        model.generate(ids, mask)


def test_the_pipeline_answers_alike_from_a_saved_folder(asked, tmp_path):
    model, processor, pictures, _, expected = asked
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    chats = [
        [{"role": "user", "content": [{"type": "image", "image": p}, {"type": "text", "text": q}]}]
        for p, q in zip(pictures, QUESTIONS, strict=True)
    ]
    pipe = pipeline("image-text-to-text", model=str(tmp_path), trust_remote_code=True)
    answers = pipe(text=chats, return_full_text=False)
    texts = [answer[0]["generated_text"].strip() for answer in answers]
    assert texts == [row[0] for row in expected.texts]
