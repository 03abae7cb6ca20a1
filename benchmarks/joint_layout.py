"""Measures what approximations cost in the joint layout, and what moving to the tree layout does.

    python -m perceptiondlm.benchmarks.joint_layout configs/tiny.yaml --steps 6000 \\
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
import subprocess
import sys
from pathlib import Path

from ..common.files import write_json, write_text
from ..common.json_text import read_json
from ..common.loading import load_model
from ..evaluation.environment import versions
from ..evaluation.report import markdown_table
from ..image_masks import encode_rle
from ..scenes.shapes import render_scene
from .denoising import describe_machine

INTERVALS = (1, 4, 8, 0)  # of `prompt_refresh_interval`, beside exact decoding; 0 is never
RULES = "fixed,threshold:0.9,threshold:0.6+0.3,factor:1.0,entropy_bound:0.1"
TREE_RECIPE = "configs/regions_to_tree.yaml"
TREE = {"region_layout": "independent", "roi_convention": "aligned"}
TREE_SHARE = 10  # the tree is learned in a tenth of the steps
NEW_IMAGES_SEED = 50_000_000  # far from all scenes that are trained on or measured
QUESTION_FREE = ("data.region_share=1.0", "data.first_region_share=null")
MEASURED = ("attribute_accuracy", "exact_caption_rate", "interference_rate", "forwards", "seconds")


def train_joint(arguments: argparse.Namespace) -> Path:
    """Returns the folder of the joint-layout model, which is trained unless it is there."""
    folder = arguments.runs / "joint"
    if not (folder / "model.safetensors").exists():
        resumed = ["--resume"] if any(folder.glob("checkpoint-*")) else []
        decay = arguments.steps * 5 // 7
        _run(
            "train",
            arguments.recipe,
            f"trainer.output_dir={folder}",
            "model.config.region_layout=released",
            "data.questions_per_sample=1",
            *QUESTION_FREE,
            f"trainer.max_steps={arguments.steps}",
            f"trainer.lr_scheduler_kwargs.num_decay_steps={decay}",
            *arguments.overrides,
            *resumed,
        )
    return folder


def sweep(model: Path, interval: int | None, arguments: argparse.Namespace) -> list[dict]:
    """Returns the rows of a sweep with the prompt computed again every so many steps.

    `interval` None is exact decoding: again at every step, all of it.
    """
    name = "exact" if interval is None else f"refresh-{interval}"
    report = arguments.runs / f"{name}.json"
    if not report.exists():
        option = () if interval is None else ("--option", f"prompt_refresh_interval={interval}")
        sizes = _sizes(arguments)
        _run(
            *("evaluate", "sweep", "--model", str(model), *sizes, "--steps", "4,full"),
            *("--rules", RULES, *option, "--output", str(report)),
        )
    return [{"prompt": name, **row} for row in read_json(report)["rows"]]


def measure(model: Path, arguments: argparse.Namespace) -> dict:
    """Returns the accuracy of a model's captions, decoded exactly."""
    report = arguments.runs / f"measured-{model.name}.json"
    if not report.exists():
        sizes = _sizes(arguments)
        _run("evaluate", "synthetic", "--model", str(model), *sizes, "--output", str(report))
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
    """Returns the folder of the model that the joint one has taught the tree layout."""
    folder, steps = arguments.runs / "tree", arguments.steps // TREE_SHARE
    captioned = arguments.runs / "captioned"
    if not (captioned / "summary.json").exists():
        records = write_images(steps * arguments.batch_size // 4, arguments)
        _run("caption-dataset", str(records), "--model", str(joint), "--output", str(captioned))
    if not (folder / "model.safetensors").exists():
        _run(
            "train",
            TREE_RECIPE,
            f"trainer.output_dir={folder}",
            f"model.checkpoint={joint}",
            f"distillation.checkpoint={joint}",
            f"data.files=[{captioned}/captions/*.parquet]",
            f"data.image_root={arguments.runs / 'images'}",
            f"data.caption_length={arguments.caption_length}",
            *("model.dtype=float32", "distillation.dtype=float32", "lora=null"),
            f"trainer.per_device_train_batch_size={arguments.batch_size}",
            *("trainer.gradient_accumulation_steps=1", "trainer.activation_checkpointing=false"),
            *("trainer.bf16=false", "trainer.dataloader_num_workers=0"),
            f"trainer.max_steps={steps}",
            f"trainer.learning_rate={arguments.tree_rate}",
        )
    return folder


def _sizes(arguments: argparse.Namespace) -> tuple[str, ...]:
    """Returns the arguments that name the held-out scenes."""
    return "--scenes", str(arguments.scenes), "--seed", str(arguments.seed)


def _run(*command: str):
    subprocess.run([sys.executable, "-m", "perceptiondlm.apps.cli", *command], check=True)


def table(result: dict) -> str:
    """Renders the sweeps, and the models on the way to the tree layout, as Markdown tables."""
    swept = result["sweeps"]
    names = ("prompt", "rule", "value", "verify", "steps", "forwards_per_pass")
    shares = ("attribute_accuracy", "exact_caption_rate", "interference_rate")
    rows = [[_cell(row[name]) for name in names] + _shares(row, shares) for row in swept]
    seconds = [f"{row['seconds']:.1f}" for row in swept]
    rows = [[*row, time] for row, time in zip(rows, seconds, strict=True)]
    header = [name.replace("_", " ") for name in (*names, *shares, "seconds")]

    models = [
        [row["model"], *_shares(row, shares), f"{row['seconds']:.1f}"] for row in result["models"]
    ]
    return "\n".join(
        (
            f"Joint layout, {result['steps']} steps of `{result['recipe']}`,"
            f" {result['scenes']} held-out scenes; shares in per cent.",
            "",
            markdown_table(header, rows),
            f"Moved to the tree layout in {result['tree_steps']} steps, decoded exactly:",
            "",
            markdown_table(["model", *header[len(names) :]], models),
        )
    )


def _shares(row: dict, names: tuple[str, ...]) -> list[str]:
    return [f"{100 * row[name]:.2f}" for name in names]


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
    add("--batch-size", type=int, default=16, help="of learning the tree, in regions' images")
    add("--caption-length", type=int, default=11)
    add("--tree-rate", type=float, default=5e-4, help="learning rate of the tree layout")
    add("--runs", type=Path, default=Path("runs/joint-layout"), help="folder of what is made")
    add("--output", type=Path, required=True, help="JSON; the tables go beside it")
    return parser.parse_args(arguments)


def main():
    """Trains, sweeps, moves to the tree layout; writes the numbers as JSON and as tables."""
    arguments = parse()
    joint = train_joint(arguments)
    rows = [row for interval in (None, *INTERVALS) for row in sweep(joint, interval, arguments)]
    folders = (joint, switch(joint, arguments), learn_tree(joint, arguments))

    result = {
        "machine": describe_machine("cpu"),
        "versions": versions(),
        **{name: getattr(arguments, name) for name in ("recipe", "steps", "scenes", "seed")},
        "tree_steps": arguments.steps // TREE_SHARE,
        "sweeps": rows,
        "models": [measure(folder, arguments) for folder in folders],
    }
    write_json(arguments.output, result)
    write_text(arguments.output.with_suffix(".md"), table(result))
    print(table(result))


if __name__ == "__main__":
    main()
