"""Draws `docs/regions.jpg`: what the offline segmenter finds in a photograph.

    python docs/figures/make_regions.py

The photograph is NASA's of Eileen Collins, in the public domain, as scikit-image has it.
"""

from pathlib import Path

from perceptiondlm.apps.captioning.drawing import draw_regions, encode_image
from perceptiondlm.regions.segmenters import find_regions
from skimage.data import astronaut

OUTPUT = Path(__file__).parents[1] / "regions.jpg"


def main():
    """Finds the regions and writes the drawing."""
    image = astronaut()
    regions = find_regions(image, everything=True)
    drawing = draw_regions(image, [region.mask for region in regions])
    OUTPUT.write_bytes(encode_image(drawing, OUTPUT.suffix))
    print(f"{OUTPUT}: {len(regions)} regions, {OUTPUT.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
