"""Draws `docs/architecture.svg`: the way of an image and its region masks to captions.

python docs/figures/make_architecture.py
"""

from pathlib import Path

import matplotlib
import numpy as np
from matplotlib import pyplot as plt
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle
from perceptiondlm.scenes.shapes import render_scene

matplotlib.use("Agg")
OUTPUT = Path(__file__).parents[1] / "architecture.svg"
SCENE, SHOWN = 55, (1, 2)  # the scene of the animation, and two of its objects

INK, GRAY, PAPER = "#1f2933", "#7b8794", "#ffffff"
TRUNK = "#e4e7eb"
REGION = ("#7c3aed", "#d6336c")  # one color a region
PALE = ("#ede4fd", "#fce0ea")
CAPTIONS = (
    ("[M] [M] [M] [M] [M]", "[M] [M] [M] [M] [M]"),
    ("a large [M] green [M]", "a [M] striped [M] star"),
    ("a large plain green square", "a small striped blue star"),
)


def box(axes, x, y, width, height, text="", *, face=PAPER, edge=INK, size=12, **font):
    """Draws a rounded box with centered text; x and y are its lower left corner."""
    style = "round,pad=0,rounding_size=0.08"
    axes.add_patch(
        FancyBboxPatch((x, y), width, height, style, facecolor=face, edgecolor=edge, linewidth=1.4)
    )
    axes.text(x + width / 2, y + height / 2, text, ha="center", va="center", fontsize=size, **font)


def arrow(axes, start, end, color=INK, bend=0.0):
    """Draws an arrow between two points."""
    axes.add_patch(
        FancyArrowPatch(
            start,
            end,
            arrowstyle="-|>",
            mutation_scale=14,
            color=color,
            linewidth=1.6,
            connectionstyle=f"arc3,rad={bend}",
            shrinkA=2,
            shrinkB=2,
        )
    )


def elbow(axes, corners, color):
    """Draws a line through corners that ends in an arrow."""
    axes.plot(*zip(*corners[:-1], strict=True), color=color, linewidth=1.6)
    arrow(axes, corners[-2], corners[-1], color)


def heading(axes, x, text):
    """Writes the title of a column."""
    axes.text(x, 6.05, text, ha="center", va="center", fontsize=13, fontweight="bold", color=INK)


def draw_image(axes, scene):
    """Draws the image with two region masks tinted, and its tiles."""
    pixels = np.asarray(scene.image).astype(float)
    for color, k in zip(REGION, SHOWN, strict=True):
        mask = scene.objects[k].mask
        inside = mask & np.roll(mask, 3, 0) & np.roll(mask, -3, 0)
        inside &= np.roll(mask, 3, 1) & np.roll(mask, -3, 1)
        pixels[mask & ~inside] = 255 * np.array(matplotlib.colors.to_rgb(color))
    height, width, _ = pixels.shape
    high = 2.5 * height / width
    axes.imshow(pixels.astype(np.uint8), extent=(0.1, 2.6, 3.2, 3.2 + high), zorder=2)
    axes.text(1.35, 3.35 + high, "one mask per region", ha="center", fontsize=11, color=GRAY)

    # The same image cut into tiles.
    for row in range(2):
        for column in range(2):
            x, y = 0.35 + 0.75 * column, 1.05 + 0.75 * (1 - row)
            part = pixels[row * height // 2 :, column * width // 2 :]
            part = part[: height // 2, : width // 2].astype(np.uint8)
            axes.imshow(part, extent=(x, x + 0.66, y, y + 0.66), zorder=2)
    axes.imshow(pixels.astype(np.uint8), extent=(2.0, 2.66, 1.42, 2.08), zorder=2)
    axes.text(1.35, 0.62, "tiles and a thumbnail", ha="center", fontsize=11, color=GRAY)
    arrow(axes, (1.35, 3.15), (1.35, 2.6))


def draw_vision(axes):
    """Draws the tower with its region prompts, the connector and RoI replay."""
    box(axes, 3.35, 2.35, 1.9, 1.5, "vision tower\n(SigLIP-2)")
    box(axes, 3.35, 1.05, 1.9, 0.7, "connector")
    for k in range(2):
        box(axes, 3.35 + k, 4.55, 0.9, 0.62, f"prompt {k}", face=PALE[k], edge=REGION[k], size=10)
        arrow(axes, (3.8 + k, 4.55), (3.95 + 0.7 * k, 3.85), REGION[k])
    axes.text(4.3, 5.4, "added to the patches\nof each mask", ha="center", fontsize=11, color=GRAY)
    arrow(axes, (2.72, 1.75), (3.35, 2.75), bend=-0.15)
    arrow(axes, (4.3, 2.35), (4.3, 1.75))


def draw_sequence(axes):
    """Draws the trunk and its branches: RoI tokens, then the caption."""
    box(axes, 6.1, 2.2, 1.75, 1.5, face=TRUNK)
    axes.text(6.97, 3.35, "trunk", ha="center", va="center", fontsize=12, fontweight="bold")
    axes.text(6.97, 2.75, "image tokens,\ninstruction", ha="center", va="center", fontsize=11)
    elbow(axes, [(5.25, 1.46), (6.97, 1.46), (6.97, 2.2)], INK)
    arrow(axes, (5.25, 1.25), (8.45, 1.25), REGION[1])
    elbow(axes, [(5.25, 1.68), (5.7, 1.68), (5.7, 4.5), (8.45, 4.5)], REGION[0])
    axes.text(6.85, 0.92, "features in each box, replayed", ha="center", fontsize=11, color=GRAY)

    for k, y in enumerate((4.15, 1.05)):
        color, pale = REGION[k], PALE[k]
        box(axes, 8.45, y, 1.45, 0.7, f"RoI tokens {k}", face=pale, edge=color, size=11)
        box(axes, 10.25, y, 1.3, 0.7, f"caption {k}", face=pale, edge=color, size=11)
        arrow(axes, (7.85, 3.25 if k == 0 else 2.6), (8.8, y if k == 0 else y + 0.7), GRAY)
        arrow(axes, (9.9, y + 0.35), (10.25, y + 0.35), color)
    lines = "no branch attends to another,\nso the trunk is computed once"
    axes.text(10.0, 2.95, lines, ha="center", va="center", fontsize=11, color=GRAY)


def draw_denoising(axes):
    """Draws the captions after three denoising steps."""
    for step, (texts, y) in enumerate(zip(CAPTIONS, (4.35, 2.8, 1.25), strict=True)):
        box(axes, 12.1, y, 3.1, 1.05)
        for k, text in enumerate(texts):
            axes.add_patch(Rectangle((12.22, y + 0.6 - 0.44 * k), 0.1, 0.3, color=REGION[k]))
            axes.text(12.45, y + 0.75 - 0.44 * k, text, va="center", fontsize=11, color=INK)
        if step:
            arrow(axes, (13.65, y + 1.5), (13.65, y + 1.05))
    axes.text(13.65, 0.62, "all captions at once,\nthe surest tokens first",
              ha="center", va="center", fontsize=11, color=GRAY)  # fmt: skip
    arrow(axes, (11.55, 4.6), (12.1, 5.0), REGION[0])
    elbow(axes, [(11.55, 1.4), (11.83, 1.4), (11.83, 4.68), (12.1, 4.68)], REGION[1])


def main():
    """Draws the figure and writes it as SVG."""
    plt.rcParams.update({"font.family": "DejaVu Sans", "svg.hashsalt": "0", "text.color": INK})
    figure, axes = plt.subplots(figsize=(15.4, 6.3))
    scene = render_scene(SCENE, "heldout")
    draw_image(axes, scene)
    draw_vision(axes)
    draw_sequence(axes)
    draw_denoising(axes)
    for x, text in (
        (1.35, "image and masks"),
        (4.3, "vision"),
        (8.9, "sequence: trunk and branches"),
        (13.65, "denoising"),
    ):
        heading(axes, x, text)

    axes.set(xlim=(0, 15.4), ylim=(0.2, 6.35), aspect="equal")
    axes.axis("off")
    figure.savefig(
        OUTPUT, bbox_inches="tight", pad_inches=0.05, facecolor=PAPER, metadata={"Date": None}
    )
    print(f"{OUTPUT}: {OUTPUT.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
