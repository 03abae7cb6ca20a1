"""Draws small images with region masks, and writes them as each kind of source has them."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
from perceptiondlm.image_masks import encode_rle
from PIL import Image

SIZE = (40, 32)  # width, height


def draw(count: int, seed: int = 0) -> list[tuple[bytes, list[np.ndarray]]]:
    """Returns images as PNG bytes, each with one to three box-shaped region masks."""
    rng = np.random.default_rng(seed)
    drawn = []
    for i in range(count):
        pixels = rng.integers(0, 256, (SIZE[1] // 8, SIZE[0] // 8, 3), dtype=np.uint8)
        image = Image.fromarray(pixels).resize(SIZE)
        masks = []
        for k in range(1 + i % 3):
            mask = np.zeros(SIZE[::-1], bool)
            y, x = rng.integers(0, 20, 2)
            mask[y : y + 8 + 2 * k, x : x + 10] = True
            masks.append(mask)
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        drawn.append((buffer.getvalue(), masks))
    return drawn


def write_images(folder: Path, drawn) -> list[str]:
    """Writes the images alone; returns their names."""
    folder.mkdir(parents=True, exist_ok=True)
    names = [f"i{k}.png" for k in range(len(drawn))]
    for name, (data, _) in zip(names, drawn, strict=True):
        (folder / name).write_bytes(data)
    return names


def write_folder(folder: Path, drawn) -> Path:
    """Writes `images` and `masks`, named after them."""
    write_images(folder / "images", drawn)
    (folder / "masks").mkdir()
    for i, (_, masks) in enumerate(drawn):
        for k, mask in enumerate(masks):
            Image.fromarray(mask.astype(np.uint8) * 255).save(folder / f"masks/i{i}_{k}.png")
    return folder / "images"


def write_lines(folder: Path, drawn) -> Path:
    """Writes JSON lines beside their images."""
    names = write_images(folder, drawn)
    rows = [
        {"image": name, "mask_rles": [encode_rle(mask) for mask in masks]}
        for name, (_, masks) in zip(names, drawn, strict=True)
    ]
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_parquet(folder: Path, drawn, with_bytes: bool = True) -> Path:
    """Writes a table, with bytes or paths."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    names = write_images(folder, drawn)
    rows = [
        {"image": data if with_bytes else name, "mask_rles": [encode_rle(m) for m in masks]}
        for name, (data, masks) in zip(names, drawn, strict=True)
    ]
    path = folder / "rows.parquet"
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def write_tars(folder: Path, drawn, count: int = 2) -> Path:
    """Writes WebDataset shards; returns a pattern of them."""
    folder.mkdir(parents=True, exist_ok=True)
    for part in range(count):
        with tarfile.open(folder / f"s{part}.tar", "w") as tar:
            for i in range(part, len(drawn), count):
                data, masks = drawn[i]
                text = json.dumps({"mask_rles": [encode_rle(mask) for mask in masks]}).encode()
                for name, content in ((f"i{i}.png", data), (f"i{i}.json", text)):
                    member = tarfile.TarInfo(name)
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    return folder / "*.tar"


def write_coco(folder: Path, drawn) -> Path:
    """Writes a COCO file beside its images."""
    names = write_images(folder, drawn)
    images = [
        {"id": 7 + i, "file_name": name, "width": SIZE[0], "height": SIZE[1]}
        for i, name in enumerate(names)
    ]
    annotations = [
        {"id": 100 * i + k, "image_id": 7 + i, "category_id": 1, "segmentation": encode_rle(mask)}
        for i, (_, masks) in enumerate(drawn)
        for k, mask in enumerate(masks)
    ]
    content = {"images": images, "annotations": annotations}
    path = folder / "instances.json"
    path.write_text(json.dumps({**content, "categories": [{"id": 1, "name": "box"}]}))
    return path


def write_panoptic(folder: Path, drawn) -> Path:
    """Writes a panoptic file and its PNGs; where regions overlap, the later one has the pixels."""
    names = write_images(folder, drawn)
    (folder / "panoptic").mkdir()
    annotations = []
    for i, (_, masks) in enumerate(drawn):
        ids = np.zeros(SIZE[::-1], np.int64)
        for k, mask in enumerate(masks):
            ids[mask] = 300 + k
        colors = np.stack([ids % 256, ids // 256 % 256, ids // 65536], -1).astype(np.uint8)
        Image.fromarray(colors).save(folder / f"panoptic/i{i}.png")
        segments = [
            {"id": 300 + k, "category_id": 1} for k in range(len(masks)) if (ids == 300 + k).any()
        ]
        annotations.append({"image_id": i, "file_name": f"i{i}.png", "segments_info": segments})
    images = [{"id": i, "file_name": name} for i, name in enumerate(names)]
    content = {"images": images, "annotations": annotations}
    path = folder / "panoptic.json"
    path.write_text(json.dumps({**content, "categories": [{"id": 1, "name": "box"}]}))
    return path


def write_sa1b(folder: Path, drawn) -> Path:
    """Writes SA-1B's pairs."""
    folder.mkdir(parents=True, exist_ok=True)
    for i, (data, masks) in enumerate(drawn):
        Image.open(io.BytesIO(data)).save(folder / f"sa_{i}.png")
        image = {"image_id": i, "file_name": f"sa_{i}.png", "width": SIZE[0], "height": SIZE[1]}
        annotations = [{"id": k, "segmentation": encode_rle(m)} for k, m in enumerate(masks)]
        text = json.dumps({"image": image, "annotations": annotations})
        (folder / f"sa_{i}.json").write_text(text)
    return folder


def write_saved(folder: Path, drawn) -> Path:
    """Writes what `datasets` saves to disk."""
    import datasets

    rows = [
        {"image": {"bytes": data, "path": None}, "mask_rles": [encode_rle(m) for m in masks]}
        for data, masks in drawn
    ]
    saved = datasets.Dataset.from_list(rows).cast_column("image", datasets.Image())
    saved.save_to_disk(str(folder))
    return folder
