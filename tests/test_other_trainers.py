"""PEFT's models for causal language modeling and transformers' Seq2SeqTrainer call the model."""

import copy

import pytest
import torch
from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments

QUESTIONS = ["What?", "What is unusual in this picture, and why?"]
ANSWERS = ["a cat", "two green dogs"]


@pytest.fixture
def pair(make):
    model, processor = make(generation_defaults={"max_new_tokens": 5})
    return copy.deepcopy(model), processor


@pytest.fixture
def inputs(pair, draw_image):
    _, processor = pair
    return processor([[draw_image(40, 40)], [draw_image(90, 40)]], prompts=QUESTIONS)


@pytest.fixture
def learned(pair, draw_image):
    _, processor = pair
    batch = processor(
        [[draw_image(40, 40)], [draw_image(90, 40)]], prompts=QUESTIONS, answers=ANSWERS
    )
    draws = {"timesteps": torch.tensor([0.6, 0.9]), "noise": torch.rand(batch["labels"].shape)}
    return {**batch, **draws}


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "v_proj"]])
def test_a_causal_lora_learns_and_generates_as_the_model_does(pair, inputs, learned, targets):
    peft = pytest.importorskip("peft")
    model, _ = pair
    loss, ids = model(**learned).loss, model.generate(**inputs)
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=targets)
    adapted = peft.get_peft_model(model, config).eval()
    got = adapted(**learned).loss
    assert torch.equal(got, loss)
    assert torch.equal(adapted.generate(**inputs), ids)

    got.backward()
    gradients = [p.grad for n, p in adapted.named_parameters() if "lora_B" in n]
    assert gradients and all(g is not None for g in gradients)
    assert any(float(g.abs().max()) > 0 for g in gradients)


def test_an_adapter_of_virtual_tokens_is_refused(pair, inputs, learned):
    peft = pytest.importorskip("peft")
    model, _ = pair
    config = peft.PrefixTuningConfig(
        task_type="CAUSAL_LM",
        num_virtual_tokens=2,
        token_dim=32,
        num_layers=2,
        num_attention_heads=4,
    )
    adapted = peft.get_peft_model(model, config)
    with pytest.raises(ValueError, match="expected an adapter of weights, such as LoRA"):
        adapted.generate(**inputs)
    with pytest.raises(ValueError, match="expected past_key_values None, got "):
        adapted(**learned)


@pytest.mark.parametrize("name", ["inputs_embeds", "past_key_values"])
def test_what_a_forward_pass_cannot_use_is_refused(pair, learned, name):
    with pytest.raises(ValueError, match=f"expected {name} None, got "):
        pair[0](**learned, **{name: torch.zeros(2, 3, 32)})


def test_a_forward_pass_takes_what_trainers_pass(pair, learned):
    model, _ = pair
    loss = model(**learned).loss
    neutral = {"inputs_embeds": None, "past_key_values": None, "use_cache": False}
    assert torch.equal(model(**learned, **neutral, output_attentions=False).loss, loss)
    for name in ("use_cache", "output_attentions"):
        with pytest.raises(ValueError, match=f"expected {name} False, got True"):
            model(**learned, **{name: True})


@pytest.mark.parametrize("name", ["attention_mask", "position_ids", "region_ids", "role_ids"])
def test_tensors_of_another_length_are_refused(pair, inputs, name):
    with pytest.raises(ValueError, match=rf"expected {name} of the shape of input_ids \(2, "):
        pair[0](**{**inputs, name: inputs[name][:, 1:]})


class Questions(torch.utils.data.Dataset):
    """Images with a question and its answer."""

    def __init__(self, draw_image):
        sizes = [(40, 40), (90, 40), (30, 70)]
        images = [draw_image(*size, seed=i) for i, size in enumerate(sizes)]
        questions, answers = [*QUESTIONS, "Who is it?"], [*ANSWERS, "nobody"]
        self.rows = list(zip(images, questions, answers, strict=True))

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return self.rows[index]


@pytest.mark.parametrize("length", [{}, {"generation_max_length": 120}])
def test_a_trainer_predicts_with_generate(pair, draw_image, tmp_path, length):
    model, processor = pair
    seen = []

    def collate(rows):
        images, questions, answers = map(list, zip(*rows, strict=True))
        return processor([[p] for p in images], prompts=questions, answers=answers)

    def measure(prediction):
        seen.append(prediction)
        return {"rows": float(len(prediction.predictions))}

    rows = Questions(draw_image)
    trainer = Seq2SeqTrainer(
        model=model,
        args=Seq2SeqTrainingArguments(
            str(tmp_path),
            per_device_train_batch_size=3,
            per_device_eval_batch_size=2,
            max_steps=1,
            predict_with_generate=True,
            remove_unused_columns=False,
            report_to=[],
            use_cpu=True,
            **length,
        ),
        data_collator=collate,
        train_dataset=rows,
        eval_dataset=rows,
        processing_class=processor,
        compute_metrics=measure,
    )
    trainer.train()
    metrics = trainer.evaluate()
    assert metrics["eval_rows"] == 3 and metrics["eval_loss"] > 0

    prompts = processor([[rows[2][0]]], prompts=rows[2][1])
    prompt = prompts["input_ids"].shape[1]
    given = {"max_length": 120} if length else {"max_new_tokens": 5}
    expected = model.eval().generate(**prompts, **given)[0, prompt:].tolist()
    predicted = seen[0].predictions[2]  # batches are padded to one length by the trainer
    assert expected == predicted[prompt : prompt + len(expected)].tolist()
