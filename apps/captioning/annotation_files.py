"""Reads regions from annotation files: COCO's, SAM's, or a list of masks.

Names inside the files are compared with an image's, never opened. What is wrong with one entry is
that entry's: it is named, and the others are used.
"""

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path

from .inputs import ImageSource, RegionSource, annotation_mask, is_plain_name

Maker = tuple[str, Callable[[], RegionSource]]  # what a region is called, and what opens it


class Source:
    """Where regions come from.

    Attributes:
        refused: what is wrong with entries that belong to no image in particular.
    """

    refused: list[str] = []

    def makers(self, source: ImageSource, size: tuple[int, int]) -> Iterable[Maker]:
        """Names the regions of an image of (width, height), and opens each on demand."""
        raise NotImplementedError

    def regions(self, source: ImageSource, size: tuple[int, int]) -> list[RegionSource]:
        """Opens all regions of an image; ValueError for the first that cannot be used."""
        return [make() for _, make in self.makers(source, size)]

    def unused_note(self) -> str | None:
        """Says which masks are of none of the images, if there are any."""
        return None


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
            _expect_declared_size(image, size, self.name)
            for k, annotation in enumerate(self.annotations.get(image["id"], [])):
                origin = f"{self.name}#{annotation.get('id', k)!s:.80}"
                yield origin, partial(self._region, annotation, origin)

    def _images_of(self, source: ImageSource) -> list[dict]:
        parts = Path(source.path).parts
        names = ["/".join(parts[k:]) for k in range(len(parts))]  # the longest match first
        known = next((name for name in names if name in self.images), None)
        if known is not None:
            return self.images[known]
        matches = [name for name in self.images if name.rsplit("/", 1)[-1] == parts[-1]]
        if len(matches) > 1:
            raise ValueError(f"expected one image {parts[-1]!r} in {self.name}, got {matches}")
        return self.images[matches[0]] if matches else []

    def _region(self, annotation: dict, origin: str) -> RegionSource:
        for name in ("id", "category_id"):
            if annotation.get(name) is not None and not _is_id(annotation[name]):
                raise ValueError(f"expected {name} as a number, got {annotation[name]!r:.80}")
        if id(annotation) in self.repeated:
            raise ValueError("expected each annotation's id once, got it again")
        mask = annotation_mask(annotation, self.name)
        return RegionSource(mask, origin, self._origin(annotation))

    def _origin(self, annotation: dict) -> dict:
        names = ("id", "image_id", "category_id")
        kept = {name: annotation[name] for name in names if annotation.get(name) is not None}
        if annotation.get("category_id") in self.categories:
            kept["category"] = self.categories[annotation["category_id"]]
        return kept


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

    def makers(self, source: ImageSource, size: tuple[int, int]) -> Iterator[Maker]:
        named = self.file_name is not None and Path(self.file_name).name == Path(source.path).name
        if not (self.only or named or source.stem == self.path.stem):
            return
        _expect_declared_size(self.image, size, self.name)
        for k, item in enumerate(self.items):
            yield f"{self.name}#{k}", partial(self._region, k, item)

    def _region(self, k: int, item) -> RegionSource:
        return RegionSource(annotation_mask(item, self.name), f"{self.name}#{k}")


def _expect_declared_size(image: dict, size: tuple[int, int], name: str):
    """Refuses annotations in the pixels of an image of another size: they would lie elsewhere."""
    declared = image.get("width"), image.get("height")
    if all(type(side) is int for side in declared) and declared != size:
        raise ValueError(
            f"expected annotations of an image of {size[0]}x{size[1]} pixels in {name}, got"
            f" {declared[0]}x{declared[1]}"
        )


def _is_id(value) -> bool:
    return isinstance(value, (int, str)) and not isinstance(value, bool)
