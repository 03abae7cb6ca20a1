"""Finds an image's regions: masks by name, label maps, annotation files, shapes.

A source's `regions(image, size)` lists the regions of an image of (width, height); names inside
annotation files are compared with the image's, never opened.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from PIL import Image

from ..image_loading import is_url
from ..image_masks import turned_hint
from .annotation_files import ANNOTATION_SUFFIXES, open_annotations
from .files import IMAGE_SUFFIXES, MASK_SUFFIXES, ImageSource, open_mask_file
from .label_maps import map_or_mask, split_labels
from .region_source import Maker, RegionSource, Source, expect_count

NAMING = (
    "masks are named after their image: for cat.jpg cat.png, cat_0.png, cat_mask_1.png, cat-2.png"
    " or any name in a folder cat/"
)


class MaskFiles(Source):
    """Mask images given one by one: the regions of the one image there is."""

    def __init__(self, paths: Sequence[Path], label_map: bool | None = None):
        self.paths = paths
        self.label_map = label_map

    def makers(self, source: ImageSource, size: tuple[int, int]) -> Iterable[Maker]:
        return _mask_makers(self.paths, size, self.resize_masks, self.label_map)


class MaskFolder(Source):
    """A folder of mask images by name: for `cat.jpg`, `cat.png`, `cat_0.png`, `cat_mask_1.png`,
    `cat-2.png` or everything in a folder `cat/`, in natural order. Where there is one image, its
    masks have any names, but for those named after another image beside it.

    Attributes:
        unused: masks named after no image.
    """

    SUFFIX = re.compile(r"([_.-]?(mask|region|segment|object|instance)s?)?([_.-]?\d+)?", re.I)

    def __init__(self, folder: Path, images: Sequence[ImageSource]):
        self.folder = folder
        self.files: dict[str, list[Path]] = {source.stem: [] for source in images}
        self.lossy: dict[str, list[Path]] = {source.stem: [] for source in images}
        self.unused: list[Path] = []
        beside = _stems_beside(images, folder)
        # cat_2_0 is of cat_2 if there is one
        stems = sorted({*self.files, *(beside or ())}, key=len, reverse=True)
        own_files = {Path(source.path).resolve() for source in images if source.path}

        for file in sorted(folder.iterdir(), key=natural_order):
            if not file.is_file() or file.resolve() in own_files:
                continue
            owner = next((s for s in stems if self._belongs(file.stem, s)), None)
            if owner is None and len(self.files) == 1:
                owner = next(iter(self.files))
            if _is_mask_file(file):
                (self.unused if owner is None else self.files.get(owner, [])).append(file)
            elif beside is not None and file.suffix.lower() in IMAGE_SUFFIXES:
                self.lossy.get(owner, []).append(file)

        for stem in self.files:
            own = folder / stem
            if stem and own.is_dir():
                self.files[stem] += sorted(filter(_is_mask_file, own.iterdir()), key=natural_order)

    def _belongs(self, name: str, stem: str) -> bool:
        return name.startswith(stem) and bool(self.SUFFIX.fullmatch(name[len(stem) :]))

    def makers(self, source: ImageSource, size: tuple[int, int]) -> Iterable[Maker]:
        files, lossy = self.files[source.stem], self.lossy[source.stem]
        if lossy and not files:
            _refuse_lossy(lossy)
        return _mask_makers(files, size, self.resize_masks)

    def unused_note(self) -> str | None:
        if not self.unused:
            return None
        names = ", ".join(file.name for file in self.unused[:10])
        more = ", ..." if len(self.unused) > 10 else ""
        count = len(self.unused)
        return f"{count} masks in {self.folder} are of no image: {names}{more}; {NAMING}"


def _stems_beside(images: Sequence[ImageSource], folder: Path) -> set[str] | None:
    """Names of all images in the folders of those given; None if the masks lie there too."""
    folders = {Path(p.path).resolve().parent for p in images if p.path and not is_url(p.path)}
    if folder.resolve() in folders:
        return None
    files = [file for place in folders for file in place.iterdir()]
    return {file.stem for file in files if file.suffix.lower() in IMAGE_SUFFIXES}


def _mask_makers(
    files: Sequence[Path], size: tuple[int, int], resize: bool, label_map: bool | None = None
) -> Iterable[Maker]:
    def make(file: Path) -> list[RegionSource]:
        mask = open_mask_file(file)
        if not resize:
            _expect_size(mask, size, file)
        return map_or_mask(mask, file.name, label_map)

    return [(file.name, partial(make, file)) for file in files]


def _refuse_lossy(files: Sequence[Path]):
    names = ", ".join(file.name for file in files[:5])
    raise ValueError(f"expected masks without loss, say PNG, in {files[0].parent}, got {names}")


class LabelMaps(Source):
    """Images in which every color or value but black (zero) is a region of its own: one file
    for the one image there is, or a folder with a map of each image's name."""

    def __init__(self, path: Path):
        self.path = path

    def makers(self, source: ImageSource, size: tuple[int, int]) -> Iterable[Maker]:
        path = self._map_of(source.stem) if self.path.is_dir() else self.path
        if path is None:
            return []
        labels = open_mask_file(path)
        if not self.resize_masks:
            _expect_size(labels, size, path)
        regions = split_labels(labels, path.name)
        return [(region.origin, partial(_itself, region)) for region in regions]

    def _map_of(self, stem: str) -> Path | None:
        files = [file for file in self.path.iterdir() if file.stem == stem and file.is_file()]
        maps = sorted(filter(_is_mask_file, files))
        if len(maps) > 1:
            names = ", ".join(file.name for file in maps)
            raise ValueError(f"expected one label map for {stem!r} in {self.path}, got {names}")
        lossy = [file for file in files if file.suffix.lower() in IMAGE_SUFFIXES]
        if lossy and not maps:
            _refuse_lossy(lossy)
        return maps[0] if maps else None


def _itself(region: RegionSource) -> list[RegionSource]:
    return [region]


class AnnotationFolder(Source):
    """A folder of annotation files, a file for each image: `sa_1.json` for `sa_1.jpg`."""

    def __init__(self, folder: Path, threshold: float = 0.5):
        self.folder = folder
        self.threshold = threshold

    def makers(self, source: ImageSource, size: tuple[int, int]) -> Iterator[Maker]:
        for suffix in ANNOTATION_SUFFIXES if source.stem else ():
            path = self.folder / f"{source.stem}{suffix}"
            if path.is_file():
                opened = open_annotations(path, only=False, threshold=self.threshold)
                opened.resize_masks = self.resize_masks
                yield from opened.makers(source, size)


class Shapes(Source):
    """Boxes and polygons from the command line, the same for every image."""

    def __init__(self, shapes: Sequence[dict]):
        self.shapes = shapes

    def makers(self, source: ImageSource, size: tuple[int, int]) -> Iterable[Maker]:
        regions = [RegionSource(s, f"{next(iter(s))} {k + 1}") for k, s in enumerate(self.shapes)]
        return [(region.origin, partial(_itself, region)) for region in regions]


def open_sources(
    masks: Sequence[str],
    images: Sequence[ImageSource],
    *,
    resize_masks: bool = False,
    threshold: float = 0.5,
    label_map: bool | None = None,
) -> list[Source]:
    """Recognizes what each path of masks is.

    `resize_masks`, `threshold` and `label_map` are as for `load_regions`.

    Raises ValueError for what is none of the known kinds and FileNotFoundError for no file.
    """
    sources, files = [], []
    only = len(images) == 1
    for path in map(Path, masks):
        if path.is_dir():
            sources += _folder_sources(path, images, threshold, label_map)
        elif not path.is_file():
            raise FileNotFoundError(f"expected masks at {path}, found no file or folder")
        elif path.suffix.lower() in ANNOTATION_SUFFIXES:
            sources.append(open_annotations(path, only, threshold))
        else:
            files.append(path)

    if files and not only:
        raise ValueError(
            f"expected a folder of masks or an annotation file for {len(images)} images, got"
            f" the mask {files[0]}, which cannot be the same in all"
        )
    sources += [MaskFiles(files, label_map)] if files else []
    for source in sources:
        source.resize_masks = resize_masks
    return sources


def _folder_sources(folder: Path, images, threshold: float, label_map: bool | None) -> list[Source]:
    if label_map:
        return [LabelMaps(folder)]
    sources: list[Source] = [MaskFolder(folder, images)]
    if any(file.suffix.lower() in ANNOTATION_SUFFIXES for file in folder.iterdir()):
        sources.append(AnnotationFolder(folder, threshold))
    return sources


def gather_regions(
    sources: Sequence,
    source: ImageSource,
    size: tuple[int, int],
    max_regions: int | None = None,
    refused: list[str] | None = None,
    resize_masks: bool = False,
) -> list[RegionSource]:
    """Gathers an image's regions from all sources; at most the `max_regions` largest, in order.

    A region that cannot be used raises ValueError; or, given a list, what is wrong with it goes
    to `refused`, and the others are returned. Raises ValueError for more than `MAX_REGIONS`, or
    more than memory should be asked to hold.
    """
    makers: list[Maker] = []
    for each in sources:
        with _refusing(refused):
            makers += each.makers(source, size)
    if max_regions is None:
        expect_count(len(makers), size, source.path)

    regions, areas = [], []
    for origin, make in makers:
        with _refusing(refused, f"{origin}: "):
            for region in make():
                areas.append(region.opened(size, resize_masks).area)
                regions.append(region)

    if max_regions is not None and len(regions) > max_regions:
        kept = sorted(range(len(regions)), key=lambda i: -areas[i])[:max_regions]
        regions = [regions[i] for i in sorted(kept)]
    expect_count(len(regions), size, source.path)
    return regions


@contextmanager
def _refusing(refused: list[str] | None, name: str = ""):
    """Notes what is wrong with a region, or a source, where there is a list for it."""
    try:
        yield
    except (ValueError, OSError) as error:
        if refused is None:
            raise
        refused.append(f"{name}{error}")


def _is_mask_file(path: Path) -> bool:
    return path.suffix.lower() in MASK_SUFFIXES and path.is_file()


def _expect_size(mask: Image.Image, size: tuple[int, int], path: Path):
    if mask.size != size:
        raise ValueError(
            f"expected {path.name} to have the image's size {size[0]}x{size[1]},"
            f" got {mask.width}x{mask.height}{turned_hint(mask.size, size)}"
        )


def natural_order(path: Path) -> list:
    """Sorts mask_2 before mask_10."""
    parts = re.split(r"(\d+)", path.name)  # text and digits by turns
    return [int(part) if i % 2 else part.lower() for i, part in enumerate(parts)]
