"""Times the preprocessing of a 12-megapixel photograph with 6 masks, against PIL's resizes alone.

    python -m perceptiondlm.benchmarks.preprocessing --output benchmarks/results/preprocessing.json

Both alternate in one run. The resizes are those that the pixels need whatever code does them: the
image to its tiles' canvas and to its thumbnail, and each region's 8-bit image likewise.
"""

import argparse
import statistics
import time

import numpy as np
from PIL import Image

from ..evaluation.files import write_json
from ..image_processing_perceptiondlm import PerceptionDLMImageProcessor, resize
from .denoising import describe_machine


def photograph(size: tuple[int, int]) -> Image.Image:
    """Draws a smooth image with grain, RGB."""
    random = np.random.default_rng(0)
    coarse = Image.fromarray(random.integers(0, 256, (24, 32, 3), dtype=np.uint8))
    values = np.asarray(coarse.resize(size, Image.Resampling.BICUBIC)).astype(np.int16)
    grain = random.integers(-6, 7, values.shape, dtype=np.int16)
    return Image.fromarray((values + grain).clip(0, 255).astype(np.uint8))


def ellipses(size: tuple[int, int], count: int) -> list[np.ndarray]:
    """Draws region masks, bool (H, W): ellipses at random places."""
    random = np.random.default_rng(1)
    y, x = np.ogrid[0 : 1 : size[1] * 1j, 0 : 1 : size[0] * 1j]
    masks = []
    for _ in range(count):
        (cx, cy), (rx, ry) = random.uniform(0.3, 0.7, 2), random.uniform(0.05, 0.3, 2)
        masks.append(((x - cx) / rx) ** 2 + ((y - cy) / ry) ** 2 <= 1)
    return masks


def measure(size: tuple[int, int], num_masks: int, repeats: int) -> dict[str, float]:
    """Returns the median seconds of the preprocessing, and of the resizes alone."""
    processor = PerceptionDLMImageProcessor()
    image, masks = photograph(size), ellipses(size, num_masks)
    regions = [Image.fromarray(np.where(mask, 0, 255).astype(np.uint8)) for mask in masks]
    columns, rows = processor.choose_grid(size)
    tile = processor.image_size

    def resizes():
        for source in (image, *regions):
            resize(source, (columns * tile, rows * tile))
            resize(source, (tile, tile))

    def whole():
        processor(image, masks)

    ways = {"resizes": resizes, "preprocessing": whole}
    seconds = {name: [] for name in ways}
    for repeat in range(repeats + 1):
        for name, way in ways.items():
            start = time.perf_counter()
            way()
            if repeat:  # the first is to warm up
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def main():
    """Measures, prints the ratio and writes the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--size", type=int, nargs=2, default=(4000, 3000), help="width, height")
    parser.add_argument("--masks", type=int, default=6)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--output", help="JSON")
    arguments = parser.parse_args()

    size = tuple(arguments.size)
    medians = measure(size, arguments.masks, arguments.repeats)
    result = {
        "machine": describe_machine("cpu"),
        "size": size,
        "masks": arguments.masks,
        "repeats": arguments.repeats,
        "seconds": medians,
        "ratio": medians["preprocessing"] / medians["resizes"],
    }
    if arguments.output:
        write_json(arguments.output, result)

    print(
        f"resizes {medians['resizes']:.3f} s, preprocessing {medians['preprocessing']:.3f} s,"
        f" ratio {result['ratio']:.3f}"
    )


if __name__ == "__main__":
    main()
