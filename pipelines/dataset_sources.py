"""Finds what there is to caption, and reads it: each source makes rows of the same form.

A source lists rows, each with an id that is the same whenever the source is listed, and what is
needed to open it; `open` reads an image's region masks, and its bytes where they are wanted.
Listing is cheap and opening is not, so what was done before is left out in between.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from ..common.json_text import parse_json
from ..image_masks import encode_rle
from ..regions.coco import annotation_mask, segment_ids
from ..regions.files import IMAGE_SUFFIXES, ImageSource, open_image, open_mask_file
from ..regions.sources import gather_regions, open_sources
from . import places

NO_REGIONS = "no regions"  # the kind of what is no fault of anybody's
MASK = "mask"  # the kind of what concerns one region of an image, not all


@dataclass
class Problem:
    """Says why an image, or one of its regions, has no caption."""

    kind: str
    reason: str
    region: int | None = None


@dataclass
class Opened:
    """Holds one image with its regions, not yet decoded.

    Attributes:
        image: what the output calls the image.
        location: where it lies; None where `data` has it.
        data: its bytes.
        masks: of its regions, as JSON has them and `load_mask` takes them; None: to be found.
        labels: what the source calls each region.
        problems: of regions that are left out.
    """

    image: str
    location: str | None = None
    data: bytes | None = None
    masks: list | None = None
    labels: list[str | None] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)


class Source:
    """Where images come from.

    Attributes:
        kind: what it is, for messages and the manifest.
        place: where it is.
        has_bytes: whether its images are bytes in other files, without a path of their own.
    """

    kind: str
    place: str
    has_bytes = False

    def parts(self, size: int) -> list:
        """Divides the source into parts that are listed by themselves, of some `size` rows where
        it knows them."""
        raise NotImplementedError

    def rows(self, part) -> Iterator[dict]:
        """Yields id, entry (ready for JSON) and data of each row of a part."""
        raise NotImplementedError

    def open(self, entry: dict, data: bytes | None) -> Opened:
        """Opens a row; raises anything for one that is broken."""
        raise NotImplementedError

    def __len__(self) -> int:
        """Counts its rows; TypeError where it does not know them."""
        raise TypeError(f"a source of {self.kind} does not know its rows")

    def identity(self) -> dict:
        """Returns what makes another run's source the same."""
        return {"kind": self.kind, "place": self.place}


class Listed(Source):
    """A source whose rows are known from the beginning: pairs of an id and an entry."""

    def __init__(self, place: str, items: list[tuple[str, dict]]):
        self.place, self.items = place, items

    def __getstate__(self) -> dict:
        return {**vars(self), "items": []}  # the parts carry them

    def __len__(self) -> int:
        return len(self.items)

    def parts(self, size: int) -> list:
        return [self.items[i : i + size] for i in range(0, len(self.items), size)]

    def rows(self, part) -> Iterator[dict]:
        for key, entry in part:
            yield {"id": key, "entry": entry, "data": None}


class ImageFolder(Listed):
    """Images, and region masks by the rules of `perceptiondlm caption`; or none, to be found."""

    kind = "images"

    def __init__(self, place: str, files: list[str], root: str, masks: Sequence[str] = ()):
        self.root, self.mask_places = root, [places.absolute(mask) for mask in masks]
        names = [relative(file, root) for file in files]
        items = [(n, {"file": f}) for n, f in zip(names, files, strict=True)]
        super().__init__(place, items)

        self.sources = None
        if masks:
            if any(places.local_of(file) is None for file in files[:1]):
                raise ValueError(f"expected local images with --masks, got those of {place}")
            sources = [ImageSource(file, named=False) for file in files]
            self.sources = open_sources(list(masks), sources)

    def open(self, entry: dict, data: bytes | None) -> Opened:
        opened = Opened(relative(entry["file"], self.root), entry["file"])
        if self.sources is None:
            return opened
        size = open_image(entry["file"]).size
        refused: list[str] = []
        source = ImageSource(entry["file"], named=False)
        regions = gather_regions(self.sources, source, size, refused=refused)
        opened.masks = [encode_rle(region.opened(size).mask) for region in regions]
        opened.labels = [region.label for region in regions]
        opened.problems = [Problem(MASK, reason) for reason in refused]
        return opened

    def identity(self) -> dict:
        return {**super().identity(), "masks": self.mask_places}


class Sa1bFolder(Listed):
    """SA-1B: `sa_1.jpg` beside `sa_1.json`."""

    kind = "SA-1B"

    def __init__(self, place: str, files: list[str], root: str):
        self.root = root
        found = [file for file in files if PurePosixPath(file).suffix == ".json"]
        super().__init__(place, [(relative(f, root), {"file": f}) for f in found])

    def open(self, entry: dict, data: bytes | None) -> Opened:
        content = parse_json(places.read_place(entry["file"]), entry["file"])
        folder = entry["file"].rsplit("/", 1)[0]
        location = places.inside(folder, content["image"]["file_name"])
        opened = Opened(relative(location, self.root), location)
        add_masks(opened, content["annotations"], entry["file"])
        return opened


class CocoAnnotations(Listed):
    """A COCO file: a row for each image, with its annotations."""

    kind = "COCO"

    def __init__(self, place: str, content: dict, root: str):
        self.root = root
        self.names = {c["id"]: c.get("name") for c in _dicts(content.get("categories"), "id")}
        own: dict[Any, list[dict]] = {}
        for annotation in _dicts(content["annotations"], "image_id"):
            own.setdefault(annotation["image_id"], []).append(self._needed(annotation))
        images = content["images"]
        super().__init__(place, [])
        for number, image in enumerate(images):
            values = image if isinstance(image, dict) else {}
            entry = {"image": values.get("file_name"), "annotations": own.pop(values.get("id"), [])}
            self.items.append((f"{number}:{values.get('id')}", entry))
        for key, annotations in own.items():  # that belong to no image, and are not to go unseen
            entry = {"image": None, "annotations": annotations}
            self.items.append((f"image_id {key}", entry))

    def _needed(self, annotation: dict) -> dict:
        names = ("segmentation", "bbox", "category_id", "iscrowd")
        return {name: annotation[name] for name in names if name in annotation}

    def open(self, entry: dict, data: bytes | None) -> Opened:
        if entry["image"] is None:
            raise ValueError("expected an image with a file_name for annotations, got none")
        opened = Opened(entry["image"], places.inside(self.root, entry["image"]))
        labels = [self.names.get(each.get("category_id")) for each in entry["annotations"]]
        add_masks(opened, entry["annotations"], self.place, labels)
        return opened

    def identity(self) -> dict:
        return {**super().identity(), "images": self.root}


class PanopticAnnotations(CocoAnnotations):
    """COCO's panoptic form, also COCONut's: a PNG of segment ids for each image."""

    kind = "COCO panoptic"

    def __init__(self, place: str, content: dict, root: str, folder: str):
        self.folder = folder
        super().__init__(place, content, root)

    def _needed(self, annotation: dict) -> dict:
        return {name: annotation.get(name) for name in ("file_name", "segments_info")}

    def open(self, entry: dict, data: bytes | None) -> Opened:
        if entry["image"] is None:
            raise ValueError("expected an image with a file_name for annotations, got none")
        opened = Opened(entry["image"], places.inside(self.root, entry["image"]), masks=[])
        for annotation in entry["annotations"]:
            file = Path(places.inside(self.folder, annotation["file_name"]))
            ids = segment_ids(open_mask_file(file), file.name)
            for segment in annotation["segments_info"]:
                mask = ids == segment["id"]
                opened.masks.append(encode_rle(mask))
                opened.labels.append(self.names.get(segment.get("category_id")))
        return opened


def _dicts(values, name: str) -> Iterator[dict]:
    if not isinstance(values or [], list):
        raise ValueError(f"expected lists in a COCO file, got {type(values).__name__}")
    for value in values or []:
        if isinstance(value, dict) and isinstance(value.get(name), (int, str)):
            yield value


def add_masks(opened: Opened, entries: list, name: str, labels: Sequence | None = None):
    """Adds the masks of annotations or of a list of masks; broken ones are named, one by one."""
    if not isinstance(entries, list):
        raise ValueError(f"expected a list of masks in {name}, got {type(entries).__name__}")
    opened.masks = []
    for number, entry in enumerate(entries):
        try:
            if isinstance(entry, dict) and isinstance(entry.get("counts"), bytes):
                entry = {**entry, "counts": entry["counts"].decode("ascii")}
            opened.masks.append(annotation_mask(entry, name))
        except ValueError as error:
            opened.problems.append(Problem(MASK, str(error), number))
            opened.masks.append(None)
    opened.labels = list(labels) if labels else [None] * len(entries)


def relative(file: str, root: str) -> str:
    """Returns a file's name below a folder, with slashes."""
    return file[len(root) :].lstrip("/") if file.startswith(root) else file


def is_image(file: str) -> bool:
    """Tells by its name whether a file is an image."""
    return PurePosixPath(file).suffix.lower() in IMAGE_SUFFIXES


def count_rows(sources: Sequence[Source]) -> int | None:
    """Counts the rows of all sources; None where one does not know."""
    try:
        return sum(len(source) for source in sources)
    except TypeError:
        return None
