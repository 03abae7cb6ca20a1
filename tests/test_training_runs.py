"""Whole runs: batches, resuming, freezing, evaluation, saved folders."""

import functools
import json

import datasets
import pytest
import torch
import yaml
from perceptiondlm.apps.cli import main
from perceptiondlm.common.loading import load_model
from perceptiondlm.modeling_perceptiondlm import PerceptionDLMForConditionalGeneration
from perceptiondlm.training.muon import Muon, WithMuon
from perceptiondlm.training.param_groups import belongs
from perceptiondlm.training.recipe import build_recipe, load_recipe
from perceptiondlm.training.recipe_sections import SyntheticData
from perceptiondlm.training.run import arguments_of, build_datasets, build_trainer, train
from shapes import ROOT, SHAPES
from torch.distributed.fsdp import fully_shard
from training_runs import TINY, losses_of, recipe_values, small_recipe, weights_of
from transformers import AutoModel, AutoProcessor, TrainingArguments

CONFIGS = ROOT / "configs"


@pytest.fixture
def recipe_of(tmp_path):
    return functools.partial(small_recipe, tmp_path / "run")


def test_gradient_accumulation_equals_a_larger_batch(recipe_of):
    whole = train(recipe_of())
    parts = train(
        recipe_of(trainer={"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2})
    )
    assert losses_of(parts) == pytest.approx(losses_of(whole), abs=1e-4)  # logs are rounded
    for name, weight in weights_of(whole).items():
        assert torch.allclose(weight, parts.model.state_dict()[name], atol=2e-4), name


MUON = {"muon": ["language_model.model.layers"]}


@pytest.mark.parametrize(
    "workers, at, parameters", [(0, 4, {}), (1, 4, {}), (0, 8, {}), (0, 4, MUON)]
)
def test_a_resumed_run_equals_an_uninterrupted_one(recipe_of, tmp_path, workers, at, parameters):
    # 24 scenes in batches of 4: step 8 lies in the second epoch
    saving = {
        "max_steps": 9,
        "save_strategy": "steps",
        "save_steps": 4,
        "lr_scheduler_type": "cosine",
        "dataloader_num_workers": workers,
    }
    whole = train(recipe_of(trainer=saving, parameters=parameters))
    again = {**saving, "output_dir": str(tmp_path / "again")}
    resumed = train(
        recipe_of(trainer=again, parameters=parameters),
        resume=str(tmp_path / "run" / f"checkpoint-{at}"),
    )
    assert losses_of(resumed) == losses_of(whole)
    for name, weight in weights_of(whole).items():
        assert torch.equal(weight, resumed.model.state_dict()[name]), name


def test_one_batch_overfits_to_nearly_no_loss(recipe_of):
    recipe = recipe_of(
        data={"scenes": 4, "region_share": 0.5},
        masking={"loss_weighting": "none", "t_low": 1.0, "t_high": 1.0},
        parameters={"permute_prompts": False},
        trainer={"max_steps": 1},
    )
    trainer = build_trainer(recipe, arguments_of(recipe))
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(4)])
    optimizer = torch.optim.AdamW(trainer.model.parameters(), 5e-3)
    for _ in range(250):
        loss = trainer.compute_loss(trainer.model.train(), dict(batch))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trainer.model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if loss.item() < 0.02:
            break
    assert loss.item() < 0.02


FREEZING = {
    "connector only": ({"trainable": ["connector"]}, {"connector"}),
    "all but the vision tower": (
        {"frozen": ["vision_tower"]},
        {"connector", "region_prompts", "language_model"},
    ),
    "part of the decoder": (
        {"trainable": ["language_model"], "frozen": ["language_model.lm_head"]},
        {"language_model"},
    ),
}


@pytest.mark.parametrize("kind", FREEZING)
def test_frozen_modules_stay_and_the_others_learn(recipe_of, kind):
    options, learning = FREEZING[kind]
    recipe = recipe_of(parameters=options, trainer={"max_steps": 2})
    trainer = build_trainer(recipe, arguments_of(recipe))
    before = weights_of(trainer)
    trainer.train()
    changed = {n for n, w in trainer.model.state_dict().items() if not torch.equal(w, before[n])}
    assert {name.split(".")[0] for name in changed} == learning
    assert (
        "language_model.lm_head.weight" not in changed
        or not options.get("frozen")
        or ("language_model.lm_head" not in options["frozen"])
    )


def test_zeroed_modules_are_zero_after_training(recipe_of):
    trainer = train(recipe_of(parameters={"zeroed": ["region_prompts"]}, trainer={"max_steps": 2}))
    assert not trainer.model.region_prompts.weight.any()


def test_an_unknown_module_is_refused(recipe_of):
    recipe = recipe_of(parameters={"frozen": ["visual_tower"]})
    with pytest.raises(ValueError, match="connector.*got 'visual_tower'"):
        build_trainer(recipe, arguments_of(recipe))


def test_modules_learn_at_their_own_rates_without_decay_of_norms_and_biases(recipe_of):
    rates = {"vision_tower": 1e-4, "language_model.lm_head": 1e-5}
    recipe = recipe_of(
        parameters={"learning_rates": rates}, trainer={"learning_rate": 1e-3, "weight_decay": 0.1}
    )
    trainer = build_trainer(recipe, arguments_of(recipe))
    names = {p: n for n, p in trainer.model.named_parameters()}
    found = {
        names[p]: (group["lr"], group["weight_decay"])
        for group in trainer.create_optimizer().param_groups
        for p in group["params"]
    }
    assert len(found) == len(names)
    assert found["vision_tower.embeddings.patch_embedding.weight"] == (1e-4, 0.1)
    assert found["vision_tower.embeddings.patch_embedding.bias"] == (1e-4, 0.0)
    assert found["language_model.lm_head.weight"] == (1e-5, 0.1)
    assert found["language_model.model.norm.weight"] == (1e-3, 0.0)
    assert found["connector.linear_1.weight"] == (1e-3, 0.1)


@pytest.mark.parametrize("warned", [True, False])
def test_emulated_bfloat16_is_warned_of(recipe_of, monkeypatch, caplog, warned):
    monkeypatch.setattr("perceptiondlm.training.run.emulates", lambda device: warned)
    train(recipe_of(trainer={"max_steps": 1, "bf16": True}))
    assert ("trainer.bf16=false" in caplog.text) == warned


def test_muon_turns_matrices_evenly_and_the_rest_steps_as_before():
    matrix, other = (torch.nn.Parameter(torch.zeros(24, 40)) for _ in range(2))
    adamw = torch.optim.AdamW([other], lr=1e-3, weight_decay=0.0)
    optimizer = WithMuon([{"params": [matrix], "lr": 1e-2, "weight_decay": 0.0}], adamw)
    matrix.grad, other.grad = torch.randn(2, 24, 40, generator=torch.Generator().manual_seed(0))
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    for k in range(2):
        before = matrix.detach().clone(), other.detach().clone()
        optimizer.step()
        scheduler.step()
        turns = torch.linalg.svdvals(matrix.detach() - before[0])
        turns = turns / (0.5**k * 1e-2 * 0.2 * 40**0.5)  # as large as AdamW's update
        assert 0.6 < turns.min() and turns.max() < 1.3
        step = (other.detach() - before[1]).abs()
        assert torch.allclose(step, torch.tensor(0.5**k * 1e-3), rtol=1e-3)


def test_muon_is_torchs_but_for_its_rounding_to_bfloat16():
    generator = torch.Generator().manual_seed(0)
    shapes = [(24, 40), (40, 24), (24, 40), (16, 16)]
    starts = [torch.randn(shape, generator=generator) for shape in shapes]
    ours, theirs = ([torch.nn.Parameter(m.clone()) for m in starts] for _ in range(2))
    options = {"lr": 1e-2, "weight_decay": 0.1}
    scale = {"adjust_lr_fn": "match_rms_adamw"}
    optimizers = [Muon([{"params": ours, **options}]), torch.optim.Muon(theirs, **options, **scale)]
    for _ in range(4):
        for one, other in zip(ours, theirs, strict=True):
            one.grad = torch.randn(one.shape, generator=generator)
            other.grad = one.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for start, one, other in zip(starts, ours, theirs, strict=True):
        moved = (other.detach() - start).norm()
        assert (one.detach() - other.detach()).norm() < 0.02 * moved


def test_the_recipes_muon_takes_its_matrices_and_no_others(recipe_of):
    recipe = recipe_of(parameters=MUON)
    trainer = build_trainer(recipe, arguments_of(recipe))
    names = {p: n for n, p in trainer.model.named_parameters()}
    muon, adamw = (
        {names[p] for group in part.param_groups for p in group["params"]}
        for part in trainer.create_optimizer().parts
    )
    layers = {n for n in names.values() if n.startswith("language_model.model.layers.")}
    assert muon == {n for n in layers if "norm" not in n}
    assert muon | adamw == set(names.values()) and not muon & adamw


def test_muon_of_an_unknown_module_is_refused(recipe_of):
    recipe = recipe_of(parameters={"muon": ["decoder"]})
    with pytest.raises(ValueError, match="got 'decoder'"):
        build_trainer(recipe, arguments_of(recipe))


def test_loss_weightings_differ_in_training_and_not_in_evaluation(recipe_of):
    runs = []
    for weighting in ("none", "inverse_rate"):
        recipe = recipe_of(masking={"loss_weighting": weighting}, data={"eval_scenes": 4})
        trainer = build_trainer(recipe, arguments_of(recipe))
        batch = trainer.data_collator([trainer.train_dataset[i] for i in range(4)])
        train_loss = trainer.compute_loss(trainer.model.train(), dict(batch)).item()
        runs.append((train_loss, trainer.evaluate()))
    assert runs[0][0] != pytest.approx(runs[1][0], rel=1e-3)
    for name in ("eval_t25_loss", "eval_t100_loss"):
        assert runs[0][1][name] == pytest.approx(runs[1][1][name])


def test_the_evaluation_loss_repeats_and_has_the_levels_asked_for(recipe_of):
    recipe = recipe_of(masking={"eval_levels": [0.5, 1.0]}, data={"eval_scenes": 6})
    trainer = build_trainer(recipe, arguments_of(recipe))
    one, other = trainer.evaluate(), trainer.evaluate()
    names = {name for name in one if name.endswith("_loss")}
    assert names == {"eval_t50_loss", "eval_t100_loss", "eval_loss"}
    assert one["eval_loss"] == pytest.approx((one["eval_t50_loss"] + one["eval_t100_loss"]) / 2)
    assert all(one[name] == other[name] for name in names)
    assert one["eval_t50_loss"] != one["eval_t100_loss"]


def test_several_questions_of_a_sample_need_the_independent_layout(recipe_of):
    data = {"questions_per_sample": 3, "region_share": 0.0}
    recipe = recipe_of(data=data)
    dataset = build_trainer(recipe, arguments_of(recipe)).train_dataset
    regions = [max(dataset[i].sequence.regions) for i in range(8)]
    assert regions == [2] * 8
    recipe = recipe_of(data=data, model={"config": {**TINY, "region_layout": "released"}})
    with pytest.raises(ValueError, match="questions_per_sample of 1 .* got 3 in 'released'"):
        build_trainer(recipe, arguments_of(recipe))


def test_gradient_checkpointing_changes_no_loss(recipe_of):
    plain = train(recipe_of())
    saving = train(recipe_of(trainer={"gradient_checkpointing": True}))
    assert losses_of(saving) == losses_of(plain)


def test_a_cached_and_a_rendered_epoch_are_the_same(recipe_of):
    cached = recipe_of(data={"cache": True, "scenes": 6})
    plain = recipe_of(data={"scenes": 6})
    one, other = (build_trainer(r, arguments_of(r)).train_dataset for r in (cached, plain))
    for i in range(6):
        a, b = one[i], other[i]
        assert a.sequence == b.sequence
        assert all(torch.equal(a.features[n], b.features[n]) for n in a.features)


def numbers_of_regions(data, epochs):
    """How many regions each sample of some epochs has; 0 for one that asks about the whole."""
    indices = range(epochs * len(data))
    return [len(data[i].features.get("boxes", [])) for i in indices]


@pytest.mark.parametrize(
    ("options", "repeats"),
    [
        ({"fresh": False}, [True, True, True]),
        ({"fresh": True}, [False, False, False]),
        ({"scene_sets": 2}, [False, True, False]),
        ({"scene_sets": 2, "cache": True}, [False, True, False]),
    ],
)
def test_which_epochs_show_the_scenes_of_the_first(recipe_of, options, repeats):
    recipe = recipe_of(data={"scenes": 3, "region_share": 1.0, **options})
    data = build_trainer(recipe, arguments_of(recipe)).train_dataset

    def images(epoch):
        return [data[3 * epoch + i].features["pixel_values"] for i in range(3)]

    first = images(0)
    assert [all(map(torch.equal, first, images(epoch))) for epoch in (1, 2, 3)] == repeats


def test_the_first_epoch_may_have_another_share_of_regions(recipe_of):
    def counts(**options):
        recipe = recipe_of(data={"scenes": 8, **options})
        return numbers_of_regions(build_trainer(recipe, arguments_of(recipe)).train_dataset, 3)

    questions_first = counts(region_share=1.0, first_region_share=0.0)
    assert not any(questions_first[:8]) and all(questions_first[8:])
    regions_first = counts(region_share=0.0, first_region_share=1.0)
    assert all(regions_first[:8]) and not any(regions_first[8:])
    assert counts(region_share=0.5, first_region_share=None) == counts(region_share=0.5)


def test_held_out_scenes_know_nothing_of_first_epochs_and_sets(recipe_of):
    recipe = recipe_of(
        data={
            "region_share": 1.0,
            "first_region_share": 0.0,
            "scene_sets": 3,
            "eval_scenes": 5,
            "cache": True,
        }
    )
    processor = build_trainer(recipe, arguments_of(recipe)).processing_class
    held_out = build_datasets(recipe, processor, arguments_of(recipe))[1]
    assert len(held_out) == len(held_out.cached) == 5
    assert all(numbers_of_regions(held_out, 1))


@pytest.mark.parametrize("name", ["region_share", "first_region_share"])
def test_a_model_without_region_prompts_takes_no_share_of_regions(recipe_of, name):
    data = {"region_share": 0.0, "first_region_share": 0.0, name: 0.5}
    recipe = recipe_of(data=data, model={"config": {**TINY, "num_region_prompts": 0}})
    with pytest.raises(ValueError, match="of 0 for a model without region prompts, got .*0.5"):
        build_trainer(recipe, arguments_of(recipe))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scene_sets": 0}, "data.scene_sets"),
        ({"first_region_share": 1.5}, "data.first_region_share"),
        ({"fresh": True, "scene_sets": 2}, "data.scene_sets of 2 only without data.fresh"),
        ({"fresh": True, "cache": True}, "data.cache only without data.fresh"),
    ],
)
def test_options_of_synthetic_data_that_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        SyntheticData(**options)


def test_options_of_synthetic_data_change_the_samples(recipe_of):
    def samples(**options):
        recipe = recipe_of(data=options)
        data = build_trainer(recipe, arguments_of(recipe)).train_dataset
        return [data[i] for i in range(12)]

    assert all("boxes" in s.features for s in samples(region_share=1.0))
    assert not any("boxes" in s.features for s in samples(region_share=0.0))
    assert max(len(s.features["boxes"]) for s in samples(region_share=1.0)) > 2
    few = samples(region_share=1.0, regions_per_sample=2)
    assert max(len(s.features["boxes"]) for s in few) == 2


def test_batches_hold_samples_of_like_length_and_an_epoch_all(recipe_of):
    recipe = recipe_of(data={"cache": True, "scenes": 24})
    trainer = build_trainer(recipe, arguments_of(recipe))
    sampler = trainer._get_train_sampler()
    order = list(sampler)
    assert sorted(order) == list(range(24))
    lengths = [trainer.train_dataset.length(i) for i in order]
    spread = sum(max(lengths[i : i + 4]) - min(lengths[i : i + 4]) for i in range(0, 24, 4))
    by_chance = sum(
        max(c) - min(c)
        for c in (
            ([trainer.train_dataset.length(i) for i in range(j, j + 4)]) for j in range(0, 24, 4)
        )
    )
    assert spread < by_chance / 2
    sampler.set_epoch(1)
    assert sorted(sampler) == list(range(24, 48))


@pytest.fixture
def files(tmp_path, draw_image, monkeypatch):
    """Data files of both kinds: six images with two boxes each, and a question about each."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    regions, conversations = [], []
    for k in range(6):
        draw_image(40, 40, seed=k).save(tmp_path / f"{k}.png")
        masks = [{"box": [0, 0, 9, 9]}, {"box": [5, 5, 39, 30 + k]}]
        captions = ["a red circle", "a small star"]
        regions.append({"image": f"{k}.png", "masks": masks, "captions": captions})
        turns = [{"from": "human", "value": "how many?"}, {"from": "gpt", "value": "two"}]
        with_image = {"image": f"{k}.png"} if k % 2 else {}
        conversations.append({**with_image, "conversations": turns})
    for name, records in (("regions", regions), ("conversations", conversations)):
        text = "\n".join(map(json.dumps, records))
        (tmp_path / f"{name}.jsonl").write_text(text)
    return tmp_path


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("kind", ["regions", "conversations"])
def test_a_run_on_files_resumes_exactly(files, tmp_path, kind, streaming):
    def run(name, resume=None):
        values = recipe_values(
            tmp_path / name,
            trainer={
                "max_steps": 4,
                "save_strategy": "steps",
                "save_steps": 2,
                "per_device_train_batch_size": 2,
            },
        )
        data = {"kind": kind, "files": [str(files / f"{kind}.jsonl")], "streaming": streaming}
        return losses_of(train(build_recipe({**values, "data": data}), resume=resume))

    losses = run("run")
    assert len(losses) == 4
    assert run("again", resume=str(tmp_path / "run" / "checkpoint-2")) == losses


def test_a_run_stops_with_the_reason_when_too_many_records_are_broken(files, tmp_path):
    for name in ("0.png", "1.png"):
        (files / name).unlink()
    values = recipe_values(tmp_path / "run")
    data = {"kind": "regions", "files": [str(files / "regions.jsonl")], "max_broken_share": 0.1}
    with pytest.raises(ValueError, match=r"data\.max_broken_share.*2 of 6.*line \d"):
        train(build_recipe({**values, "data": data}))


def test_a_text_batch_gives_every_module_a_gradient_among_processes(make, monkeypatch):
    model, processor = make(num_region_prompts=3)
    inputs = processor(prompts="what?", answers="this")
    torch.manual_seed(0)
    alone = model(**inputs, timesteps=torch.ones(1)).loss
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    model.train()
    try:
        loss = model(**inputs, timesteps=torch.ones(1)).loss
        loss.backward()
        assert loss.item() == pytest.approx(alone.item(), rel=1e-6)
        assert all(p.grad is not None for p in model.parameters())
    finally:
        model.eval().zero_grad()


def test_an_evaluated_text_batch_runs_every_sharded_module(make_config, tmp_path):
    model = PerceptionDLMForConditionalGeneration(make_config(num_region_prompts=3)).eval()
    runs = []
    layer = model.vision_tower.encoder.layers[0]
    layer.register_forward_hook(lambda *_: runs.append(1))
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1
    )
    try:
        with torch.no_grad():
            model(torch.tensor([[5, 6]]))
            assert not runs
            fully_shard(layer)
            model(torch.tensor([[5, 6]]))
            assert runs == [1]
    finally:
        torch.distributed.destroy_process_group()


def test_a_changed_config_changes_the_processor(tmp_path, draw_image, blobs):
    base = tmp_path / "base"
    without = {**TINY, "num_region_prompts": 0, "region_layout": "released", "roi_output_size": 3}
    data = {"region_share": 0.0}
    train(small_recipe(base, model={"config": without}, data=data, trainer={"max_steps": 1}))
    wanted = {
        name: TINY[name] for name in ("num_region_prompts", "region_layout", "roi_output_size")
    }
    sections = {"model": {"checkpoint": str(base), "config": wanted, "tokenizer": None}}
    folder = tmp_path / "run"
    train(small_recipe(folder, **sections, data={"region_share": 1.0}, trainer={"max_steps": 1}))
    model = AutoModel.from_pretrained(folder, trust_remote_code=True)
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    assert processor.image_processor.num_region_prompts == 8
    assert (processor.region_layout, processor.roi_output_size) == ("independent", 2)
    captions = model.diffusion_generate(draw_image(40, 60), blobs(40, 60, 3), steps=2).texts[0]
    assert len(captions) == 3


def test_a_finished_run_is_left_as_it_is(recipe_of, tmp_path):
    saving = {"max_steps": 2, "save_strategy": "steps", "save_steps": 2}
    before = weights_of(train(recipe_of(trainer=saving)))
    folder = tmp_path / "run"
    stamp = (folder / "model.safetensors").stat().st_mtime_ns
    for resume in (True, str(folder / "checkpoint-2")):
        train(recipe_of(trainer=saving), resume=resume)
    assert (folder / "model.safetensors").stat().st_mtime_ns == stamp
    assert not (folder / "checkpoint-3").exists()
    longer = train(recipe_of(trainer={**saving, "max_steps": 3}), resume=True)
    assert longer.state.global_step == 3
    assert not all(torch.equal(w, before[name]) for name, w in weights_of(longer).items())


def test_fewer_samples_than_a_batch_are_refused(recipe_of):
    recipe = recipe_of(data={"scenes": 3})
    with pytest.raises(ValueError, match="for a batch, 4 over all processes, got 3"):
        train(recipe)


def test_several_gpus_without_a_launcher_are_refused(recipe_of, monkeypatch):
    monkeypatch.setattr(TrainingArguments, "n_gpu", 4)
    with pytest.raises(ValueError, match="4 GPUs in one process"):
        train(recipe_of())


def test_a_module_is_named_as_it_is_without_an_adapter():
    assert belongs(
        "base_model.model.connector.modules_to_save.default.linear_1.weight", "connector.linear_1"
    )
    assert belongs(
        "base_model.model.language_model.lm_head.base_layer.weight", "language_model.lm_head.weight"
    )
    assert not belongs("base_model.model.connector.linear_1.weight", "linear")


def test_the_saved_folder_captions_and_answers(recipe_of, tmp_path, draw_image, blobs):
    trainer = train(recipe_of(trainer={"max_steps": 1}))
    folder = tmp_path / "run"
    model = AutoModel.from_pretrained(folder, trust_remote_code=True)
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    image, masks = draw_image(40, 60), blobs(40, 60, 2)
    own = trainer.model.eval().diffusion_generate(image, masks, processor=trainer.processor)
    loaded = model.diffusion_generate(image, masks)
    assert loaded.token_ids == own.token_ids
    assert len(loaded.token_ids[0][0]) == 12  # the recipe's slot
    assert processor.image_processor.max_tiles == 2
    assert len(model.diffusion_generate(image, prompts="what?").texts[0]) == 1


def test_the_code_is_left_out_when_not_wanted(recipe_of, tmp_path):
    train(recipe_of(trainer={"max_steps": 1}, save_code=False))
    assert not list((tmp_path / "run").glob("*.py"))
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["auto_map"]["AutoModel"].endswith("PerceptionDLMForConditionalGeneration")


def test_the_command_trains_and_resumes(tmp_path):
    file = tmp_path / "recipe.yaml"
    trainer = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    file.write_text(yaml.safe_dump(recipe_values(tmp_path / "run", trainer=trainer)))
    assert main(["train", str(file)]) == 0
    assert main(["train", str(file), "trainer.max_steps=3", "--resume"]) == 0
    state = json.loads((tmp_path / "run" / "checkpoint-3" / "trainer_state.json").read_text())
    assert state["global_step"] == 3


def test_a_mistake_is_one_line_and_exit_code_2(tmp_path, capsys):
    file = tmp_path / "recipe.yaml"
    file.write_text("data: {kind: synthetic, scnes: 3}\ntrainer: {output_dir: x}\n")
    assert main(["train", str(file)]) == 2
    assert "scnes" in capsys.readouterr().err
    assert main(["train", str(tmp_path / "none.yaml")]) == 2
    assert "no such file" in capsys.readouterr().err
    options = [
        f"trainer.output_dir={tmp_path / 'run'}",
        "trainer.use_cpu=true",
        "trainer.bf16=false",
    ]
    missing = f"model.checkpoint={tmp_path / 'nothing'}"
    assert main(["train", str(CONFIGS / "regions_lora.yaml"), *options, missing]) == 2
    assert "nothing" in capsys.readouterr().err


def test_a_malformed_data_file_is_one_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    file, data = tmp_path / "recipe.yaml", tmp_path / "data.json"
    data.write_text("[{")
    values = {**recipe_values(tmp_path / "run"), "data": {"kind": "regions", "files": [str(data)]}}
    file.write_text(yaml.safe_dump(values))
    assert main(["train", str(file)]) == 2
    assert f"expected JSON in {data}" in capsys.readouterr().err.splitlines()[-1]


RECIPES = sorted(path for path in CONFIGS.glob("*.yaml") if path.stem != "engine")


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_every_recipe_is_valid(path):
    recipe = load_recipe(path, ["trainer.use_cpu=true", "trainer.bf16=false"])
    assert arguments_of(recipe).output_dir


def test_starting_from_a_checkpoint_asks_nothing_on_the_terminal(monkeypatch):
    def asked(*args):
        raise AssertionError("asked whether to trust the checkpoint's code")

    monkeypatch.setattr("builtins.input", asked)
    _, processor = load_model(ROOT / SHAPES)
    assert processor.tokenizer.convert_tokens_to_ids("<|mdm_mask|>") == processor.mask_token_id


def test_batches_of_training_and_of_evaluation_are_padded_as_the_recipe_says(recipe_of):
    data = {"pad_to_multiple_of": 64, "eval_scenes": 4}
    recipe = recipe_of(data=data, trainer={"eval_strategy": "steps", "eval_steps": 4})
    trainer = build_trainer(recipe, arguments_of(recipe))
    loaders = [trainer.get_train_dataloader(), trainer.get_eval_dataloader("t25")]
    lengths = [batch["input_ids"].shape[1] for loader in loaders for batch in loader]
    assert lengths and all(length % 64 == 0 for length in lengths)
