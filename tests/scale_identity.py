"""Captions one data set written as each kind of source, and compares it with the model alone.

python tests/scale_identity.py FOLDER --images 2000 --kinds lines sa1b
"""

import argparse
import time
from collections import Counter
from pathlib import Path

import numpy as np
import scale_data
import scale_runs
from perceptiondlm.common.loading import load_model
from perceptiondlm.common.ray_session import ray_session
from perceptiondlm.image_loading import load_image, load_mask
from perceptiondlm.image_masks import encode_rle
from perceptiondlm.pipelines.captioning_stage import CaptionOptions
from perceptiondlm.pipelines.dataset import DatasetOptions, caption_dataset
from perceptiondlm.pipelines.open_sources import open_source
from shapes import ROOT, SHAPES

KINDS = ("folder", "lines", "parquet", "paths", "tars", "coco", "panoptic", "sa1b", "saved")
DECODING = {"caption_length": 4, "steps": 2}
REGIONS = 4


def draw(count: int) -> list:
    """Draws images with four regions each, none over another, so that panoptic files hold them."""
    drawn = []
    width, height = scale_data.SIZE
    for data, _ in scale_data.draw(count):
        masks = np.zeros((REGIONS, height, width), bool)
        for k in range(REGIONS):
            y, x = height // 2 * (k // 2), width // 2 * (k % 2)
            side = 5 + (len(drawn) + 3 * k) % 9
            masks[k, y : y + side, x + k : x + k + side] = True
        drawn.append((data, list(masks)))
    return drawn


def write(kind: str, folder: Path, drawn):
    """Writes the images as a kind of source, and opens it."""
    if kind == "folder":
        place = scale_data.write_folder(folder, drawn)
        return open_source(str(place), masks=[str(folder / "masks")])
    if kind == "paths":
        return open_source(str(scale_data.write_parquet(folder, drawn, with_bytes=False)))
    return open_source(str(getattr(scale_data, f"write_{kind}")(folder, drawn)))


def expected_captions(drawn) -> Counter:
    """Counts image, region mask and caption of each region, by the model in this process."""
    model, processor = load_model(ROOT, SHAPES, device="cpu")
    found = Counter()
    for start in range(0, len(drawn), 6):
        batch = drawn[start : start + 6]
        output = model.diffusion_generate(
            [load_image(data) for data, _ in batch],
            [[load_mask(mask, scale_data.SIZE) for mask in masks] for _, masks in batch],
            processor=processor,
            **DECODING,
        )
        for (data, masks), texts in zip(batch, output.texts, strict=True):
            found += _entries(data, [encode_rle(mask) for mask in masks], texts)
    return found


def captioned(source, output: Path) -> Counter:
    """Captions a source; counts image, region mask and caption of each region in the output."""
    caption = CaptionOptions(str(ROOT), SHAPES, device="cpu", decoding=DECODING)
    options = DatasetOptions(str(output), caption, images="bytes", actors=1)
    summary = caption_dataset([source], options)
    assert summary["errors"] == {}
    return sum((_entries(*_columns(row)) for row in scale_runs.written(output)), Counter())


def _columns(row: dict) -> tuple:
    return row["image"], row["mask_rles"], row["captions"]


def _entries(data: bytes, rles: list[dict], captions: list[str]) -> Counter:
    """Pixels instead of bytes: SA-1B's files and those of `datasets` may be encoded anew."""
    pixels = hash(np.asarray(load_image(data)).tobytes())
    pairs = zip(rles, captions, strict=True)
    return Counter((pixels, rle["counts"], caption) for rle, caption in pairs)


def main():
    """Runs the comparison for some kinds, and prints what came of each."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--kinds", nargs="+", default=KINDS, choices=KINDS)
    arguments = parser.parse_args()

    drawn = draw(arguments.images)
    expected = expected_captions(drawn)
    with ray_session():  # one for all kinds
        for kind in arguments.kinds:
            started = time.perf_counter()
            source = write(kind, arguments.folder / kind, drawn)
            found = captioned(source, arguments.folder / f"{kind}-out")
            assert found == expected, f"{kind}: {(found - expected).total()} regions differ"
            seconds = time.perf_counter() - started
            print(f"{kind}: {found.total()} regions, each once; {seconds:.0f} s", flush=True)


if __name__ == "__main__":
    main()
