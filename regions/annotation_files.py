"""Tells what an annotation file is by its content, and hands it to the reader of its kind."""

from pathlib import Path

from .array_files import ArrayFile
from .coco import AnnotationList, CocoFile, PanopticFile
from .cvat import CvatFile
from .files import read_annotations
from .label_studio import LabelStudioFile, is_label_studio
from .labelme import LabelMeFile
from .region_source import Source
from .yolo import YoloFile

ANNOTATION_SUFFIXES = (".json", ".xml", ".txt", ".npy", ".npz")


def open_annotations(path: Path, only: bool, threshold: float = 0.5) -> Source:
    """Opens an annotation file of any kind.

    Args:
        path: ends in one of `ANNOTATION_SUFFIXES`.
        only: whether there is one image, whose regions a file without names has.
        threshold: above which pixels of float masks are the region.

    Raises ValueError for what is none of the kinds, and FileNotFoundError for no file.
    """
    suffix = path.suffix.lower()
    if suffix == ".json":
        return open_json(path, read_annotations(path), only)
    if suffix == ".xml":
        return CvatFile(path)
    if suffix == ".txt":
        return YoloFile(path, only)
    return ArrayFile(path, only, threshold)


def open_json(path: Path, content, only: bool) -> Source:
    """Opens the content of a JSON file; `path` is what it is called, and what it is named like."""
    if isinstance(content, dict) and {"images", "annotations"} <= set(content):
        return (PanopticFile if _is_panoptic(content) else CocoFile)(path, content)
    if isinstance(content, dict) and "shapes" in content:
        return LabelMeFile(path, content, only)
    if is_label_studio(content):
        return LabelStudioFile(path, content)
    if isinstance(content, (dict, list)) and content:
        return AnnotationList(path, content, only)
    raise ValueError(
        "expected annotations of COCO, SAM, LabelMe or Label Studio, or a list of masks, in"
        f" {path}, got {str(content)[:80]!r}"
    )


def _is_panoptic(content: dict) -> bool:
    annotations = content["annotations"]
    first = annotations[0] if isinstance(annotations, list) and annotations else None
    return isinstance(first, dict) and "segments_info" in first
