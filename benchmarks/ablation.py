"""Measures what each part of the model buys: one recipe and budget, a part taken away at a time.

    python -m perceptiondlm.benchmarks.ablation configs/shapes.yaml --steps 700 --scenes 300 \\
        --seeds 3 --output benchmarks/results/ablation.json

Each row is trained on captions alone by `perceptiondlm train`, as often as there are seeds,
measured by `perceptiondlm evaluate synthetic` on the recipe's kind of scenes, and kept: a run that
was stopped goes on with the next one. With `--labels`, of things, it is trained on labels
("Name each region.") alone, which are shorter, and measured by them. A Markdown table of means and
ranges is written beside the JSON. Overrides of the recipe hold for every row.
"""

import argparse
import functools
import platform
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from ..common.loading import default_device, load_model
from ..evaluation.asking import Asker
from ..evaluation.files import read_json, write_json, write_text
from ..evaluation.held_out import held_out_scenes
from ..evaluation.scene_kinds import SHAPES, THINGS
from ..evaluation.thing_measures import PARTS, ThingMeasures
from ..training.recipe import load_recipe
from ..training.recipe_sections import SyntheticData
from .denoising import describe_machine

RECIPE_FILE = "recipe.json"  # beside a row's weights
SEED_DISTANCE = 10_000_000  # between the first scenes of two seeds' training


@dataclass(frozen=True)
class Row:
    """A variant: overrides of the recipe, or another row's weights decoded another way."""

    title: str
    overrides: tuple[str, ...] = ()  # of the recipe
    weights_of: str | None = None  # the row that is trained in place of this one
    regions_per_pass: int | None = None  # at most, when it is measured


# Only the independent layout has branches in which several questions can share an image.
ONE_QUESTION = ("data.questions_per_sample=1",)
ROWS = {
    "full": Row("full"),
    "sequential": Row("full, one region at a time", weights_of="full", regions_per_pass=1),
    "no-prompts": Row("no region prompts", ("parameters.zeroed=[region_prompts]",)),
    "no-roi": Row("no RoI replay", ("model.config.roi_output_size=0",)),
    "no-structure": Row(
        "no structured attention", ("model.config.region_layout=full", *ONE_QUESTION)
    ),
    "released": Row("released layout", ("model.config.region_layout=released", *ONE_QUESTION)),
}
# Titles and measurements; a dot leads into a table.
COLUMNS = {
    "attributes": "attribute_accuracy",
    "whole captions": "exact_caption_rate",
    "interference": "interference_rate",
    "by chance": "interference_by_chance",
}
THING_COLUMNS = {
    "names": "name_accuracy",
    "relations": "relation_accuracy",
    "grammatical": "grammatical",
    "mixtures": "mixture_rate",
    "whole captions": "exact_caption_rate",
    # Where boxes do not tell regions apart, and where they do
    "overlapping: names": "overlapping.name_accuracy",
    "overlapping: whole captions": "overlapping.exact_caption_rate",
    "apart: names": "apart.name_accuracy",
    "apart: whole captions": "apart.exact_caption_rate",
}
LABEL_COLUMNS = {
    "labels": "label_accuracy",
    "overlapping: labels": "overlapping_label_accuracy",
    "apart: labels": "apart_label_accuracy",
}
LABELS = "labels"  # in place of the captions of a kind of scenes
COLUMNS_OF = {SHAPES.name: COLUMNS, THINGS.name: THING_COLUMNS, LABELS: LABEL_COLUMNS}
COUNTS = ("per_attribute", "forwards", "regions", "seconds")  # kept besides the columns


def train_row(name: str, seed: int, arguments) -> Path:
    """Returns the folder of a row's weights of one seed, which are trained unless they are there.

    Args:
        seed: 0 trains with the recipe's own seeds; each further one adds to `trainer.seed`, which
            weights start from and samples are drawn by, and takes other scenes.
    """
    row = ROWS[name]
    trained = row.weights_of or name
    folder = Path(arguments.runs) / trained / f"seed-{seed}"
    overrides = (
        f"trainer.output_dir={folder}",
        f"trainer.max_steps={arguments.steps}",
        f"trainer.lr_scheduler_kwargs.num_decay_steps={arguments.steps // 3}",
        f"data.scenes={arguments.training_scenes}",
        "data.scene_sets=1",
        "trainer.eval_strategy=no",
        "data.region_share=1.0",
        "data.first_region_share=null",
        f"data.label_share={float(arguments.measured == LABELS)}",
        "data.first_label_share=null",
        "data.region_question_share=0.0",
        *arguments.overrides,
        *ROWS[trained].overrides,
    )
    own = load_recipe(arguments.recipe, overrides)
    overrides += (
        f"trainer.seed={own.trainer.get('seed', 42) + seed}",
        f"data.first_seed={own.data.first_seed + seed * SEED_DISTANCE}",
    )

    recipe = asdict(load_recipe(arguments.recipe, overrides))
    if not (folder / "model.safetensors").exists():
        write_json(folder / RECIPE_FILE, recipe)
        run_command("train", arguments.recipe, *overrides)
    expect_made_with(folder / RECIPE_FILE, recipe)
    return folder


def measure_row(name: str, seed: int, arguments) -> dict:
    """Returns the measurements of a row of one seed, which are made unless they are there."""
    folder = train_row(name, seed, arguments)
    report = folder / f"measured-{name}.json"
    if not report.exists() and arguments.measured == LABELS:
        write_json(report, measure_labels(folder, ROWS[name].regions_per_pass, arguments))
    elif not report.exists():
        sizes = ("--scenes", str(arguments.scenes), "--seed", str(arguments.seed))
        kind = ("--scene-kind", arguments.scene_kind)
        if arguments.scene_kind == THINGS.name:
            kind += ("--skip", ",".join(PARTS))
        if ROWS[name].regions_per_pass is not None:
            kind += ("--regions-per-pass", str(ROWS[name].regions_per_pass))
        options = (*sizes, *kind, "--output", str(report))
        run_command("evaluate", "synthetic", "--model", str(folder), *options)
    expect_made_with(report, {"scenes": arguments.scenes, "seed": arguments.seed})
    return read_json(report)


def measure_labels(folder: Path, regions_per_pass: int | None, arguments) -> dict:
    """Measures the labels of held-out things; returns them, their costs and what they are of."""
    model, processor = load_model(str(folder), "", "auto", default_device())
    asker = Asker(model, processor, regions_per_pass=regions_per_pass)
    scenes = held_out_scenes(arguments.seed, arguments.scenes, THINGS)
    others = tuple(part for part in PARTS if part != "labels")
    measured, _ = ThingMeasures(skip=others).measure(asker, scenes, arguments.seed)
    cost = measured["labeling"]
    return measured | {
        "scenes": arguments.scenes,
        "seed": arguments.seed,
        "per_attribute": {},
        "forwards": cost["forwards"],
        "regions": cost["regions"],
        "seconds": cost["end_to_end_seconds"],
    }


def expect_made_with(file: Path, wanted: dict):
    """Refuses what an earlier run has left if its sizes or recipe were others than `wanted`."""
    kept = read_json(file)
    for name, value in wanted.items():
        if kept[name] != value:
            raise ValueError(f"expected {name} {value} in {file}, got {kept[name]}; move it away")


def run_command(*command: str):
    subprocess.run([sys.executable, "-m", "perceptiondlm.apps.cli", *command], check=True)


def of_seeds(measured: Sequence[Mapping], columns: Mapping[str, str]) -> dict:
    """Puts the measurements of one row's seeds together.

    Returns their means by name; under `spread` the least and the greatest, as [min, max]; under
    `seeds` what each seed gave. A measurement that a seed lacks (None) has neither.
    """
    kept = [*dict.fromkeys(path.split(".")[0] for path in columns.values()), *COUNTS]
    seeds = [{name: one[name] for name in kept} for one in measured]
    spread = _combined(seeds, lambda values: [min(values), max(values)])
    return {**_combined(seeds, statistics.mean), "spread": spread, "seeds": seeds}


def _combined(tables: Sequence, combine: Callable):
    """Combines numbers that stand in the same place of tables of numbers."""
    if isinstance(tables[0], Mapping):
        return {name: _combined([one[name] for one in tables], combine) for name in tables[0]}
    return None if None in tables else combine(tables)


def table(result: dict) -> str:
    """Renders the result as a Markdown table with a row for each variant."""
    attributes = result["rows"][0]["per_attribute"]
    columns = COLUMNS_OF[result["measured"]] | {
        name: f"per_attribute.{name}" for name in attributes
    }
    recipe = " ".join([result["recipe"], *result["overrides"]])
    texts = LABELS if result["measured"] == LABELS else "captions"
    spread = f" Means of {result['seeds']} seeds, with the least and the greatest."
    lines = [
        f"{result['steps']} steps of `{recipe}` on the {texts} of"
        f" {result['training_scenes']} scenes each, {result['scenes']} held-out scenes from seed"
        f" {result['seed']}; in per cent.{spread if result['seeds'] > 1 else ''}",
        "",
        "| | " + " | ".join([*columns, "forwards per image"]) + " |",
        "|---|" + "---:|" * (len(columns) + 1),
    ]

    for row in result["rows"]:
        cells = [_share_cell(row, path) for path in columns.values()]
        forwards = f"{row['forwards'] / result['scenes']:.1f}"
        lines.append("| " + " | ".join([row["title"], *cells, forwards]) + " |")
    return "\n".join(lines) + "\n"


def _share_cell(row: Mapping, path: str) -> str:
    """Renders a mean in per cent, of several seeds with the least and the greatest."""
    mean, spread = _at(row, path), _at(row["spread"], path)
    if mean is None:
        return ""
    if len(row["seeds"]) == 1:
        return f"{100 * mean:.1f}"
    low, high = spread
    return f"{100 * mean:.1f} ({100 * low:.1f} to {100 * high:.1f})"


def _at(row: Mapping, path: str):
    """Returns what a dotted path leads to."""
    return functools.reduce(lambda table, name: table[name], path.split("."), row)


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
    add("--seeds", type=int, default=1, help="of training, for each row")
    add("--rows", default=",".join(ROWS), help="comma-separated, out of the default")
    add("--labels", action="store_true", help="train on labels of things alone, and measure them")
    add("--runs", default="runs/ablation", help="folder of weights and measurements")
    add("--output", required=True, help="JSON; the table goes beside it")

    parsed = parser.parse_args(arguments)
    parsed.rows = parsed.rows.split(",")
    if unknown := sorted(set(parsed.rows) - set(ROWS)):
        parser.error(f"expected rows among {', '.join(ROWS)}, got {unknown}")
    if parsed.seeds < 1:
        parser.error(f"expected seeds of 1 or more, got {parsed.seeds}")
    data = load_recipe(parsed.recipe, parsed.overrides).data
    if not isinstance(data, SyntheticData):
        parser.error(f"expected a recipe of synthetic scenes, got {parsed.recipe}")
    if parsed.labels and data.scene_kind != THINGS.name:
        parser.error(f"expected a recipe of things with --labels, got one of {data.scene_kind}")
    parsed.scene_kind = data.scene_kind
    parsed.measured = LABELS if parsed.labels else data.scene_kind
    return parsed


def main():
    """Trains and measures the rows, and writes them as JSON and as a table."""
    arguments = parse()
    rows = []
    for name in arguments.rows:
        measured = [measure_row(name, seed, arguments) for seed in range(arguments.seeds)]
        scores = of_seeds(measured, COLUMNS_OF[arguments.measured])
        rows.append({"row": name, "title": ROWS[name].title, **scores})

    sizes = (
        "recipe",
        "overrides",
        "scene_kind",
        "measured",
        "steps",
        "training_scenes",
        "scenes",
        "seed",
    )
    result = {
        "machine": describe_machine("cpu"),
        "versions": {"torch": torch.__version__, "python": platform.python_version()},
        **{name: getattr(arguments, name) for name in sizes},
        "seeds": arguments.seeds,
        "rows": rows,
    }
    write_json(arguments.output, result)
    write_text(Path(arguments.output).with_suffix(".md"), table(result))
    print(table(result))


if __name__ == "__main__":
    main()
