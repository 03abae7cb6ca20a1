"""`generate` and transformers' pipeline give what `diffusion_generate` gives."""

import threading

import pytest
import torch
from perceptiondlm.generation_generate import KNOWN
from transformers import (
    GenerationConfig,
    StoppingCriteriaList,
    TextIteratorStreamer,
    TextStreamer,
    pipeline,
)
from transformers.utils import ModelOutput

QUESTIONS = ["What?", "What is unusual in this picture, and why?"]


@pytest.fixture(scope="module")
def asked(make, draw_image):
    model, processor = make(generation_defaults={"max_new_tokens": 5})
    images = [draw_image(40, 40), draw_image(90, 40, seed=1)]
    inputs = processor([[p] for p in images], prompts=QUESTIONS)
    expected = model.diffusion_generate(images, prompts=QUESTIONS, processor=processor)
    return model, processor, images, inputs, expected


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
    with pytest.raises(ValueError, match="expected options among .*, got .'num_beems'."):
        model.generate(**inputs, num_beems=3)


# A value for every field of GenerationConfig that would change what transformers generates, or
# what it returns; those that `generate` honors, or that change nothing, are tried one by one below.
MEANINGFUL = {
    "min_length": 3,
    "min_new_tokens": 3,
    "early_stopping": True,
    "max_time": 1.0,
    "num_beams": 4,
    "use_mtp": True,
    "cache_implementation": "static",
    "cache_config": {"nbits": 4},
    "max_cache_len": 64,
    "min_p": 0.1,
    "top_h": 0.4,
    "typical_p": 0.5,
    "epsilon_cutoff": 0.1,
    "eta_cutoff": 0.1,
    "repetition_penalty": 1.2,
    "encoder_repetition_penalty": 1.2,
    "length_penalty": 2.0,
    "no_repeat_ngram_size": 2,
    "bad_words_ids": [[5]],
    "renormalize_logits": True,
    "forced_bos_token_id": 5,
    "forced_eos_token_id": 5,
    "remove_invalid_values": True,
    "exponential_decay_length_penalty": (2, 1.5),
    "begin_suppress_tokens": [5],
    "sequence_bias": {(5,): 1.0},
    "token_healing": True,
    "guidance_scale": 2.0,
    "watermarking_config": {"bias": 2.0},
    "num_return_sequences": 2,
    "output_attentions": True,
    "output_hidden_states": True,
    "output_scores": True,
    "output_logits": True,
    "pad_token_id": 5,
    "eos_token_id": 5,
    "encoder_no_repeat_ngram_size": 2,
    "decoder_start_token_id": 5,
    "is_assistant": True,
    "num_assistant_tokens": 3,
    "num_assistant_tokens_schedule": "heuristic",
    "assistant_confidence_threshold": 0.9,
    "prompt_lookup_num_tokens": 3,
    "max_matching_ngram_size": 3,
    "assistant_early_exit": 1,
    "assistant_lookbehind": 3,
    "target_lookbehind": 3,
    "assistant_ensemble_weight": 0.5,
    "speculation_type": "draft_model",
    "compile_config": {"mode": "default"},
    "continuous_batching_config": {"block_size": 4},
    "low_memory": True,
    "penalty_alpha": 0.6,
    "dola_layers": "high",
    "diversity_penalty": 0.5,
    "num_beam_groups": 2,
    "constraints": [5],
    "force_words_ids": [[5]],
    "prefill_chunk_size": 8,
    "synced_gpus": True,
    "assistant_model": object(),
    "logits_processor": [object()],
    "stopping_criteria": [object()],
    "prefix_allowed_tokens_fn": print,
    "negative_prompt_ids": torch.ones(2, 3, dtype=torch.long),
    "custom_generate": "somewhere",
}
TRIED_BELOW = {
    "max_length",
    "max_new_tokens",
    "stop_strings",
    "do_sample",
    "temperature",
    "top_k",
    "top_p",
    "suppress_tokens",
    "return_dict_in_generate",
    "use_cache",
    "disable_compile",
    "bos_token_id",
    "transformers_version",
}


def test_every_field_of_a_generation_config_is_decided_on():
    fields = {name for name in vars(GenerationConfig()) if not name.startswith("_")}
    assert fields - set(MEANINGFUL) == TRIED_BELOW
    assert fields <= KNOWN


@pytest.mark.parametrize("name", MEANINGFUL)
def test_what_cannot_be_honored_is_refused_by_name(asked, name):
    model, _, _, inputs, _ = asked
    with pytest.raises(ValueError, match=f"expected {name} .*got "):
        model.generate(**inputs, **{name: MEANINGFUL[name]})


@pytest.mark.parametrize("place", ["given", "own"])
def test_a_generation_config_is_not_ignored(asked, place, monkeypatch):
    model, _, _, inputs, _ = asked
    config = GenerationConfig(num_beams=4)
    given = {"generation_config": config} if place == "given" else {}
    if place == "own":
        monkeypatch.setattr(model, "generation_config", config)
    with pytest.raises(ValueError, match="expected num_beams 1, got 4"):
        model.generate(**inputs, **given)
    config.num_beams, config.other = None, 1
    with pytest.raises(ValueError, match="got .'other'."):
        model.generate(**inputs, **given)


def test_neutral_values_change_nothing(asked):
    model, processor, _, inputs, _ = asked
    plain = model.generate(**inputs)
    defaults = GenerationConfig()._get_default_generation_params() | {"max_length": None}
    tokens = {
        "eos_token_id": [model.config.eot_token_id, model.config.eos_token_id],
        "pad_token_id": processor.tokenizer.pad_token_id,
        "bos_token_id": processor.tokenizer.bos_token_id,
    }
    arguments = {"synced_gpus": False, "streamer": None, "logits_processor": []}
    arguments |= {"stopping_criteria": StoppingCriteriaList(), "tokenizer": processor.tokenizer}
    cases = [
        defaults,
        dict.fromkeys(MEANINGFUL),
        tokens,
        arguments,
        {"use_cache": False},
        {"generation_config": GenerationConfig(**defaults, **tokens)},
    ]
    for case in cases:
        assert torch.equal(model.generate(**inputs, **case), plain), case


def test_a_length_counts_the_prompt_where_transformers_does(asked):
    model, _, _, inputs, _ = asked
    length = inputs["input_ids"].shape[1]
    assert model.generate(**inputs, max_length=length + 3).shape[1] == length + 3
    assert model.generate(**inputs, max_length=9999, max_new_tokens=2).shape[1] == length + 2
    with pytest.raises(ValueError, match=f"beyond the prompt's {length} tokens, got {length}"):
        model.generate(**inputs, max_length=length)


def test_tokens_can_be_suppressed_beside_the_checkpoints(asked):
    model, _, _, inputs, _ = asked
    length = inputs["input_ids"].shape[1]
    likely = model.generate(**inputs)[:, length:].unique().tolist()
    out = model.generate(**inputs, suppress_tokens=likely)[:, length:]
    assert not set(out.unique().tolist()) & {*likely, *model.decoding_defaults["suppress_tokens"]}


def test_a_result_is_an_output_with_sequences_on_request(asked):
    model, _, _, inputs, _ = asked
    out = model.generate(**inputs, return_dict_in_generate=True)
    assert isinstance(out, ModelOutput) and list(out) == ["sequences"]
    assert torch.equal(out.sequences, model.generate(**inputs))


def test_nothing_stands_behind_a_stop_string(asked):
    model, processor, _, inputs, _ = asked
    length, eot = inputs["input_ids"].shape[1], model.config.eot_token_id
    plain = model.generate(**inputs, max_new_tokens=8)[:, length:].tolist()
    stop = processor.tokenizer.decode(plain[1][2:3])  # the third token of the second answer
    assert len(stop) == 1
    for given in (stop, [stop]):
        out = model.generate(
            **inputs, max_new_tokens=8, stop_strings=given, tokenizer=processor.tokenizer
        )
        texts = [processor.tokenizer.decode(row) for row in out[:, length:]]
        assert all(text.count(stop) <= 1 for text in texts) and stop in texts[1]
        behind = texts[1].split(stop)[1]
        assert behind == processor.eot_token * (len(behind) // len(processor.eot_token))
    assert eot in out[1].tolist()


def test_a_streamer_gets_the_prompt_and_the_final_text(asked, capsys):
    model, processor, *_ = asked
    one = dict(processor(prompts="Hello there"))
    ids = model.generate(**one)[0, one["input_ids"].shape[1] :]
    text = processor.tokenizer.decode(ids, skip_special_tokens=True)

    printed = TextStreamer(processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
    model.generate(**one, streamer=printed)
    assert capsys.readouterr().out == text + "\n"

    parts = TextIteratorStreamer(processor.tokenizer, timeout=60)
    thread = threading.Thread(target=model.generate, kwargs={**one, "streamer": parts})
    thread.start()
    whole = "".join(parts)
    thread.join()
    assert whole.startswith(processor.tokenizer.decode(one["input_ids"][0]))
    assert text in whole


def test_a_streamer_of_one_text_takes_no_two(asked):
    model, processor, _, inputs, _ = asked
    with pytest.raises(ValueError, match="batch size 1"):
        model.generate(**inputs, streamer=TextStreamer(processor.tokenizer))


def test_answers_in_the_inputs_are_no_part_of_the_prompt(asked):
    model, processor, images, inputs, _ = asked
    nested, length = [[p] for p in images], inputs["input_ids"].shape[1]
    masked = processor(nested, prompts=QUESTIONS, max_new_tokens=3)
    expected = model.generate(**inputs, max_new_tokens=3)
    assert torch.equal(model.generate(**masked), expected)
    learned = processor(nested, prompts=QUESTIONS, answers=["a cat", "two green dogs"])
    assert torch.equal(model.generate(**learned, max_new_tokens=3), expected)
    assert model.generate(**learned).shape[1] == length + 5


def test_labels_say_where_an_answer_starts(asked):
    model, processor, *_ = asked
    ids = processor.tokenizer("Hello there", return_tensors="pt")["input_ids"]
    labels = ids.clone()
    labels[:, :4] = -100
    assert torch.equal(model.generate(ids, labels=labels), model.generate(ids[:, :4]))
    both = torch.cat([ids, ids])
    with pytest.raises(ValueError, match=r"in one column, got columns \[4, 0\]"):
        model.generate(both, labels=torch.cat([labels, ids]))
    with pytest.raises(ValueError, match="expected a prompt before the answer, got none"):
        model.generate(ids, labels=ids)


def test_padding_on_the_right_is_refused(asked):
    model, *_ = asked
    ids, mask = torch.ones(1, 3, dtype=torch.long), torch.tensor([[1, 1, 0]])
    with pytest.raises(ValueError, match="padded on the left"):
        model.generate(ids, mask)


def test_the_pipeline_answers_alike_from_a_saved_folder(asked, tmp_path):
    model, processor, images, _, expected = asked
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    chats = [
        [{"role": "user", "content": [{"type": "image", "image": p}, {"type": "text", "text": q}]}]
        for p, q in zip(images, QUESTIONS, strict=True)
    ]
    pipe = pipeline("image-text-to-text", model=str(tmp_path), trust_remote_code=True)
    for batch_size in (1, 2):
        answers = pipe(text=chats, return_full_text=False, batch_size=batch_size)
        texts = [answer[0]["generated_text"].strip() for answer in answers]
        assert texts == [row[0] for row in expected.texts]
