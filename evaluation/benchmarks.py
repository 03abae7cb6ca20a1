"""Reads benchmarks of region captions: images, region masks, and questions about each caption.

Three forms are read: a ParaDLC-Bench folder and a DLC-Bench folder as published
(`annotations.json`, `qa.json`, `class_names.json`, image files in `images/`), and a user's own
COCO-style JSON file. A Hub dataset of the first two forms is downloaded first.
"""

import os
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ..configuration_perceptiondlm import path_inside
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
        image_id: shared by the regions of one image.
        image_path: the image's file.
        size: (height, width) of the image in pixels.
        mask: the region mask as a COCO RLE dict of that size.
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
        """Counts the regions of each image."""
        return Counter(sample.image_id for sample in self.samples)


def load_benchmark(
    source: str | Path, *, images: str | Path | None = None, revision: str | None = None
) -> Benchmark:
    """Reads a benchmark folder, a COCO-style JSON file, or a Hub dataset.

    Args:
        source: a folder that holds `annotations.json`, a JSON file, or a Hub id "owner/name".
        images: the folder of the image files; by default `images` beside the annotations. The
            images themselves are not opened.
        revision: branch, tag or commit of a Hub dataset.

    Raises FileNotFoundError if there is no such benchmark, and ValueError, with file and record,
    for one that cannot be read.
    """
    annotations = _annotation_file(source, revision)
    folder = Path(images) if images is not None else annotations.parent / "images"
    class_names = _optional_json(annotations.parent / "class_names.json")
    reader = _SampleReader(annotations, folder, class_names)

    # The form is told by the content: COCO's is an object, ParaDLC-Bench's a list of images.
    content = read_json(annotations)
    if isinstance(content, list):
        name, samples = "paradlc", reader.read_paradlc(content)
    elif isinstance(content, dict) and {"images", "annotations"} <= set(content):
        name, samples = "coco", reader.read_coco(content)
    else:
        raise ValueError(
            f"{annotations}: expected a list of images (ParaDLC-Bench) or an object with 'images'"
            f" and 'annotations' (COCO), got {type(content).__name__}"
        )

    # Scores are summed in the order of the questions.
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


@dataclass(frozen=True)
class _SampleReader:
    """Reads the regions of an annotation file; errors name the file and the record in it."""

    file: Path
    images: Path  # folder of the image files
    class_names: dict[str, str]  # of some regions, by key

    def read_paradlc(self, content: list) -> list[RegionSample]:
        """Reads ParaDLC-Bench's form: a list of images, each with its annotations."""
        samples = []
        for number, image in enumerate(content):
            where = f"{self.file}: image {number}"
            fields = ("image_id", "file_name", "height", "width", "annotations")
            _expect_fields(image, fields, where)

            for position, region in enumerate(_expect_list(image["annotations"], where)):
                at = f"{where}, annotation {position}"
                _expect_fields(region, ("index", "category_name", "mask_rle"), at)
                image_id, category = str(image["image_id"]), region["category_name"]
                key = f"{image_id}_{region['index']}"
                samples.append(self._sample(key, image_id, image, region["mask_rle"], category, at))
        return samples

    def read_coco(self, content: dict) -> list[RegionSample]:
        """Reads COCO's form: lists of images, annotations and, optionally, categories."""
        fields = ("id", "file_name", "height", "width")
        images = _table(content["images"], fields, f"{self.file}: image")
        categories = _table(content.get("categories", []), ("id", "name"), f"{self.file}: category")
        regions = _expect_list(content["annotations"], f"{self.file}: annotations")

        samples = []
        for number, region in enumerate(regions):
            at = f"{self.file}: annotation {number}"
            _expect_fields(region, ("id", "image_id", "segmentation"), at)
            if region["image_id"] not in images:
                raise ValueError(f"{at}: expected the id of an image, got {region['image_id']!r}")
            image = images[region["image_id"]]
            category = categories.get(region.get("category_id"), {}).get("name", "object")
            key, image_id = str(region["id"]), str(image["id"])
            samples.append(self._sample(key, image_id, image, region["segmentation"], category, at))
        return samples

    def _sample(
        self, key: str, image_id: str, image: dict, segmentation: object, category: str, where: str
    ) -> RegionSample:
        size = (image["height"], image["width"])
        if not all(isinstance(side, int) and side > 0 for side in size):
            raise ValueError(f"{where}: expected a height and width of 1 or more, got {size}")
        return RegionSample(
            key=key,
            image_id=image_id,
            image_path=_image_path(self.images, image["file_name"], where),
            size=size,
            mask=_to_rle(segmentation, size, where),
            category=category,
            class_name=self.class_names.get(key, category),
        )


def _image_path(folder: Path, name: object, where: str) -> Path:
    """Returns the path of an image, which must lie inside the folder whatever its name says."""
    if not isinstance(name, str) or not name or "\0" in name:
        raise ValueError(f"{where}: expected a file_name, got {name!r}")
    try:
        return path_inside(folder, os.path.normpath(name.replace("\\", "/")))
    except ValueError as error:
        raise ValueError(f"{where}: expected a file_name inside {folder}, got {name!r}") from error


def _to_rle(segmentation: object, size: tuple[int, int], where: str) -> dict:
    """Returns a region as COCO RLE, given as one or as polygons in pixels; size (height, width)."""
    if isinstance(segmentation, list) and segmentation:
        try:
            return encode_rle(fill_polygons(segmentation, size[::-1]))
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error

    if not isinstance(segmentation, dict) or not {"size", "counts"} <= set(segmentation):
        raise ValueError(f"{where}: expected a COCO RLE or polygons, got {segmentation!r:.80}")
    if list(segmentation["size"]) != list(size):
        raise ValueError(
            f"{where}: expected a region mask of the image's height and width {list(size)},"
            f" got {segmentation['size']}"
        )
    return segmentation


def _read_questions(file: Path, samples: Mapping[str, RegionSample]) -> dict:
    """Reads the questions of each region, in the file's order; {} if there is no such file."""
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
    """Returns the samples by key. Raises ValueError where two have the same."""
    by_key = {sample.key: sample for sample in samples}
    if len(by_key) < len(samples):
        key = Counter(sample.key for sample in samples).most_common(1)[0][0]
        raise ValueError(f"{file}: expected every region once, got {key!r} more often")
    return by_key


def _optional_json(file: Path) -> dict:
    """Reads a JSON object; {} if there is no such file."""
    content = read_json(file) if file.is_file() else {}
    if not isinstance(content, dict):
        raise ValueError(f"{file}: expected an object, got {type(content).__name__}")
    return content


def _table(records: object, fields: tuple[str, ...], where: str) -> dict:
    """Returns records by their `id`, once each has been found to have the fields."""
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
