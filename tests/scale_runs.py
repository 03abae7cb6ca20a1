"""Reads what a run of `caption-dataset` left, and compares it with what it was given."""

from collections import Counter
from pathlib import Path

from perceptiondlm.image_masks import encode_rle
from perceptiondlm.pipelines.writers import read_rows, read_tar


def written(output: Path) -> list[dict]:
    """Returns the captioned rows of all shards."""
    parquet = [row for p in output.glob("captions/*.parquet") for row in read_rows(str(p))]
    return parquet + [row for p in output.glob("captions/*.tar") for row in read_tar(str(p))]


def regions_of(rows: list[dict]) -> Counter:
    """Counts each region of captioned rows, by its image's place and its run lengths."""
    return Counter((row["image"], rle["counts"]) for row in rows for rle in row["mask_rles"])


def regions_drawn(drawn) -> Counter:
    """Counts the regions of images that were drawn, by the names that they were written with."""
    return Counter(
        (f"i{i}.png", encode_rle(mask)["counts"])
        for i, (_, masks) in enumerate(drawn)
        for mask in masks
    )


def captions_of(rows: list[dict]) -> dict:
    """Returns the captions of each row, by its image."""
    return {row["image"]: row["captions"] for row in rows}
