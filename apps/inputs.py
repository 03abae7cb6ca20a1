"""What to caption: pictures, and the regions of each, from files that nobody vouches for.

Every reader here checks sizes before it decodes and raises ValueError (or FileNotFoundError) with
one line that names the file. A picture's path is only ever one that the user gave: names inside
annotation files are compared with it, never opened.
"""

import glob
import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath, PureWindowsPath

import numpy as np
from PIL import Image

from ..image_processing_perceptiondlm import load_image

PICTURE_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF")
PICTURE_SUFFIXES = frozenset(
    ".png .jpg .jpeg .webp .gif .bmp .tif .tiff .ppm .pgm .avif".split()
)
MASK_FORMATS = ("PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")  # JPEG would blur a mask's edge
MASK_SUFFIXES = frozenset(".png .webp .gif .bmp .tif .tiff .pgm".split())

MAX_PIXELS = 80_000_000
MAX_PICTURE_BYTES = 256 << 20
MAX_JSON_BYTES = 512 << 20
MAX_REGIONS = 1000  # of one picture
MAX_MASK_PIXELS = 3_000_000_000  # a byte each, all masks of a picture together
DOWNLOAD_SECONDS = 30


@dataclass(frozen=True)
class RegionSource:
    """A mask, as `load_mask` takes it, and where it comes from.

    `annotation` holds the ids that a COCO file gives: `id`, `image_id`, `category_id`, and the
    category's name.
    """

    mask: object
    origin: str
    annotation: dict = field(default_factory=dict)


@dataclass(frozen=True)
class PictureSource:
    """A picture to open; `named` when the user wrote its very name, not a folder or pattern."""

    path: str
    named: bool

    @property
    def stem(self) -> str:
        """The file's name without its suffix."""
        return PurePosixPath(self.path).stem if is_url(self.path) else Path(self.path).stem


def is_url(path: str) -> bool:
    """Whether a picture is to be fetched from the web."""
    return path.startswith(("http://", "https://"))


def find_pictures(arguments: Sequence[str], recursive: bool = False) -> list[PictureSource]:
    """Files, folders, patterns and URLs as pictures, each once, in order.

    Raises FileNotFoundError for an argument that names nothing.
    """
    found: dict[str, PictureSource] = {}
    for argument in arguments:
        for picture in _expand(argument, recursive):
            found.setdefault(picture.path, picture)
    return list(found.values())


def _expand(argument: str, recursive: bool) -> list[PictureSource]:
    path = Path(argument)
    if is_url(argument) or path.is_file():
        return [PictureSource(argument, named=True)]
    if path.is_dir():
        files = path.rglob("*") if recursive else path.iterdir()
        origin = "folder"
    else:
        files = map(Path, glob.glob(argument, recursive=True))
        origin = "pattern" if glob.has_magic(argument) else "file or folder"
    pictures = sorted(f for f in files if f.suffix.lower() in PICTURE_SUFFIXES and f.is_file())
    if not pictures:
        what = "expected pictures in the" if origin == "folder" else "expected pictures for the"
        raise FileNotFoundError(f"{what} {origin} {argument!r}, found none")
    return [PictureSource(str(f), named=False) for f in pictures]


# Reading one file, checked before it is decoded.


def open_picture(path: str) -> Image.Image:
    """A picture as upright RGB, from a file or URL."""
    if is_url(path):
        return load_image(_open_checked(_download(path), path, PICTURE_FORMATS))
    _check_file(Path(path), MAX_PICTURE_BYTES, "picture")
    return load_image(_open_checked(path, path, PICTURE_FORMATS))


def open_mask_file(path: Path) -> Image.Image:
    """A mask or label map as stored, not yet converted."""
    if path.suffix.lower() in (".jpg", ".jpeg"):
        raise ValueError(f"expected a mask without loss, say PNG, got the JPEG file {path}")
    _check_file(path, MAX_PICTURE_BYTES, "mask")
    mask = _open_checked(path, str(path), MASK_FORMATS)
    try:
        mask.load()
    except (OSError, SyntaxError, ValueError) as error:
        raise ValueError(f"expected a readable mask in {path}, got: {error}") from error
    return mask


def _open_checked(source, name: str, formats: Sequence[str]) -> Image.Image:
    Image.init()
    formats = [kind for kind in formats if kind in Image.OPEN]  # AVIF is not in every Pillow
    try:
        picture = Image.open(source, formats=formats)
    except Image.DecompressionBombError as error:
        raise ValueError(f"expected {MAX_PIXELS:,} pixels at most in {name}: {error}") from error
    except (OSError, SyntaxError, ValueError) as error:
        kinds = ", ".join(formats)
        raise ValueError(f"expected a picture ({kinds}) in {name}, got something else") from error
    if picture.width * picture.height > MAX_PIXELS:
        raise ValueError(
            f"expected {MAX_PIXELS:,} pixels at most in {name},"
            f" got {picture.width}x{picture.height}"
        )
    return picture


def _check_file(path: Path, most: int, kind: str):
    if not path.is_file():  # nor a device or pipe
        raise FileNotFoundError(f"expected a {kind} file at {path}, found none")
    if (size := path.stat().st_size) > most:
        raise ValueError(f"expected a {kind} of at most {most >> 20} MiB in {path}, got {size >> 20}")


def _download(url: str):
    """The bytes behind a URL, as a file, no more of them than a picture may have."""
    import io

    from huggingface_hub.utils import get_session

    data = io.BytesIO()
    try:
        with get_session().stream(
            "GET", url, timeout=DOWNLOAD_SECONDS, follow_redirects=True
        ) as response:
            response.raise_for_status()
            for chunk in response.iter_bytes():
                data.write(chunk)
                if data.tell() > MAX_PICTURE_BYTES:
                    raise ValueError(f"expected at most {MAX_PICTURE_BYTES >> 20} MiB from {url}")
    except ValueError:
        raise
    except Exception as error:  # whichever HTTP client the Hub's library uses has its own errors
        raise ValueError(f"expected a picture from {url}, got: {error}") from error
    data.seek(0)
    return data


def read_annotations(path: Path):
    """The content of a JSON file."""
    _check_file(path, MAX_JSON_BYTES, "JSON")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"expected JSON in {path}, got: {error}") from error


# Where regions come from: `regions(picture, size)` lists those of a picture of (width, height).


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
            raise ValueError(
                f"expected a plain file_name in {path}, got {self.file_name!r:.120}"
            )
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
    from ..image_processing_perceptiondlm import load_mask

    def area(region: RegionSource) -> int:
        return sum(load_mask(region.mask, size).histogram()[1:])

    areas = [area(region) for region in regions]
    kept = sorted(range(len(regions)), key=lambda i: -areas[i])[:most]
    return [regions[i] for i in sorted(kept)]


def annotation_mask(annotation, name: str):
    """The mask, as `load_mask` takes it, of a COCO or SAM annotation or of a plain mask."""
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


def split_labels(labels: Image.Image, name: str) -> list[RegionSource]:
    """A region for each value or colour of a label map but zero, black or transparent."""
    if labels.mode in ("RGBA", "LA", "PA"):
        labels = labels.convert("RGBA")
    elif labels.mode not in ("1", "L", "P", "RGB") and not labels.mode.startswith("I"):
        raise ValueError(f"expected a label map of colours or integers in {name}, got {labels.mode}")
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


def is_plain_name(name) -> bool:
    """Whether a file name from an annotation file stays below the folder it is looked up in."""
    if not isinstance(name, str) or not name or "\0" in name or "\\" in name:
        return False
    if PurePosixPath(name).is_absolute() or PureWindowsPath(name).drive:
        return False
    return ".." not in PurePosixPath(name).parts


def natural_order(path: Path) -> list:
    """Sorts mask_2 before mask_10."""
    parts = re.split(r"(\d+)", path.name)  # text and digits by turns
    return [int(part) if i % 2 else part.lower() for i, part in enumerate(parts)]


def _is_id(value) -> bool:
    return isinstance(value, (int, str)) and not isinstance(value, bool)


def _is_number(value) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
