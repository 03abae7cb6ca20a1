"""Writes the card of a finished run: numbers, figures, and a contact sheet of samples."""

import io
import random
import textwrap
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from ..common.crops import crop_window
from ..common.extras import extra
from ..common.files import write_bytes, write_text
from ..common.json_text import parse_json, read_json_lines
from ..image_loading import load_image
from .captioners import VIEWS
from .output import IMAGES
from .recipe import EngineRecipe
from .records import Region, mask_of
from .text_filters import words_of

CARD, FIGURES = "README.md", "figures"
MAX_CATEGORIES = 30  # that the figure and the table show
COLUMNS = 4  # of the contact sheet
DPI = 100
BLUE = "#3b6ea5"


@dataclass
class Statistics:
    """Holds what the figures show.

    Attributes:
        regions: kept regions of each image that has any, by its key.
        words: captions, by their number of words.
        categories: regions, by category.
        samples: lines, and the number of a region in each, drawn at random.
    """

    regions: Counter = field(default_factory=Counter)
    words: Counter = field(default_factory=Counter)
    categories: Counter = field(default_factory=Counter)
    samples: list[tuple[dict, int]] = field(default_factory=list)


def read_statistics(path: Path, sample_size: int, seed: int) -> Statistics:
    """Reads a file of records once; each region is as likely to be among the samples."""
    found, rng, count = Statistics(), random.Random(seed), 0
    for line in _lines(path):
        found.regions[line["key"]] += len(line["captions"])
        found.words.update(len(words_of(caption)) for caption in line["captions"])
        found.categories.update(filter(None, line["categories"]))

        for i in range(len(line["captions"])):  # reservoir sampling
            count += 1
            if len(found.samples) < sample_size:
                found.samples.append((line, i))
            elif (place := rng.randrange(count)) < sample_size:
                found.samples[place] = (line, i)
    return found


def _lines(path: Path) -> Iterator[dict]:
    for number, line in read_json_lines(path):
        yield parse_json(line, f"line {number} of {path}")


def write_card(folder: Path, recipe: EngineRecipe, summary: dict) -> list[Path]:
    """Writes `README.md` and the figures of a finished run; returns their paths."""
    options = recipe.output
    found = read_statistics(folder / "records.jsonl", options.sheet, options.seed)
    figures = {"dropped.png": _draw_dropped(summary["stages"])}
    if found.words:
        figures["regions.png"] = _draw_histogram(found.regions.values(), "regions of an image")
        figures["words.png"] = _draw_histogram(found.words.elements(), "words of a caption")
    if found.categories:
        figures["categories.png"] = _draw_bars(found.categories.most_common(MAX_CATEGORIES))
    if found.samples:
        image_folder = folder if options.images == "link" else recipe.source.image_root
        figures["samples.png"] = _draw_sheet(found.samples, Path(image_folder))

    for name, data in figures.items():
        write_bytes(folder / FIGURES / name, data)
    write_text(folder / CARD, _card_text(recipe, summary, found, list(figures)))
    return [folder / CARD, *(folder / FIGURES / name for name in figures)]


# Figures.


def _figure(width: float, height: float):
    with extra("engine"):
        from matplotlib.figure import Figure  # without pyplot's global state and window systems

    return Figure(figsize=(width, height), layout="constrained")


def _png(figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=DPI, metadata={"Software": None})
    return buffer.getvalue()


def _draw_histogram(values, title: str) -> bytes:
    values = list(values)
    figure = _figure(6, 3.2)
    axes = figure.subplots()
    low, high = min(values), max(values)
    step = max(1, -(-(high - low + 1) // 40))
    edges = [edge - 0.5 for edge in range(low, high + step + 1, step)]
    axes.hist(values, bins=edges, color=BLUE)
    axes.set(xlabel=title, ylabel="count")
    axes.xaxis.get_major_locator().set_params(integer=True)
    return _png(figure)


def _draw_bars(pairs: list[tuple[str, int]]) -> bytes:
    figure = _figure(6, 1 + 0.22 * len(pairs))
    axes = figure.subplots()
    names = [textwrap.shorten(name, 32) for name, _ in pairs]
    axes.barh(range(len(pairs)), [count for _, count in pairs], color=BLUE)
    axes.set_yticks(range(len(pairs)), names)
    axes.invert_yaxis()
    axes.set(xlabel="regions")
    axes.xaxis.get_major_locator().set_params(integer=True)
    return _png(figure)


def _draw_dropped(stages: dict) -> bytes:
    """Draws what is left after each stage, and what it dropped by each rule."""
    pairs = [("in the source", next(iter(stages.values()))["regions_in"])]
    for name, count in stages.items():
        pairs += [(f"{name}: {rule}", -number) for rule, number in count["dropped"].items()]
        pairs.append((f"after {name}", count["regions_out"]))

    figure = _figure(6, 1 + 0.24 * len(pairs))
    axes = figure.subplots()
    colors = [BLUE if number >= 0 else "#c0504d" for _, number in pairs]
    bars = axes.barh(range(len(pairs)), [abs(number) for _, number in pairs], color=colors)
    axes.bar_label(bars, [str(abs(number)) for _, number in pairs], padding=2, fontsize=8)
    axes.set_yticks(range(len(pairs)), [name for name, _ in pairs], fontsize=8)
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.set(xlabel="regions (red: dropped)")
    return _png(figure)


def _draw_sheet(samples: list[tuple[dict, int]], folder: Path) -> bytes:
    """Draws a contact sheet: each sample's surroundings, its outline and its caption."""
    rows = -(-len(samples) // COLUMNS)
    figure = _figure(3 * COLUMNS, 3.4 * rows)
    grid = figure.subplots(rows, COLUMNS, squeeze=False).ravel()
    for axes in grid[len(samples) :]:
        axes.axis("off")
    for axes, (line, i) in zip(grid, samples, strict=False):
        axes.set(xticks=[], yticks=[])
        image = load_image(folder / line["image"])
        mask = mask_of(Region("", line["mask_rles"][i]))
        _, outlined = VIEWS["outlined"]
        axes.imshow(outlined(image, mask).crop(crop_window(mask)))
        caption = textwrap.shorten(line["captions"][i], 160).replace("$", r"\$")
        axes.set_title("\n".join(textwrap.wrap(caption, 38)), fontsize=7)
    return _png(figure)


# The text.


def _card_text(recipe: EngineRecipe, summary: dict, found: Statistics, figures: list[str]) -> str:
    words = list(found.words.elements())
    mean = f"{sum(words) / len(words):.1f}" if words else "-"
    per_image = f"{summary['regions'] / len(found.regions):.1f}" if found.regions else "-"
    rows = [
        ("images read", summary["images"]),
        ("images broken", summary["broken_images"]),
        ("images with a region kept", len(found.regions)),
        ("regions kept", summary["regions"]),
        ("regions dropped", summary["dropped"]),
        ("regions of an image, mean", per_image),
        ("words of a caption, mean", mean),
        ("categories", len(found.categories)),
    ]
    numbers = "\n".join(f"| {name} | {value} |" for name, value in rows)
    drawn = "\n\n".join(f"![{name.removesuffix('.png')}]({FIGURES}/{name})" for name in figures)
    linked = f", with the images in `{IMAGES}/`" if recipe.output.images == "link" else ""
    return f"""# Region captions, branch {recipe.branch}

`records.jsonl` holds an image, region masks (COCO RLE) and captions in each line{linked}.
`dropped.jsonl` holds the regions that were dropped, by which stage and rule, and why.

| | |
|---|---:|
{numbers}

| stage | rule | dropped | left |
|---|---|---:|---:|
{_stage_rows(summary["stages"])}

{drawn}
"""


def _stage_rows(stages: dict) -> str:
    rows = []
    for name, count in stages.items():
        rows += [f"| {name} | {rule} | {number} | |" for rule, number in count["dropped"].items()]
        rows.append(f"| {name} | | {sum(count['dropped'].values())} | {count['regions_out']} |")
    return "\n".join(rows)
