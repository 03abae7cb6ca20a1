"""Benchmarks of region captions: pictures, region masks, and what is asked about each caption.

Three forms are read: a ParaDLC-Bench folder and a DLC-Bench folder as published
(`annotations.json`, `qa.json`, `class_names.json`, pictures in `images/`), and a COCO-style JSON
file of one's own. A Hub dataset of the first two forms is downloaded first.
"""

import os
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ..image_loading import path_inside
from ..image_masks import encode_rle, fill_polygons
from .files import read_json
from .scoring import Question, parse_question

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
NESTED_FOLDERS = ("", "annotations")  # where a published dataset may keep annotations.json


@dataclass(frozen=True)
class RegionSample:
    """One region to caption.

    Attributes:
        key: names the region in predictions, answers and scores: "{image_id}_{index}" for
            ParaDLC-Bench, the annotation id for COCO-style files.
        image_id: groups the regions of one picture.
        image_path: the picture's file.
        size: (height, width) of the picture in pixels.
        mask: the region as a COCO RLE dict of that size.
        category: the annotation's category.
        class_name: the class that the recognition question asks about.
    """

    key: str
    image_id: str
    image_path: Path
    size: tuple[int, int]
    mask: dict
    category: str
    class_name: str


@dataclass(frozen=True)
class Benchmark:
    """Regions and their questions.

    Attributes:
        name: "paradlc" or "coco" after the form of the annotations.
        source: the file that was read.
        samples: the regions, in the order of the questions where there are any.
        questions: per region key its questions; empty without a `qa.json`.
    """

    name: str
    source: Path
    samples: tuple[RegionSample, ...]
    questions: Mapping[str, tuple[Question, ...]] = field(default_factory=dict)

    def regions_per_image(self) -> Counter:
        """How many regions each picture has."""
        return Counter(sample.image_id for sample in self.samples)


def load_benchmark(
    source: str | Path, *, images: str | Path | None = None, revision: str | None = None
) -> Benchmark:
    """Reads a benchmark folder, a COCO-style JSON file, or a Hub dataset.

    Args:
        source: a folder that holds `annotations.json`, a JSON file, or a Hub id "owner/name".
        images: the pictures' folder; by default `images` beside the annotations. The pictures
            themselves are not opened.
        revision: branch, tag or commit of a Hub dataset.

    Raises FileNotFoundError if there is no such benchmark, ValueError naming file and record for
    one that cannot be read.
    """
    annotations = _annotation_file(source, revision)
    images = Path(images) if images is not None else annotations.parent / "images"
    content = read_json(annotations)
    class_names = _optional_json(annotations.parent / "class_names.json")
    if isinstance(content, list):
        name, samples = "paradlc", _paradlc_samples(content, annotations, images, class_names)
    elif isinstance(content, dict) and {"images", "annotations"} <= set(content):
        name, samples = "coco", _coco_samples(content, annotations, images, class_names)
    else:
        raise ValueError(
            f"{annotations}: expected a list of images (ParaDLC-Bench) or an object with 'images'"
            f" and 'annotations' (COCO), got {type(content).__name__}"
        )
    by_key = _by_unique_key(samples, annotations)
    questions = _read_questions(annotations.parent / "qa.json", by_key)
    ordered = [by_key[key] for key in questions] if questions else samples
    return Benchmark(name, annotations, tuple(ordered), questions)


def download_benchmark(repo_id: str, revision: str | None = None) -> Path:
    """Downloads a Hub dataset and returns its folder."""
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(repo_id, repo_type="dataset", revision=revision))


def _annotation_file(source: str | Path, revision: str | None) -> Path:
    path = Path(source)
    if path.is_file():
        return path
    if not path.exists() and HUB_ID.fullmatch(str(source)):
        path = download_benchmark(str(source), revision)
    for nested in NESTED_FOLDERS:
        if (path / nested / "annotations.json").is_file():
            return path / nested / "annotations.json"
    raise FileNotFoundError(
        f"expected a folder with annotations.json, a JSON file or a Hub dataset id, got {source}"
    )


def _paradlc_samples(content: list, file: Path, images: Path, class_names: dict) -> list:
    samples = []
    for number, image in enumerate(content):
        where = f"{file}: image {number}"
        _expect_fields(image, ("image_id", "file_name", "height", "width", "annotations"), where)
        for position, region in enumerate(_expect_list(image["annotations"], where)):
            at = f"{where}, annotation {position}"
            _expect_fields(region, ("index", "category_name", "mask_rle"), at)
            key = f"{image['image_id']}_{region['index']}"
            samples.append(
                _sample(
                    key,
                    image,
                    region["mask_rle"],
                    region["category_name"],
                    class_names,
                    images,
                    str(image["image_id"]),
                    at,
                )
            )
    return samples


def _coco_samples(content: dict, file: Path, images: Path, class_names: dict) -> list:
    pictures = _table(content["images"], ("id", "file_name", "height", "width"), f"{file}: image")
    categories = _table(content.get("categories", []), ("id", "name"), f"{file}: category")
    samples = []
    for number, region in enumerate(_expect_list(content["annotations"], f"{file}: annotations")):
        at = f"{file}: annotation {number}"
        _expect_fields(region, ("id", "image_id", "segmentation"), at)
        if region["image_id"] not in pictures:
            raise ValueError(f"{at}: expected the id of an image, got {region['image_id']!r}")
        image = pictures[region["image_id"]]
        category = categories.get(region.get("category_id"), {}).get("name", "object")
        samples.append(
            _sample(
                str(region["id"]),
                image,
                region["segmentation"],
                category,
                class_names,
                images,
                str(image["id"]),
                at,
            )
        )
    return samples


def _sample(
    key: str,
    image: dict,
    segmentation: object,
    category: str,
    class_names: dict,
    images: Path,
    image_id: str,
    where: str,
) -> RegionSample:
    size = (image["height"], image["width"])
    if not all(isinstance(side, int) and side > 0 for side in size):
        raise ValueError(f"{where}: expected a height and width of 1 or more, got {size}")
    return RegionSample(
        key=key,
        image_id=image_id,
        image_path=_inside(images, image["file_name"], where),
        size=size,
        mask=_rle(segmentation, size, where),
        category=category,
        class_name=class_names.get(key, category),
    )


def _inside(folder: Path, name: object, where: str) -> Path:
    """The path of a picture that must lie inside the folder, whatever its name says."""
    if not isinstance(name, str) or not name or "\0" in name:
        raise ValueError(f"{where}: expected a file_name, got {name!r}")
    try:
        return path_inside(folder, os.path.normpath(name.replace("\\", "/")))
    except ValueError as error:
        raise ValueError(f"{where}: expected a file_name inside {folder}, got {name!r}") from error


def _rle(segmentation: object, size: tuple[int, int], where: str) -> dict:
    """A region as COCO RLE: already one, or polygons in pixels."""
    if isinstance(segmentation, list) and segmentation:
        return _polygons_to_rle(segmentation, size, where)
    if not isinstance(segmentation, dict) or not {"size", "counts"} <= set(segmentation):
        raise ValueError(f"{where}: expected a COCO RLE or polygons, got {segmentation!r:.80}")
    if list(segmentation["size"]) != list(size):
        raise ValueError(
            f"{where}: expected a mask of the image's height and width {list(size)},"
            f" got {segmentation['size']}"
        )
    return segmentation


def _polygons_to_rle(polygons: list, size: tuple[int, int], where: str) -> dict:
    try:
        return encode_rle(fill_polygons(polygons, size[::-1]))
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def _read_questions(file: Path, samples: Mapping[str, RegionSample]) -> dict:
    """Per region its questions, in the file's order; {} if there is no such file."""
    content = _optional_json(file)
    unknown = [key for key in content if key not in samples]
    if unknown:
        raise ValueError(f"{file}: expected questions about annotated regions, got {unknown[0]!r}")
    return {
        key: tuple(
            parse_question(record, f"{file}: region {key}, question {number}")
            for number, record in enumerate(_expect_list(records, f"{file}: region {key}"))
        )
        for key, records in content.items()
    }


def _by_unique_key(samples: list[RegionSample], file: Path) -> dict[str, RegionSample]:
    by_key = {sample.key: sample for sample in samples}
    if len(by_key) < len(samples):
        key = Counter(sample.key for sample in samples).most_common(1)[0][0]
        raise ValueError(f"{file}: expected every region once, got {key!r} more often")
    return by_key


def _optional_json(file: Path) -> dict:
    content = read_json(file) if file.is_file() else {}
    if not isinstance(content, dict):
        raise ValueError(f"{file}: expected an object, got {type(content).__name__}")
    return content


def _table(records: object, fields: tuple[str, ...], where: str) -> dict:
    for number, record in enumerate(_expect_list(records, f"{where}s")):
        _expect_fields(record, fields, f"{where} {number}")
    return {record["id"]: record for record in records}


def _expect_list(value: object, where: str) -> list:
    if not isinstance(value, list):
        raise ValueError(f"{where}: expected a list, got {type(value).__name__}")
    return value


def _expect_fields(record: object, fields: tuple[str, ...], where: str):
    if not isinstance(record, dict):
        raise ValueError(f"{where}: expected an object, got {type(record).__name__}")
    lacking = [name for name in fields if name not in record]
    if lacking:
        raise ValueError(f"{where}: expected the fields {fields}, got none for {lacking}")
