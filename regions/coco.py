"""Reads regions from COCO's and SAM's annotation files, and from lists of masks.

Names inside the files are compared with an image's, never opened. What is wrong with one entry is
that entry's: it is named, and the others are used.
"""

import math
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from .files import ImageSource, is_plain_name, open_mask_file
from .region_source import Maker, RegionSource, Source, declared_size, entry_of


class CocoFile(Source):
    """A COCO file: regions by the image's name, which is compared and never opened."""

    def __init__(self, path: Path, content: dict):
        self.name = path.name
        lists = [content["images"], content["annotations"], content.get("categories") or []]
        if not all(isinstance(entries, list) for entries in lists):
            raise ValueError(f"expected lists of images, annotations and categories in {path}")
        images, annotations, categories = lists

        self.categories = {
            category["id"]: category.get("name")
            for category in categories
            if isinstance(category, dict) and _is_id(category.get("id"))
        }
        self.refused = []
        self.images: dict[str, list[dict]] = {}  # by file name
        self.annotations: dict[object, list[dict]] = {}  # by image id
        self.repeated: set[int] = set()  # Python's ids of annotations whose own id is taken
        self._index_annotations(annotations, self._index_images(images))
        if self.refused and not self.images:
            raise ValueError(self.refused[0])

    def _index_images(self, images: list) -> set:
        """Fills `images`; returns all ids, those of refused images too."""
        by_id: dict[object, dict[str, dict]] = {}
        for image in images:
            if not isinstance(image, dict) or not _is_id(image.get("id")):
                self._refuse("images with an id", image)
            elif not is_plain_name(name := image.get("file_name")):
                self._refuse("a file_name inside the images' folder", name)
                by_id.setdefault(image["id"], {})
            else:
                by_id.setdefault(image["id"], {})[name] = image

        for image_id, named in by_id.items():
            if len(named) > 1:  # whose annotations are they?
                self._refuse(f"one image with the id {image_id!r}", sorted(named))
            for name, image in named.items() if len(named) == 1 else ():
                self.images.setdefault(name, []).append(image)
        return set(by_id)

    def _index_annotations(self, annotations: list, image_ids: set):
        """Fills `annotations`; of those with equal ids the first alone has a right to it."""
        taken = set()
        for annotation in annotations:
            if not isinstance(annotation, dict) or not _is_id(annotation.get("image_id")):
                self._refuse("annotations with an image_id", annotation)
            elif annotation["image_id"] not in image_ids:
                self._refuse("the image_id of an image in each annotation", annotation)
            else:
                self.annotations.setdefault(annotation["image_id"], []).append(annotation)
                if _is_id(own := annotation.get("id")):
                    self.repeated |= {id(annotation)} if own in taken else set()
                    taken.add(own)

    def _refuse(self, expected: str, got):
        self.refused.append(f"{self.name}: expected {expected}, got {got!r:.120}")

    def makers(self, source: ImageSource, size: tuple[int, int]) -> Iterator[Maker]:
        for image in self._images_of(source):
            for k, annotation in enumerate(self.annotations.get(image["id"], [])):
                origin = f"{self.name}#{annotation.get('id', k)!s:.80}"
                yield origin, partial(self._regions, annotation, origin, declared_size(image))

    def _images_of(self, source: ImageSource) -> list[dict]:
        return entry_of(self.images, source, self.name) or []

    def _regions(self, annotation: dict, origin: str, size) -> list[RegionSource]:
        for name in ("id", "category_id"):
            if annotation.get(name) is not None and not _is_id(annotation[name]):
                raise ValueError(f"expected {name} as a number, got {annotation[name]!r:.80}")
        if id(annotation) in self.repeated:
            raise ValueError("expected each annotation's id once, got it again")
        mask = annotation_mask(annotation, self.name)
        ids = self._origin(annotation)
        return [RegionSource(mask, origin, ids, ids.get("category"), score_of(annotation), size)]

    def _origin(self, annotation: dict) -> dict:
        names = ("id", "image_id", "category_id")
        kept = {name: annotation[name] for name in names if annotation.get(name) is not None}
        if annotation.get("category_id") in self.categories:
            kept["category"] = self.categories[annotation["category_id"]]
        return kept


def segment_ids(image: Image.Image, name: str) -> np.ndarray:
    """Returns the segment of each pixel of a panoptic PNG, integers (H, W): R + 256 G + 65536 B.

    Raises ValueError, with the file's `name`, for an image without colors.
    """
    if image.mode not in ("RGB", "RGBA", "P"):
        raise ValueError(f"expected segment ids as colors in {name}, got mode {image.mode}")
    colors = np.asarray(image.convert("RGB")).astype(np.int32)
    return colors @ np.array([1, 256, 65536], np.int32)


class PanopticFile(CocoFile):
    """COCO's panoptic form: a JSON file, and a PNG for each image whose colors are its segments.

    The PNGs lie in the folder of the JSON file's name beside it, or beside it. They are found among
    the folder's own files, by the name that the JSON file gives.
    """

    def __init__(self, path: Path, content: dict):
        super().__init__(path, content)
        folder = path.with_suffix("")
        folder = folder if folder.is_dir() else path.parent
        self.folder = folder
        self.files = {file.name: file for file in folder.iterdir() if file.is_file()}

    def makers(self, source: ImageSource, size: tuple[int, int]) -> Iterator[Maker]:
        for image in self._images_of(source):
            for annotation in self.annotations.get(image["id"], []):
                segments = annotation.get("segments_info")
                if not isinstance(segments, list):
                    raise ValueError(f"expected a list segments_info in {self.name}, got none")
                ids = self._segment_ids(annotation)
                for k, segment in enumerate(segments):
                    origin = f"{self.name}#{k}"
                    yield origin, partial(self._segments, ids, segment, annotation, origin)

    def _segment_ids(self, annotation: dict) -> np.ndarray:
        """Reads the segment of each pixel, integers (H, W)."""
        name = annotation.get("file_name")
        file = self.files.get(Path(name).name) if is_plain_name(name) else None
        if file is None:
            raise ValueError(f"expected the PNG {name!r:.120} of {self.name} in {self.folder}")
        return segment_ids(open_mask_file(file), file.name)

    def _segments(self, ids, segment, annotation: dict, origin: str) -> list[RegionSource]:
        number = segment.get("id") if isinstance(segment, dict) else None
        if type(number) is not int:
            raise ValueError(f"expected a segment with an id, got {segment!r:.80}")
        mask = ids == number
        if not mask.any():
            raise ValueError(f"expected pixels of segment {number} in the PNG, got none")
        named = self._origin(segment | {"image_id": annotation["image_id"]})
        return [RegionSource(mask, origin, named, named.get("category"), score_of(segment))]


class AnnotationList(Source):
    """Regions of one image: SAM's annotation file, what its mask generator returns, or a list of
    masks. It goes with the image that it names or is named like, or the only one."""

    def __init__(self, path: Path, content, only: bool):
        self.path = path
        self.name = path.name
        self.only = only
        self.image: dict = {}
        if isinstance(content, dict) and "annotations" in content:
            image = content.get("image")
            self.image = image if isinstance(image, dict) else {}
            content = content["annotations"]
        self.file_name = self.image.get("file_name")
        if self.file_name is not None and not is_plain_name(self.file_name):
            raise ValueError(f"expected a plain file_name in {path}, got {self.file_name!r:.120}")
        self.items = content if isinstance(content, list) else [content]
        self._expect_one_image()

    def _expect_one_image(self):
        """Refuses COCO's list of results where it is about several images."""
        ids = {
            item["image_id"]
            for item in self.items
            if isinstance(item, dict) and _is_id(item.get("image_id"))
        }
        if len(ids) > 1:
            raise ValueError(
                f"expected regions of one image in the list {self.name}, got those of {len(ids)}"
                " (image_id): give a COCO file with `images` beside its `annotations`"
            )

    def makers(self, source: ImageSource, size: tuple[int, int]) -> Iterator[Maker]:
        named = (
            self.file_name is not None
            and bool(source.path)
            and Path(self.file_name).name == Path(source.path).name
        )
        if not (self.only or named or source.stem == self.path.stem):
            return
        for k, item in enumerate(self.items):
            yield f"{self.name}#{k}", partial(self._regions, k, item)

    def _regions(self, k: int, item) -> list[RegionSource]:
        mask, origin = annotation_mask(item, self.name), f"{self.name}#{k}"
        size = declared_size(self.image)
        return [RegionSource(mask, origin, {}, label_of(item), score_of(item), size)]


def annotation_mask(annotation, name: str):
    """Returns the mask, as `load_mask` takes it, of a COCO or SAM annotation or a plain mask."""
    if isinstance(annotation, list):
        return annotation  # a box or polygons
    if not isinstance(annotation, dict):  # least of all a path
        raise ValueError(f"expected annotations or masks in {name}, got {str(annotation)[:80]!r}")
    if {"size", "counts"} <= set(annotation) or set(annotation) in ({"box"}, {"polygons"}):
        return annotation

    segmentation = annotation.get("segmentation")
    if isinstance(segmentation, dict):
        return segmentation
    if isinstance(segmentation, list) and segmentation:
        return {"polygons": segmentation}
    box = annotation.get("bbox")
    if isinstance(box, list) and len(box) == 4 and all(_is_number(v) for v in box):
        x, y, width, height = box
        return {"box": [x, y, x + width, y + height]}
    raise ValueError(
        f"expected a segmentation or bbox in each annotation of {name}, got {str(annotation)[:80]}"
    )


def score_of(entry) -> float | None:
    """Returns an entry's score, or what SAM says for one; None where it says nothing."""
    if not isinstance(entry, dict):
        return None
    score = entry.get("score", entry.get("predicted_iou"))
    return float(score) if _is_number(score) else None


def label_of(entry) -> str | None:
    """Returns an entry's label, where it has one."""
    label = entry.get("label") if isinstance(entry, dict) else None
    return label if isinstance(label, str) else None


def _is_id(value) -> bool:
    return isinstance(value, (int, str)) and not isinstance(value, bool)


def _is_number(value) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
