"""Keeps a few held-out scenes of things as files, so that they can be shown without being drawn.

Drawing scenes of things takes npm and the extra `scenes`; these lie in `examples/`, for each

    truck.png           the image
    truck_regions.png   which pixel belongs to which thing: 0 to none, k + 1 to thing k
    truck.json          its seed, and what is true of its things, from back to front

They are made by

    python -m perceptiondlm.scenes.thing_examples

and show drawings of Noto, Fluent and Twemoji alone (see `ATTRIBUTION.md`), and no photograph but
such as are under CC0. H, W are rows and columns.
"""

import dataclasses
import io
import json
from pathlib import Path

import numpy as np
from PIL import Image

from ..common.files import write_bytes
from .thing_facts import ThingFacts
from .things import SceneThing, ThingScene, render_thing_scene

FOLDER = Path(__file__).with_name("examples")
SPLIT = "heldout"  # never trained on
NAMES = {281: "truck", 101: "steak", 241: "lobster", 383: "rainbow"}  # seed -> name of the files
MEASURES = ("style", "diameter", "hidden_share")  # of a `SceneThing`, besides mask and facts


def open_thing_example(seed: int, folder: Path = FOLDER) -> ThingScene:
    """Opens a scene that is kept; ValueError for a seed that is not in `NAMES`."""
    if seed not in NAMES:
        raise ValueError(f"expected the seed of an example out of {tuple(NAMES)}, got {seed}")
    image, regions, facts = _paths(seed, folder)
    with Image.open(image) as opened:
        pixels = opened.convert("RGB")
    with Image.open(regions) as opened:
        numbers = np.asarray(opened)  # (H, W)

    things = []
    for k, row in enumerate(json.loads(facts.read_text(encoding="utf-8"))["things"]):
        measures = {name: row.pop(name) for name in MEASURES}
        own = ThingFacts(**{**row, "center": tuple(row["center"])})
        things.append(SceneThing(numbers == k + 1, own, **measures))
    return ThingScene(pixels, things)


def save_thing_example(seed: int, scene: ThingScene, folder: Path = FOLDER):
    """Writes the files of a scene, each whole or not at all."""
    numbers = np.zeros(scene.image.size[::-1], np.uint8)
    for k, thing in enumerate(scene.things):
        numbers[thing.mask] = k + 1
    rows = [
        {**dataclasses.asdict(thing.facts), **{name: getattr(thing, name) for name in MEASURES}}
        for thing in scene.things
    ]

    image, regions, facts = _paths(seed, folder)
    write_bytes(image, _png(scene.image))
    write_bytes(regions, _png(_colored(numbers)))
    text = json.dumps({"seed": seed, "split": SPLIT, "things": rows}, indent=2)
    write_bytes(facts, f"{text}\n".encode())


def _paths(seed: int, folder: Path) -> tuple[Path, Path, Path]:
    """Returns where the image, the regions and the facts of a scene are kept."""
    name = NAMES[seed]
    return folder / f"{name}.png", folder / f"{name}_regions.png", folder / f"{name}.json"


def _colored(numbers: np.ndarray) -> Image.Image:
    """Returns an image with a palette, black for 0, so that regions can be told apart by eye."""
    image = Image.fromarray(numbers)
    colors = [(0, 0, 0)] + [(40 + 53 * k % 216, 40 + 97 * k % 216, 255 - 67 * k % 216)
                            for k in range(1, int(numbers.max()) + 1)]  # fmt: skip
    image.putpalette([value for color in colors for value in color])
    return image


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def main():
    """Draws all examples and writes them."""
    for seed in NAMES:
        save_thing_example(seed, render_thing_scene(seed, SPLIT))


if __name__ == "__main__":
    main()
