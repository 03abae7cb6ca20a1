"""TRL's SFTTrainer trains with the model's own loss."""

import copy

import pytest
import torch

pytest.importorskip("trl")

from datasets import Dataset
from peft import LoraConfig
from perceptiondlm.training.sft import ConversationCollator, DiffusionSFTTrainer
from trl import SFTConfig, SFTTrainer

QUESTIONS = ["How many?", "What is unusual in this picture, and why?"]
ANSWERS = ["three", "two green dogs"]


def config(tmp_path, **options) -> SFTConfig:
    defaults = dict(max_steps=2, per_device_train_batch_size=2, logging_steps=1, report_to=[])
    return SFTConfig(str(tmp_path), **{**defaults, "use_cpu": True, "bf16": False, **options})


def message(role: str, text: str) -> dict:
    return {"role": role, "content": text}


@pytest.fixture
def pair(make):
    model, processor = make(generation_defaults={"max_new_tokens": 5})
    return copy.deepcopy(model), processor


@pytest.fixture
def rows(draw_image):
    turns = [
        ([message("user", q)], [message("assistant", a)])
        for q, a in zip(QUESTIONS, ANSWERS, strict=True)
    ]
    prompts, completions = map(list, zip(*turns, strict=True))
    images = [[draw_image(40, 40)], [draw_image(90, 40)]]
    return {
        "text": {"messages": [p + c for p, c in turns]},
        "images": {"messages": [p + c for p, c in turns], "images": images},
        "pairs": {"prompt": prompts, "completion": completions, "images": images},
    }


@pytest.mark.parametrize("kind", ["text", "images", "pairs"])
def test_a_batch_is_what_the_processor_makes_of_questions(pair, rows, kind):
    _, processor = pair
    data = Dataset.from_dict(rows[kind])
    batch = ConversationCollator(processor, None)([data[i] for i in range(2)])
    expected = processor(rows[kind].get("images"), prompts=QUESTIONS, answers=ANSWERS)
    assert batch.keys() == expected.keys()
    assert all(torch.equal(batch[name], value) for name, value in expected.items())


@pytest.mark.parametrize("kind", ["text", "images"])
@pytest.mark.parametrize("lora", [False, True])
def test_the_loss_is_the_models_own_and_generation_works_after(pair, rows, kind, lora, tmp_path):
    model, processor = pair
    losses = []
    forward = model.forward

    def watch(*args, **kwargs):
        out = forward(*args, **kwargs)
        if getattr(out, "loss", None) is not None:
            losses.append(float(out.loss))
        return out

    model.forward = watch
    adapter = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]) if lora else None
    trainer = DiffusionSFTTrainer(
        model,
        config(tmp_path, gradient_checkpointing=False),
        processing_class=processor,
        train_dataset=Dataset.from_dict(rows[kind]),
        peft_config=adapter,
    )
    trainer.train()
    logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert logged == pytest.approx(losses, rel=1e-3) and len(logged) == 2
    inputs = processor(prompts="What?")
    assert trainer.model.generate(**inputs).shape[1] == inputs["input_ids"].shape[1] + 5


def test_trls_own_trainer_stops_and_names_the_one_to_use(pair, rows, tmp_path):
    model, processor = pair
    data = Dataset.from_dict(rows["text"])
    trainer = SFTTrainer(model, config(tmp_path), train_dataset=data, processing_class=processor)
    with pytest.raises(AttributeError, match="DiffusionSFTTrainer"):
        trainer.train()


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"packing": True}, "packing"),
        ({"loss_type": "dft"}, "loss_type"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor"),
        ({"assistant_only_loss": True}, "assistant_only_loss"),
        ({"completion_only_loss": False}, "completion_only_loss"),
    ],
)
def test_an_option_without_meaning_is_refused(pair, rows, tmp_path, options, name):
    model, processor = pair
    with pytest.raises(ValueError, match=f"expected {name} "):
        DiffusionSFTTrainer(
            model,
            config(tmp_path, **options),
            processing_class=processor,
            train_dataset=Dataset.from_dict(rows["text"]),
        )


def test_a_row_that_does_not_end_with_an_answer_is_refused(pair):
    _, processor = pair
    collate = ConversationCollator(processor, None)
    with pytest.raises(ValueError, match="expected one assistant message at a row's end"):
        collate([{"messages": [message("user", "What?"), message("user", "Who?")]}])
    with pytest.raises(ValueError, match="expected rows with messages"):
        collate([{"text": "plain"}])


def test_a_row_beyond_max_length_is_refused(pair):
    _, processor = pair
    row = {"messages": [message("user", "What is it?"), message("assistant", "a cat")]}
    with pytest.raises(ValueError, match="at most max_length 10 tokens, got"):
        ConversationCollator(processor, 10)([row])
