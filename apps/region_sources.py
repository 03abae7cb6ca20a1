"""Which regions a picture has: masks by name, label maps, COCO and SAM annotations, shapes.

A source's `regions(picture, size)` lists the regions of a picture of (width, height); names inside
annotation files are compared with the picture's, never opened.
"""

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from ..image_processing_perceptiondlm import load_mask
from .inputs import (
    MASK_SUFFIXES,
    PictureSource,
    RegionSource,
    annotation_mask,
    is_plain_name,
    open_mask_file,
    read_annotations,
)

MAX_REGIONS = 1000  # of one picture
MAX_MASK_PIXELS = 3_000_000_000  # a byte each, all masks of a picture together


class MaskFiles:
    """Mask pictures given one by one: the regions of the one picture there is."""

    def __init__(self, paths: Sequence[Path]):
        self.paths = paths

    def regions(self, picture: PictureSource, size: tuple[int, int]) -> list[RegionSource]:
        return [RegionSource(_sized(open_mask_file(p), size, p), p.name) for p in self.paths]


class MaskFolder:
    """A folder of mask pictures by name: for `cat.jpg`, `cat.png`, `cat_0.png`, `cat_mask_1.png`,
    `cat-2.png` or everything in a folder `cat/`, in natural order."""

    SUFFIX = re.compile(r"([_.-]?(mask|region|segment|object|instance)s?)?([_.-]?\d+)?", re.I)

    def __init__(self, folder: Path, pictures: Sequence[PictureSource]):
        self.folder = folder
        self.files: dict[str, list[Path]] = {picture.stem: [] for picture in pictures}
        stems = sorted(self.files, key=len, reverse=True)  # cat_2_0 is of cat_2 if there is one
        own_files = {Path(picture.path).resolve() for picture in pictures}
        for file in sorted(folder.iterdir(), key=natural_order):
            if _is_mask_file(file) and file.resolve() not in own_files:
                owner = next((s for s in stems if self._belongs(file.stem, s)), None)
                if owner is not None:
                    self.files[owner].append(file)
        for stem in stems:
            own = folder / stem
            if own.is_dir():
                self.files[stem] += sorted(filter(_is_mask_file, own.iterdir()), key=natural_order)

    def _belongs(self, name: str, stem: str) -> bool:
        return name.startswith(stem) and bool(self.SUFFIX.fullmatch(name[len(stem) :]))

    def regions(self, picture: PictureSource, size: tuple[int, int]) -> list[RegionSource]:
        files = self.files[picture.stem]
        return [RegionSource(_sized(open_mask_file(f), size, f), f.name) for f in files]


class LabelMaps:
    """Pictures in which every colour or value but black (zero) is a region of its own: one file
    for the one picture there is, or a folder with a map of each picture's name."""

    def __init__(self, path: Path):
        self.path = path

    def regions(self, picture: PictureSource, size: tuple[int, int]) -> list[RegionSource]:
        path = self.path
        if path.is_dir():
            files = [f for f in path.iterdir() if f.stem == picture.stem and _is_mask_file(f)]
            if not files:
                return []
            path = files[0]
        return split_labels(_sized(open_mask_file(path), size, path), path.name)


class CocoFile:
    """A COCO file: regions by the picture's name, which is compared and never opened."""

    def __init__(self, path: Path, content: dict):
        self.name = path.name
        images, annotations = content["images"], content["annotations"]
        if not isinstance(images, list) or not isinstance(annotations, list):
            raise ValueError(f"expected lists of images and annotations in {path}")
        self.categories = {
            category["id"]: category.get("name")
            for category in content.get("categories") or []
            if isinstance(category, dict) and "id" in category
        }
        self.refused: list[str] = []
        self.ids: dict[str, object] = {}
        for image in images:
            self._index(image)
        self.annotations: dict[object, list[dict]] = {}
        for annotation in annotations:
            if not isinstance(annotation, dict) or not _is_id(annotation.get("image_id")):
                raise ValueError(f"expected annotations with an image_id in {path}")
            self.annotations.setdefault(annotation["image_id"], []).append(annotation)

    def _index(self, image):
        if not isinstance(image, dict) or not _is_id(image.get("id")):
            raise ValueError(f"expected images with an id in {self.name}, got {str(image)[:80]}")
        name = image.get("file_name")
        if not is_plain_name(name):
            self.refused.append(
                f"{self.name}: expected a file_name inside the pictures' folder, got {name!r:.120}"
            )
            return
        self.ids[name] = image["id"]

    def regions(self, picture: PictureSource, size: tuple[int, int]) -> list[RegionSource]:
        parts = Path(picture.path).parts
        names = ["/".join(parts[k:]) for k in range(len(parts))]  # the longest match first
        known = next((self.ids[name] for name in names if name in self.ids), None)
        if known is None:
            known = self._by_last_part(parts[-1])
        own = self.annotations.get(known, []) if known is not None else []
        return [
            RegionSource(
                annotation_mask(annotation, self.name),
                f"{self.name}#{annotation.get('id', k)}",
                self._origin(annotation),
            )
            for k, annotation in enumerate(own)
        ]

    def _by_last_part(self, name: str):
        matches = [i for known, i in self.ids.items() if known.rsplit("/", 1)[-1] == name]
        if len(matches) > 1:
            raise ValueError(f"expected one image {name!r} in {self.name}, got {len(matches)}")
        return matches[0] if matches else None

    def _origin(self, annotation: dict) -> dict:
        kept = {k: annotation[k] for k in ("id", "image_id", "category_id") if k in annotation}
        if annotation.get("category_id") in self.categories:
            kept["category"] = self.categories[annotation["category_id"]]
        return kept


class AnnotationList:
    """Regions of one picture: SAM's annotation file, what its mask generator returns, or a list of
    masks. It goes with the picture that it names or is named like, or the only one."""

    def __init__(self, path: Path, content, only: bool):
        self.path = path
        self.name = path.name
        self.only = only
        self.file_name = None
        if isinstance(content, dict) and "annotations" in content:
            image = content.get("image")
            self.file_name = image.get("file_name") if isinstance(image, dict) else None
            content = content["annotations"]
        if self.file_name is not None and not is_plain_name(self.file_name):
            raise ValueError(f"expected a plain file_name in {path}, got {self.file_name!r:.120}")
        self.items = content if isinstance(content, list) else [content]

    def regions(self, picture: PictureSource, size: tuple[int, int]) -> list[RegionSource]:
        named = self.file_name is not None and Path(self.file_name).name == Path(picture.path).name
        if not (self.only or named or picture.stem == self.path.stem):
            return []
        return [
            RegionSource(annotation_mask(item, self.name), f"{self.name}#{k}")
            for k, item in enumerate(self.items)
        ]


class AnnotationFolder:
    """A folder of SAM annotation files, `sa_1.json` for `sa_1.jpg`."""

    def __init__(self, folder: Path):
        self.folder = folder

    def regions(self, picture: PictureSource, size: tuple[int, int]) -> list[RegionSource]:
        path = self.folder / f"{picture.stem}.json"
        if not path.is_file():
            return []
        return AnnotationList(path, read_annotations(path), only=False).regions(picture, size)


class Shapes:
    """Boxes and polygons from the command line, the same for every picture."""

    def __init__(self, shapes: Sequence[dict]):
        self.shapes = shapes

    def regions(self, picture: PictureSource, size: tuple[int, int]) -> list[RegionSource]:
        return [RegionSource(s, f"{next(iter(s))} {k + 1}") for k, s in enumerate(self.shapes)]


def open_sources(masks: Sequence[str], pictures: Sequence[PictureSource]) -> list:
    """Recognises what each path of masks is.

    Raises ValueError for what is none of the known kinds and FileNotFoundError for no file.
    """
    sources, files = [], []
    only = len(pictures) == 1
    for path in map(Path, masks):
        if path.is_dir():
            sources += _folder_sources(path, pictures)
        elif path.suffix.lower() == ".json":
            sources.append(_annotation_source(path, read_annotations(path), only))
        elif not path.is_file():
            raise FileNotFoundError(f"expected masks at {path}, found no file or folder")
        else:
            files.append(path)
    if files and not only:
        raise ValueError(
            f"expected a folder of masks or an annotation file for {len(pictures)} pictures, got"
            f" the mask {files[0]}, which cannot be the same in all"
        )
    return sources + ([MaskFiles(files)] if files else [])


def _folder_sources(folder: Path, pictures) -> list:
    sources = [MaskFolder(folder, pictures)]
    if any(file.suffix.lower() == ".json" for file in folder.iterdir()):
        sources.append(AnnotationFolder(folder))
    return sources


def _annotation_source(path: Path, content, only: bool):
    if isinstance(content, dict) and {"images", "annotations"} <= set(content):
        return CocoFile(path, content)
    if isinstance(content, (dict, list)) and content:
        return AnnotationList(path, content, only)
    raise ValueError(
        f"expected COCO or SAM annotations or a list of masks in {path}, got {str(content)[:80]!r}"
    )


def gather_regions(
    sources: Sequence, picture: PictureSource, size: tuple[int, int], most: int | None = None
) -> list[RegionSource]:
    """A picture's regions from all sources; with `most`, only the largest ones, in their order.

    Raises ValueError for more than `MAX_REGIONS`, or more than memory should be asked to hold.
    """
    regions = [region for source in sources for region in source.regions(picture, size)]
    if most is not None and len(regions) > most:
        regions = _largest(regions, size, most)
    _check_count(len(regions), size, picture.path)
    return regions


def _check_count(count: int, size: tuple[int, int], name: str):
    most = min(MAX_REGIONS, MAX_MASK_PIXELS // (size[0] * size[1]))
    if count > most:
        raise ValueError(
            f"expected at most {most} regions for {size[0]}x{size[1]} pixels in {name}, got {count}"
        )


def _largest(regions: list[RegionSource], size, most: int) -> list[RegionSource]:
    def area(region: RegionSource) -> int:
        return sum(load_mask(region.mask, size).histogram()[1:])

    areas = [area(region) for region in regions]
    kept = sorted(range(len(regions)), key=lambda i: -areas[i])[:most]
    return [regions[i] for i in sorted(kept)]


def split_labels(labels: Image.Image, name: str) -> list[RegionSource]:
    """A region for each value or colour of a label map but zero, black or transparent."""
    if labels.mode in ("RGBA", "LA", "PA"):
        labels = labels.convert("RGBA")
    elif labels.mode not in ("1", "L", "P", "RGB") and not labels.mode.startswith("I"):
        raise ValueError(f"expected colours or integers as labels in {name}, got {labels.mode}")
    values = np.asarray(labels)
    if values.ndim == 3:  # each colour as one integer
        opaque = values[..., 3] > 0 if values.shape[2] == 4 else True
        colours = values[..., :3].astype(np.int64) @ np.array([1 << 16, 1 << 8, 1])
        values = colours * opaque
    found = [int(v) for v in np.unique(values) if v != 0]
    _check_count(len(found), labels.size, name)  # smooth edges, say, make thousands of labels
    return [RegionSource(values == v, f"{name} label {_label_name(v, labels)}") for v in found]


def _label_name(value: int, labels: Image.Image) -> str:
    return f"#{value:06x}" if labels.mode in ("RGB", "RGBA") else str(value)


def _is_mask_file(path: Path) -> bool:
    return path.suffix.lower() in MASK_SUFFIXES and path.is_file()


def _sized(mask: Image.Image, size: tuple[int, int], path: Path) -> Image.Image:
    if mask.size != size:
        raise ValueError(
            f"expected {path.name} to have the picture's size {size[0]}x{size[1]},"
            f" got {mask.width}x{mask.height}"
        )
    return mask


def natural_order(path: Path) -> list:
    """Sorts mask_2 before mask_10."""
    parts = re.split(r"(\d+)", path.name)  # text and digits by turns
    return [int(part) if i % 2 else part.lower() for i, part in enumerate(parts)]


def _is_id(value) -> bool:
    return isinstance(value, (int, str)) and not isinstance(value, bool)
