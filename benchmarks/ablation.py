"""Measures what each part of the model buys: one recipe and budget, a part taken away at a time.

    python -m perceptiondlm.benchmarks.ablation configs/tiny.yaml --steps 700 --scenes 300 \\
        --output benchmarks/results/ablation.json

Each row is trained on captions alone by `perceptiondlm train`, measured by `perceptiondlm evaluate
synthetic`, and kept: a run that was stopped goes on with the next row. A Markdown table is written
beside the JSON. Overrides of the recipe hold for every row.
"""

import argparse
import platform
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from ..evaluation.files import read_json, write_json, write_text
from ..training.recipe import load_recipe
from .denoising import describe_machine

RECIPE_FILE = "recipe.json"  # beside a row's weights


@dataclass(frozen=True)
class Row:
    """A variant: overrides of the recipe, or another row's weights decoded another way."""

    title: str
    overrides: tuple[str, ...] = ()  # of the recipe
    weights_of: str | None = None  # the row that is trained in place of this one
    decoding: tuple[str, ...] = ()  # arguments of `perceptiondlm evaluate synthetic`


# Only the independent layout has branches in which several questions can share an image.
ONE_QUESTION = ("data.questions_per_sample=1",)
ROWS = {
    "full": Row("full"),
    "sequential": Row(
        "full, one region at a time", weights_of="full", decoding=("--regions-per-pass", "1")
    ),
    "no-prompts": Row("no region prompts", ("parameters.zeroed=[region_prompts]",)),
    "no-roi": Row("no RoI replay", ("model.config.roi_output_size=0",)),
    "no-structure": Row(
        "no structured attention", ("model.config.region_layout=full", *ONE_QUESTION)
    ),
    "released": Row("released layout", ("model.config.region_layout=released", *ONE_QUESTION)),
}
COLUMNS = {
    "attributes": "attribute_accuracy",
    "whole captions": "exact_caption_rate",
    "interference": "interference_rate",
    "by chance": "interference_by_chance",
}


def train_row(name: str, arguments) -> Path:
    """Returns the folder of a row's weights, which are trained unless they are there."""
    row = ROWS[name]
    folder = Path(arguments.runs) / (row.weights_of or name)
    overrides = (
        f"trainer.output_dir={folder}",
        f"trainer.max_steps={arguments.steps}",
        f"trainer.lr_scheduler_kwargs.num_decay_steps={arguments.steps // 3}",
        f"data.scenes={arguments.training_scenes}",
        "data.scene_sets=1",
        "trainer.eval_strategy=no",
        "data.region_share=1.0",
        "data.first_region_share=null",
        *arguments.overrides,
        *ROWS[row.weights_of or name].overrides,
    )

    recipe = asdict(load_recipe(arguments.recipe, overrides))
    if not (folder / "model.safetensors").exists():
        write_json(folder / RECIPE_FILE, recipe)
        _run("train", arguments.recipe, *overrides)
    _expect_made_with(folder / RECIPE_FILE, recipe)
    return folder


def measure_row(name: str, arguments) -> dict:
    """Returns the measurements of a row, which are made unless they are there."""
    folder = train_row(name, arguments)
    report = folder / f"measured-{name}.json"
    if not report.exists():
        sizes = ("--scenes", str(arguments.scenes), "--seed", str(arguments.seed))
        options = (*sizes, *ROWS[name].decoding, "--output", str(report))
        _run("evaluate", "synthetic", "--model", str(folder), *options)
    _expect_made_with(report, {"scenes": arguments.scenes, "seed": arguments.seed})
    return read_json(report)


def _expect_made_with(file: Path, wanted: dict):
    """Refuses what an earlier run has left if its sizes or recipe were others than `wanted`."""
    kept = read_json(file)
    for name, value in wanted.items():
        if kept[name] != value:
            raise ValueError(f"expected {name} {value} in {file}, got {kept[name]}; move it away")


def _run(*command: str):
    subprocess.run([sys.executable, "-m", "perceptiondlm.apps.cli", *command], check=True)


def table(result: dict) -> str:
    """Renders the result as a Markdown table with a row for each variant."""
    attributes = list(next(iter(result["rows"]))["per_attribute"])
    recipe = " ".join([result["recipe"], *result["overrides"]])
    lines = [
        f"{result['steps']} steps of `{recipe}` on the captions of"
        f" {result['training_scenes']} scenes each, {result['scenes']} held-out scenes from seed"
        f" {result['seed']}; in per cent.",
        "",
        "| | " + " | ".join([*COLUMNS, *attributes, "forwards per image"]) + " |",
        "|---|" + "---:|" * (len(COLUMNS) + len(attributes) + 1),
    ]

    for row in result["rows"]:
        shares = [row[name] for name in COLUMNS.values()]
        shares += [row["per_attribute"][name] for name in attributes]
        cells = [f"{100 * share:.1f}" for share in shares]
        forwards = f"{row['forwards'] / result['scenes']:.1f}"
        lines.append("| " + " | ".join([row["title"], *cells, forwards]) + " |")
    return "\n".join(lines) + "\n"


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Parses the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("recipe")
    add("overrides", nargs="*", metavar="KEY=VALUE", help="of the recipe, in every row")
    add("--steps", type=int, default=700, help="of training, for each row")
    add("--training-scenes", type=int, default=12000)
    add("--scenes", type=int, default=300, help="held-out scenes of the measurement")
    add("--seed", type=int, default=200000, help="of the first of them")
    add("--rows", default=",".join(ROWS), help="comma-separated, out of the default")
    add("--runs", default="runs/ablation", help="folder of weights and measurements")
    add("--output", required=True, help="JSON; the table goes beside it")

    parsed = parser.parse_args(arguments)
    parsed.rows = parsed.rows.split(",")
    if unknown := sorted(set(parsed.rows) - set(ROWS)):
        parser.error(f"expected rows among {', '.join(ROWS)}, got {unknown}")
    return parsed


def main():
    """Trains and measures the rows, and writes them as JSON and as a table."""
    arguments = parse()
    kept = (*COLUMNS.values(), "per_attribute", "forwards", "regions", "seconds")
    rows = []
    for name in arguments.rows:
        measured = measure_row(name, arguments)
        rows.append({"row": name, "title": ROWS[name].title, **{k: measured[k] for k in kept}})

    sizes = ("recipe", "overrides", "steps", "training_scenes", "scenes", "seed")
    result = {
        "machine": describe_machine("cpu"),
        "versions": {"torch": torch.__version__, "python": platform.python_version()},
        **{name: getattr(arguments, name) for name in sizes},
        "rows": rows,
    }
    write_json(arguments.output, result)
    write_text(Path(arguments.output).with_suffix(".md"), table(result))
    print(table(result))


if __name__ == "__main__":
    main()
