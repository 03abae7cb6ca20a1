"""Measures what approximations cost in the joint layout, and what moving to the tree layout does.

    python -m perceptiondlm.benchmarks.joint_layout configs/shapes.yaml --steps 2000 \\
        --output benchmarks/results/joint-layout.json

                     train on captions, joint layout
                                  |
            +---------------------+---------------------+
            |                                           |
    a sweep for each prompt_refresh_interval     its own captions of new images
                                                        |
                                        configs/regions_to_tree.yaml, a share of the steps

Every stage is a command of `perceptiondlm` and keeps its result in `--runs`: a run that was stopped
goes on with the next one. A Markdown table is written beside the JSON.
"""

import argparse
import json
from pathlib import Path

from ..common.files import write_json, write_text
from ..common.json_text import read_json
from ..common.loading import load_model
from ..evaluation.environment import versions
from ..evaluation.report import markdown_table
from ..image_masks import encode_rle
from ..scenes.shapes import render_scene
from .ablation import expect_made_with, run_command
from .denoising import describe_machine

INTERVALS = (0, 4, 8)  # of `prompt_refresh_interval`, beside exact decoding, which is 1; 0: never
RULES = "fixed,threshold:0.9,threshold:0.6+0.3,factor:1.0,entropy_bound:0.1"
TREE_RECIPE = "configs/regions_to_tree.yaml"
TREE = {"region_layout": "independent", "roi_convention": "aligned"}
TREE_SHARE = 10  # the tree is learned in a tenth of the steps
EPOCHS = 4  # in which the tree's images are seen
NEW_IMAGES_SEED = 50_000_000  # far from all scenes that are trained on or measured
SHARES = ("attribute_accuracy", "exact_caption_rate", "interference_rate")
MEASURED = (*SHARES, "forwards", "seconds")
SIZES = ("recipe", "overrides", "steps", "scenes", "seed", "batch_size", "tree_rate")


def train(folder: Path, recipe: str, *overrides: str) -> Path:
    """Returns the folder of a model, which is trained, or trained on, unless it is there."""
    if not (folder / "model.safetensors").exists():
        resumed = ["--resume"] if any(folder.glob("checkpoint-*")) else []
        run_command("train", recipe, f"trainer.output_dir={folder}", *overrides, *resumed)
    return folder


def train_joint(arguments: argparse.Namespace) -> Path:
    """Trains the joint-layout model on captions alone; returns its folder."""
    return train(
        arguments.runs / "joint",
        arguments.recipe,
        "model.config.region_layout=released",
        *("data.questions_per_sample=1", "data.region_share=1.0", "data.first_region_share=null"),
        f"trainer.max_steps={arguments.steps}",
        f"trainer.lr_scheduler_kwargs.num_decay_steps={arguments.steps * 5 // 7}",
        *arguments.overrides,
    )


def sweep(model: Path, interval: int | None, arguments: argparse.Namespace) -> list[dict]:
    """Returns the rows of a sweep with the prompt computed again every so many steps.

    `interval` None is exact decoding: again at every step, all of it.
    """
    name = "exact" if interval is None else f"refresh-{interval}"
    report = arguments.runs / f"{name}.json"
    if not report.with_suffix(".md").exists():  # which comes last
        option = () if interval is None else ("--option", f"prompt_refresh_interval={interval}")
        sizes = _sizes(arguments)
        run_command(
            *("evaluate", "sweep", "--model", str(model), *sizes, "--steps", "4,full"),
            *("--rules", RULES, *option, "--output", str(report)),
        )
    return [{"prompt": name, **row} for row in read_json(report)["rows"]]


def measure(model: Path, arguments: argparse.Namespace) -> dict:
    """Returns the accuracy of a model's captions, decoded exactly."""
    report = arguments.runs / f"measured-{model.name}.json"
    if not report.exists():
        sizes = _sizes(arguments)
        run_command("evaluate", "synthetic", "--model", str(model), *sizes, "--output", str(report))
    measured = read_json(report)
    return {"model": model.name, **{name: measured[name] for name in MEASURED}}


def switch(joint: Path, arguments: argparse.Namespace) -> Path:
    """Saves the joint model with the config of the tree layout, its weights as they are."""
    folder = arguments.runs / "switched"
    if not (folder / "model.safetensors").exists():
        model, processor = load_model(joint, config_fields=TREE)
        processor.save_pretrained(folder)
        model.save_pretrained(folder)
    return folder


def write_images(count: int, arguments: argparse.Namespace) -> Path:
    """Writes images and their region masks, without any captions, as JSON lines."""
    records = arguments.runs / "images" / "records.jsonl"
    if not records.exists():
        lines = []
        for number in range(count):
            scene = render_scene(NEW_IMAGES_SEED + number, "train")
            name = f"{number:06d}.png"
            records.parent.mkdir(parents=True, exist_ok=True)
            scene.image.save(records.parent / name)
            masks = [encode_rle(thing.mask) for thing in scene.objects]
            lines.append({"image": name, "mask_rles": masks})
        write_text(records, "".join(json.dumps(line) + "\n" for line in lines))
    return records


def learn_tree(joint: Path, arguments: argparse.Namespace) -> Path:
    """Teaches the joint model the tree layout by its own captions; returns the new one's folder."""
    steps, captioned = arguments.steps // TREE_SHARE, arguments.runs / "captioned"
    if not (captioned / "summary.json").exists():
        batches = max(steps // EPOCHS, 1)
        records = write_images(batches * arguments.batch_size, arguments)
        place = ("--model", str(joint), "--output", str(captioned))
        run_command("caption-dataset", str(records), *place)

    length = read_json(joint / "generation_config.json")["caption_length"]
    return train(
        arguments.runs / "tree",
        TREE_RECIPE,
        *(f"model.checkpoint={joint}", f"distillation.checkpoint={joint}"),
        f"data.files=[{captioned}/captions/*.parquet]",
        f"data.image_root={arguments.runs / 'images'}",
        f"data.caption_length={length}",
        *("model.dtype=float32", "distillation.dtype=float32", "lora=null"),
        f"trainer.per_device_train_batch_size={arguments.batch_size}",
        *("trainer.gradient_accumulation_steps=1", "trainer.activation_checkpointing=false"),
        *("trainer.bf16=false", "trainer.dataloader_num_workers=0"),
        *(f"trainer.max_steps={steps}", f"trainer.learning_rate={arguments.tree_rate}"),
    )


def _sizes(arguments: argparse.Namespace) -> tuple[str, ...]:
    """Returns the arguments that name the held-out scenes."""
    return "--scenes", str(arguments.scenes), "--seed", str(arguments.seed)


def table(result: dict) -> str:
    """Renders the sweeps, and the models on the way to the tree layout, as Markdown tables."""
    told = ("prompt", "rule", "value", "verify", "steps", "forwards_per_pass")
    measured = [name.replace("_", " ") for name in (*SHARES, "seconds")]
    swept = [[*(_cell(row[name]) for name in told), *_measured(row)] for row in result["sweeps"]]
    moved = [[row["model"], *_measured(row)] for row in result["models"]]

    return "\n".join(
        (
            f"Joint layout, {result['steps']} steps of `{result['recipe']}`,"
            f" {result['scenes']} held-out scenes; shares in per cent.",
            "",
            markdown_table([*(name.replace("_", " ") for name in told), *measured], swept),
            "",
            f"Moved to the tree layout in {result['tree_steps']} steps, decoded exactly:",
            "",
            markdown_table(["model", *measured], moved),
        )
    )


def _measured(row: dict) -> list[str]:
    return [*(f"{100 * row[name]:.2f}" for name in SHARES), f"{row['seconds']:.1f}"]


def _cell(value) -> str:
    if value is None:
        return ""
    return f"{value:.1f}" if isinstance(value, float) else str(value)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Parses the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("recipe", help="of shapes: captions alone are learned")
    add("overrides", nargs="*", metavar="KEY=VALUE", help="of the recipe")
    add("--steps", type=int, default=6000, help="of the joint layout's training")
    add("--scenes", type=int, default=200, help="held-out scenes of each measurement")
    add("--seed", type=int, default=200000, help="of the first of them")
    add("--batch-size", type=int, default=16, help="images of a step that learns the tree")
    add("--tree-rate", type=float, default=5e-4, help="learning rate of the tree layout")
    add("--runs", type=Path, default=Path("runs/joint-layout"), help="folder of what is made")
    add("--output", type=Path, required=True, help="JSON; the tables go beside it")
    return parser.parse_args(arguments)


def main():
    """Trains, sweeps, moves to the tree layout; writes the numbers as JSON and as tables."""
    arguments = parse()
    arguments.runs = arguments.runs.resolve()

    # What is kept there has to be of the same sizes.
    sizes = {name: getattr(arguments, name) for name in SIZES}
    kept = arguments.runs / "sizes.json"
    if not kept.exists():
        arguments.runs.mkdir(parents=True, exist_ok=True)
        write_json(kept, sizes)
    expect_made_with(kept, sizes)

    joint = train_joint(arguments)
    rows = [row for interval in (None, *INTERVALS) for row in sweep(joint, interval, arguments)]
    folders = (joint, switch(joint, arguments), learn_tree(joint, arguments))

    result = {
        "machine": describe_machine("cpu"),
        "versions": versions(),
        **sizes,
        "tree_steps": arguments.steps // TREE_SHARE,
        "sweeps": rows,
        "models": [measure(folder, arguments) for folder in folders],
    }
    write_json(arguments.output, result)
    write_text(arguments.output.with_suffix(".md"), table(result))
    print(table(result))


if __name__ == "__main__":
    main()
