"""Options of recipes: all of transformers' are known, those without effect here are refused."""

import dataclasses
import warnings
from pathlib import Path

import pytest
import torch
import yaml
from perceptiondlm.apps.cli import main
from perceptiondlm.training import trainer_options
from perceptiondlm.training.recipe import build_recipe, load_recipe
from perceptiondlm.training.run import arguments_of, build_trainer, train
from perceptiondlm.training.trainer_options import HONORED, NEUTRAL, REFUSED, check_trainer
from training_runs import losses_of, recipe_values, small_recipe
from transformers import Trainer, TrainingArguments

RECIPES = Path(__file__).parents[1] / "configs"
FIELDS = {f.name for f in dataclasses.fields(TrainingArguments) if f.init}


def test_recipes_go_on_from_folders_that_no_hub_id_can_mean():
    sections = [yaml.safe_load(path.read_text()) for path in sorted(RECIPES.glob("*.yaml"))]
    parts = [recipe.get(name) or {} for recipe in sections for name in ("model", "distillation")]
    checkpoints = [part["checkpoint"] for part in parts if "checkpoint" in part]
    assert len(checkpoints) >= 9
    assert all(checkpoint.startswith("./") for checkpoint in checkpoints)


def test_every_training_argument_is_classified_once():
    tables = [HONORED, set(NEUTRAL), set(REFUSED)]
    assert not FIELDS - set().union(*tables), "say what these do in training/trainer_options.py"
    assert sum(map(len, tables)) == len(set().union(*tables))


MEANINGFUL = {
    bool: lambda default: not default,
    int: lambda default: 7,
    float: lambda default: 0.25,
    str: lambda default: "other",
}


def another_value(name: str):
    """A value of the field's type that is not its default."""
    (field,) = (f for f in dataclasses.fields(TrainingArguments) if f.name == name)
    hint = str(field.type)
    kind = next((k for k in MEANINGFUL if k.__name__ in hint), dict)
    return MEANINGFUL.get(kind, lambda default: {"a": 1})(field.default)


@pytest.mark.parametrize("name", sorted({*NEUTRAL, *REFUSED} & FIELDS))
def test_an_option_without_effect_is_refused_with_the_reason(name):
    value = not NEUTRAL[name][0] if name in NEUTRAL else another_value(name)
    with pytest.raises(ValueError, match=f"trainer.{name}.*since .*got"):
        check_trainer({"output_dir": "x", name: value})


@pytest.mark.parametrize("name", sorted(set(REFUSED) & FIELDS))
def test_a_refused_option_may_say_transformers_own_default(name):
    default = TrainingArguments.__dataclass_fields__[name].default
    if default is not dataclasses.MISSING:
        assert check_trainer({"output_dir": "x", name: default})


IDLE = {
    "steps of an evaluation that there is none of": {"eval_steps": 5},
    "steps of saving by epochs": {"save_strategy": "epoch", "save_steps": 5},
    "a metric that chooses nothing": {"metric_for_best_model": "loss"},
    "Adam's betas without Adam": {"optim": "sgd", "adam_beta1": 0.5},
    "checkpointing's options without it": {"gradient_checkpointing_kwargs": {"a": 1}},
    "warm-up of a constant rate": {"lr_scheduler_type": "constant", "warmup_steps": 3},
    "options of a schedule that has none": {
        "lr_scheduler_type": "constant",
        "lr_scheduler_kwargs": {"num_cycles": 2},
    },
    "an optimizer that takes no groups": {"optim": "galore_adamw"},
    "an order of samples that there is not": {"train_sampling_strategy": "sequential"},
    "batches split among processes": {"accelerator_config": {"split_batches": True}},
}


@pytest.mark.parametrize("kind", IDLE)
def test_options_that_others_leave_without_effect_are_refused(kind):
    name = list(IDLE[kind])[-1]
    with pytest.raises(ValueError, match=name.removeprefix("gradient_")):
        check_trainer({"output_dir": "x", **IDLE[kind]})


@pytest.mark.parametrize("taken_away", ["{}", "null"])
def test_an_override_takes_a_recipes_schedule_options_away(taken_away):
    constant = ["trainer.lr_scheduler_type=constant", "trainer.warmup_steps=0"]
    recipe = load_recipe(
        "configs/shapes.yaml", [*constant, f"trainer.lr_scheduler_kwargs={taken_away}"]
    )
    assert not recipe.trainer["lr_scheduler_kwargs"]


SECTIONS = {
    "a tokenizer beside a checkpoint's": ({"model": {"checkpoint": "x"}}, "model.tokenizer"),
    "a subfolder of no checkpoint": ({"model": {"subfolder": "x"}}, "model.subfolder"),
    "a size of a tokenizer that is there": ({"model": {"vocab_size": 600}}, "model.vocab_size"),
    "workers without a cache": ({"data": {"cache_workers": 3}}, "data.cache_workers"),
    "a seed without held-out scenes": ({"data": {"eval_first_seed": 3}}, "data.eval_first_seed"),
    "levels without evaluation": ({"masking": {"eval_levels": [1.0]}}, "masking.eval_levels"),
    "evaluation without data": ({"trainer": {"eval_strategy": "epoch"}}, "data.eval_scenes"),
    "an order of a stream": (
        {
            "data": {"kind": "regions", "files": ["a.jsonl"], "streaming": True},
            "trainer": {"train_sampling_strategy": "random"},
        },
        "train_sampling_strategy",
    ),
    "a buffer without a stream": (
        {"data": {"kind": "regions", "files": ["a.jsonl"], "shuffle_buffer": 9}},
        "data.shuffle_buffer",
    ),
    "prompts of conversations": (
        {
            "data": {"kind": "conversations", "files": ["a.jsonl"]},
            "parameters": {"permute_prompts": False},
        },
        "parameters.permute_prompts",
    ),
}


@pytest.mark.parametrize("kind", SECTIONS)
def test_options_that_another_section_leaves_without_effect_are_refused(tmp_path, kind):
    sections, named = SECTIONS[kind]
    values = recipe_values(tmp_path)
    for name, options in sections.items():
        kept = {} if "kind" in options else values[name]
        values[name] = {**kept, **options}
    with pytest.raises(ValueError, match=named):
        build_recipe(values)


def test_data_for_an_evaluation_that_never_comes_is_refused(tmp_path):
    with pytest.raises(ValueError, match="trainer.eval_strategy with data.eval_scenes"):
        train(small_recipe(tmp_path, data={"eval_scenes": 4}))


MISTAKES = {
    "trainer.learning_rat=1": ["learning_rate", "trainer.learning_rat", "'learning_rat'"],
    "data.scnes=3": ["scenes", "scene_sets"],
    "lr=abc": ["'lr'", "nearest"],
    "learning_rate=1": ["trainer.learning_rate"],
    "trainer.learning_rate=abc": ["a finite number", "'abc'"],
    "trainer.learning_rate=.nan": ["a finite number"],
    "trainer.max_steps=many": ["trainer.max_steps", "'many'"],
    "trainer.lr_scheduler_type=sideways": ["sideways"],
    "trainer.optim=best": ["best"],
    "trainer.lr_scheduler_kwargs={wrong: 1}": ["lr_scheduler_kwargs"],
    "data.scenes='3'": ["data.scenes", "int", "'3'"],
    "data.cache=1": ["data.cache", "bool"],
    "parameters.frozen=[{a: 1}]": ["parameters.frozen", "list[str]"],
    "parameters.learning_rates={connector: .inf}": ["finite number", "inf"],
    "lora.target_modules={a: 1}": ["lora.target_modules", "list[str] | str"],
    "model.dtype=${nothing}": ["model.dtype", "'nothing'"],
    "trainer=3": ["trainer"],
    "data=[1]": ["data"],
    "save_code=maybe": ["save_code"],
    "trainer.report_to=wandb": ["wandb", "install"],
    "trainer.report_to=nowhere": ["nowhere", "tensorboard"],
}


@pytest.fixture
def recipe_file(tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe_values(tmp_path / "run")))
    return file


@pytest.mark.parametrize("override", MISTAKES)
def test_a_mistaken_option_is_one_line_and_exit_code_2(recipe_file, capsys, monkeypatch, override):
    monkeypatch.setattr(trainer_options, "get_available_reporting_integrations", list)
    assert main(["train", str(recipe_file), override]) == 2
    *_, last = capsys.readouterr().err.strip().splitlines()
    assert last.startswith("perceptiondlm train: ")
    assert "Traceback" not in last
    for word in MISTAKES[override][:1] if "trainer." in override else MISTAKES[override]:
        assert word in last


def test_a_value_may_refer_to_another_and_no_is_a_word(recipe_file):
    overrides = ["trainer.run_name=run-${trainer.seed}", "trainer.eval_strategy=no"]
    trainer = load_recipe(recipe_file, [*overrides, "trainer.learning_rate=1e-3"]).trainer
    assert trainer["run_name"] == f"run-{trainer['seed']}"
    assert trainer["eval_strategy"] == "no" and trainer["learning_rate"] == 0.001


def test_a_mistyped_key_gets_the_three_nearest(recipe_file, capsys):
    main(["train", str(recipe_file), "trainer.lerning_rate=1"])
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "(nearest: learning_rate, " in line
    assert len(line.split("nearest: ")[1].split(",")) == 3 and len(line) < 200


@pytest.mark.parametrize("name", ["gradient_checkpointing", "activation_checkpointing"])
def test_checkpointing_by_either_name_warns_of_nothing(tmp_path, name):
    plain = losses_of(train(small_recipe(tmp_path / "a", trainer={"max_steps": 2})))
    options = {"max_steps": 2, name: True, f"{name}_kwargs": {"use_reentrant": False}}
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        trainer = train(small_recipe(tmp_path / "b", trainer=options))
    assert losses_of(trainer) == plain
    assert trainer.args.gradient_checkpointing


BEST = {
    "max_steps": 6,
    "eval_strategy": "steps",
    "eval_steps": 2,
    "save_steps": 2,
    "save_strategy": "steps",
    "load_best_model_at_end": True,
}


def test_the_best_model_is_that_of_the_lowest_evaluation_loss(tmp_path):
    # a rate at which the loss gets worse from step to step, so that the first is the best
    trainer = train(
        small_recipe(
            tmp_path / "run",
            data={"eval_scenes": 4},
            masking={"eval_levels": [0.5, 1.0]},
            trainer={**BEST, "learning_rate": 3.0},
        )
    )
    logged = {e["step"]: e["eval_loss"] for e in trainer.state.log_history if "eval_loss" in e}
    levels = {
        e["step"]: (e["eval_t50_loss"], h["eval_t100_loss"])
        for e in trainer.state.log_history
        for h in trainer.state.log_history
        if "eval_t50_loss" in e and "eval_t100_loss" in h and h["step"] == e["step"]
    }
    assert sorted(logged) == [2, 4, 6]
    assert all(logged[k] == pytest.approx(sum(levels[k]) / 2) for k in logged)
    best = min(logged, key=logged.get)
    assert trainer.state.best_metric == logged[best]
    assert trainer.state.best_model_checkpoint == str(tmp_path / "run" / f"checkpoint-{best}")
    assert trainer.evaluate()["eval_loss"] == pytest.approx(logged[best])


def test_a_rotation_keeps_the_best_checkpoint(tmp_path):
    options = {**BEST, "learning_rate": 3.0, "save_total_limit": 1}
    trainer = train(small_recipe(tmp_path / "run", data={"eval_scenes": 4}, trainer=options))
    left = sorted(f.name for f in (tmp_path / "run").glob("checkpoint-*"))
    assert left == [f"checkpoint-{trainer.state.best_global_step}"]


class Rows(torch.utils.data.Dataset):
    """A data set for a plain Trainer: every row is the same."""

    def __len__(self):
        return 4

    def __getitem__(self, index):
        return index


def plain_trainer(tmp_path, make, options: dict, **arguments_of) -> Trainer:
    model, processor = make(num_region_prompts=3, region_layout="independent")

    def collate(rows):
        return dict(processor(prompts=["what?"] * len(rows), answers=["this"] * len(rows)))

    args = TrainingArguments(
        output_dir=str(tmp_path),
        use_cpu=True,
        max_steps=2,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        **options,
    )
    rows = {"train_dataset": Rows(), "eval_dataset": Rows()}
    return Trainer(model, args, data_collator=collate, **rows, **arguments_of)


def test_a_plain_trainer_that_smooths_labels_is_stopped(tmp_path, make):
    trainer = plain_trainer(tmp_path, make, {"label_smoothing_factor": 0.1})
    with pytest.raises(ValueError, match="label_smoothing_factor"):
        trainer.train()


def test_a_plain_trainer_with_a_loss_of_its_own_is_stopped(tmp_path, make):
    trainer = plain_trainer(tmp_path, make, {}, compute_loss_func=lambda *a, **k: None)
    with pytest.raises(ValueError, match="compute_loss_func"):
        trainer.train()


def test_timesteps_and_noise_without_labels_are_refused(make):
    model, processor = make()
    inputs = processor(prompts="what?", max_new_tokens=3)
    with pytest.raises(ValueError, match="only with labels"):
        model(**inputs, timesteps=torch.ones(1))


def test_responses_of_which_something_is_masked_train_without_labels(make):
    model, processor = make(num_region_prompts=3, region_layout="independent")
    inputs = processor(prompts="what?", max_new_tokens=3)
    try:
        assert model.train()(**inputs).logits is not None
    finally:
        model.eval()


def test_a_stream_takes_the_trainers_options_of_workers(tmp_path):
    recipe = small_recipe(
        tmp_path,
        data={"eval_scenes": 4},
        trainer={"dataloader_num_workers": 1, "dataloader_prefetch_factor": 5},
    )
    trainer = build_trainer(recipe, arguments_of(recipe))
    loader = trainer.get_eval_dataloader("t25")
    assert loader.prefetch_factor == 5


def test_an_option_that_a_schedule_does_not_take_is_refused(tmp_path):
    options = {"lr_scheduler_type": "cosine", "lr_scheduler_kwargs": {"wrong": 1}}
    with pytest.raises(ValueError, match="lr_scheduler_kwargs of cosine, .*wrong"):
        train(small_recipe(tmp_path, trainer=options))
