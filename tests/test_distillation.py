"""A joint checkpoint teaches a student in the tree layout: pairs, masks, loss, whole runs."""

import json
import math

import numpy as np
import pytest
import torch
from perceptiondlm.apps.cli import main
from perceptiondlm.common.loading import load_model
from perceptiondlm.modeling_loss import draw_masked, mask_rate
from perceptiondlm.training.distillation import PairedCollator, distillation_loss
from perceptiondlm.training.recipe import build_recipe
from perceptiondlm.training.recipe_sections import DistillationRecipe
from perceptiondlm.training.run import arguments_of, build_trainer, train
from PIL import Image
from training_runs import losses_of, recipe_values, small_recipe, weights_of

TREE = {"region_layout": "independent", "roi_convention": "aligned"}
MASK_PIXELS = ((0, 12, 0, 20), (14, 40, 10, 44), (20, 30, 50, 60))


@pytest.fixture(scope="module")
def joint(tmp_path_factory):
    """Saves a checkpoint of the joint layout, of a few wild steps; returns its folder."""
    folder = tmp_path_factory.mktemp("joint")
    config = recipe_values(folder)["model"]["config"]
    recipe = small_recipe(
        folder,
        model={"config": {**config, "region_layout": "released", "roi_convention": "released"}},
        data={"region_share": 1.0},
        trainer={"max_steps": 12, "learning_rate": 3e-2},
    )
    train(recipe)
    return folder


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    """Writes region records with captions of different lengths; returns their file."""
    folder = tmp_path_factory.mktemp("records")
    rng = np.random.default_rng(0)
    lines = []
    for i in range(8):
        pixels = rng.integers(0, 255, (48, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
        masks = []
        for top, bottom, left, right in MASK_PIXELS[: 1 + i % 3]:
            mask = np.zeros((48, 64), np.uint8)
            mask[top:bottom, left:right] = 1
            masks.append({"size": [48, 64], "counts": _counts(mask)})
        words = ["a small plain red circle", "a large star", "a dotted blue ring at the top"]
        captions = words[: len(masks)]
        record = {"image": f"{i}.png", "mask_rles": masks, "captions": captions}
        lines.append(json.dumps(record))
    (folder / "records.jsonl").write_text("\n".join(lines) + "\n")
    return folder / "records.jsonl"


def _counts(mask: np.ndarray) -> list[int]:
    """Returns the uncompressed COCO run lengths of a mask."""
    flat = mask.T.reshape(-1)
    ends = np.flatnonzero(np.diff(flat)) + 1
    return np.diff([0, *ends, len(flat)]).tolist()


def tree_recipe(output, joint, records=None, **sections):
    """Returns a recipe that moves the joint checkpoint to the tree layout."""
    data = {"kind": "synthetic", "scenes": 24, "region_share": 1.0, "caption_length": 12}
    if records is not None:
        data = {"kind": "regions", "files": [str(records)], "caption_length": 12}
    values = recipe_values(output)
    values["model"] = {"checkpoint": str(joint), "config": TREE}
    values["data"] = data
    values["distillation"] = {"checkpoint": str(joint)}
    for name, options in sections.items():
        values[name] = {**values.get(name, {}), **options}
    return build_recipe(values)


def perturb(model):
    """Moves the student's weights away from the teacher's."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.data += 0.3 * noise


def first_batch(recipe):
    trainer = build_trainer(recipe, arguments_of(recipe))
    return trainer, next(iter(trainer.get_train_dataloader()))


@pytest.mark.parametrize("kind", ["synthetic", "records"])
@pytest.mark.parametrize("complementary", [False, True])
def test_both_layouts_mask_the_same_tokens_of_the_same_responses(
    tmp_path, joint, records, kind, complementary
):
    recipe = tree_recipe(
        tmp_path,
        joint,
        records if kind == "records" else None,
        masking={"complementary": complementary},
    )
    trainer, batch = first_batch(recipe)
    taught = batch["teacher"]
    tokens = []
    for one in (batch, taught):
        masked = draw_masked(one["labels"], mask_rate(one["timesteps"], None), one["noise"])
        tokens.append([row[m].tolist() for row, m in zip(one["labels"], masked, strict=True)])
    assert tokens[0] == tokens[1]
    assert sum(map(len, tokens[0]))
    assert batch["input_ids"].shape != taught["input_ids"].shape  # the layouts do differ

    # The teacher sees the markers of the captions, as it does when it decodes.
    marker = trainer.processor.tokenizer.convert_tokens_to_ids("<|Mask_Cap_0|>")
    assert (taught["labels"] != marker).all()


def test_a_teacher_of_the_same_weights_and_layout_leaves_no_divergence(tmp_path, joint):
    recipe = tree_recipe(tmp_path, joint, model={"config": {}})
    trainer, batch = first_batch(recipe)
    with torch.no_grad():
        loss = trainer.compute_loss(trainer.model, batch)
    assert float(loss) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("share", [1.0, 0.25])
def test_the_loss_is_that_of_the_definition(tmp_path, joint, temperature, share):
    recipe = tree_recipe(tmp_path, joint)
    trainer, batch = first_batch(recipe)
    options = DistillationRecipe(str(joint), teacher_share=share, temperature=temperature)
    model = trainer.model.eval()
    perturb(model)
    with torch.no_grad():
        found = distillation_loss(model, trainer.teacher, dict(batch), options, "none")

    # By hand, row by row and token by token, of the logits at all positions.
    batch = dict(batch)
    taught = batch.pop("teacher")
    rows = []
    with torch.no_grad():
        for b in range(len(batch["labels"])):
            pairs = []
            for network, one in ((model, batch), (trainer.teacher.model, taught)):
                rate = float(mask_rate(one["timesteps"], None)[b])
                masked = (one["labels"][b] >= 0) & (one["noise"][b] < rate)
                ids = one["input_ids"].clone()
                everywhere = (one["labels"] >= 0) & (
                    one["noise"] < mask_rate(one["timesteps"], None)[:, None]
                )
                ids[everywhere] = network.config.mask_token_id
                rest = {
                    k: v
                    for k, v in one.items()
                    if k not in ("input_ids", "labels", "noise", "timesteps")
                }
                logits = network(ids, **rest).logits[b][masked].double()
                pairs.append((logits, one["labels"][b][masked]))
            (own, labels), (theirs, _) = pairs
            p = torch.softmax(theirs / temperature, -1)
            q = torch.softmax(own / temperature, -1)
            divergence = (p * (p.log() - q.log())).sum(-1) * temperature**2
            entropy = -torch.softmax(own, -1).log()[torch.arange(len(labels)), labels]
            token_losses = share * divergence + (1 - share) * entropy
            rows.append(float(token_losses.mean()) if len(labels) else 0.0)
    assert float(found) > 0.1
    assert float(found) == pytest.approx(sum(rows) / len(rows), rel=1e-4)


def test_training_brings_the_student_nearer_and_leaves_the_teacher_alone(tmp_path, joint, records):
    recipe = tree_recipe(tmp_path, joint, records, trainer={"max_steps": 30, "learning_rate": 3e-3})
    trainer = build_trainer(recipe, arguments_of(recipe))
    perturb(trainer.model)
    before = {k: v.clone() for k, v in trainer.teacher.model.state_dict().items()}
    trainer.train()
    losses = losses_of(trainer)
    assert np.mean(losses[-5:]) < 0.5 * np.mean(losses[:5])
    after = trainer.teacher.model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_merged_adapter_is_saved_as_a_whole_model_of_the_new_layout(tmp_path, joint, records):
    recipe = tree_recipe(tmp_path, joint, records, lora={"r": 4, "merge": True})
    trainer = train(recipe)
    model, processor = load_model(str(tmp_path))
    assert model.config.region_layout == processor.region_layout == "independent"
    assert not (tmp_path / "adapter_config.json").exists()

    old, _ = load_model(str(joint))
    name = "language_model.model.layers.0.self_attn.q_proj.weight"
    assert not torch.equal(model.state_dict()[name], old.state_dict()[name])
    saved = {k.removeprefix("base_model.model."): v for k, v in weights_of(trainer).items()}
    assert torch.equal(saved[name], model.state_dict()[name])


def test_an_adapter_that_is_not_merged_refuses_another_config(tmp_path, joint):
    with pytest.raises(ValueError, match=r"lora\.merge"):
        tree_recipe(tmp_path, joint, lora={"r": 4})


@pytest.mark.parametrize(
    "options, message",
    [
        ({"checkpoint": None}, "folder or Hub id in distillation.checkpoint"),
        ({"temperature": 0.0}, "positive distillation.temperature"),
        ({"temperature": math.inf}, "distillation.temperature as a finite number"),
        ({"teacher_share": 1.5}, "distillation.teacher_share between 0 and 1"),
        ({"dtype": "int8"}, "distillation.dtype"),
        ({"teacher": "x"}, "distillation"),
    ],
)
def test_a_wrong_distillation_is_refused(tmp_path, joint, options, message):
    with pytest.raises(ValueError, match=message):
        tree_recipe(tmp_path, joint, distillation=options)


def test_a_teacher_with_other_region_prompts_is_refused(tmp_path, joint):
    other = tmp_path / "other"
    config = recipe_values(other)["model"]["config"]
    train(
        small_recipe(
            other, model={"config": {**config, "num_region_prompts": 3}}, trainer={"max_steps": 1}
        )
    )
    recipe = tree_recipe(tmp_path / "new", joint, distillation={"checkpoint": str(other)})
    with pytest.raises(ValueError, match="student's (vocabulary|num_region_prompts)"):
        build_trainer(recipe, arguments_of(recipe))


def test_responses_of_other_lengths_are_refused(tmp_path, joint, records):
    recipe = tree_recipe(tmp_path, joint, records, data={"caption_length": None})
    with pytest.raises(ValueError, match=r"data\.caption_length"):
        first_batch(recipe)


def test_the_command_trains_the_shipped_recipe(tmp_path, joint, records, capsys):
    options = [
        f"model.checkpoint={joint}",
        f"distillation.checkpoint={joint}",
        f"data.files=[{records.parent}/*.jsonl]",
        f"data.image_root={records.parent}",
        "data.caption_length=12",
        "trainer.max_steps=2",
        "trainer.gradient_accumulation_steps=1",
        "trainer.dataloader_num_workers=0",
        "trainer.save_strategy=no",
        f"trainer.output_dir={tmp_path / 'out'}",
    ]
    assert main(["train", "configs/regions_to_tree.yaml", *options]) == 0, capsys.readouterr().err
    assert load_model(str(tmp_path / "out"))[0].config.region_layout == "independent"


def test_paired_samples_without_a_response_are_refused(tmp_path, joint):
    trainer, _ = first_batch(tree_recipe(tmp_path, joint))
    own, other = trainer.train_dataset[0]
    own.sequence.slots.clear()
    collator = trainer.data_collator
    assert isinstance(collator, PairedCollator)
    with pytest.raises(ValueError, match="samples with responses"):
        collator([(own, other)])
