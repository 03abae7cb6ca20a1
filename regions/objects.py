"""Reads regions from what segmenters return, known by their attributes and keys.

No package of theirs is imported: what has the attributes of `supervision.Detections` is read so.
"""

from collections.abc import Mapping

import numpy as np
from PIL import Image

from ..image_masks import expect_size, is_box
from .arrays import is_array, regions_of_array, to_array
from .coco import annotation_mask, label_of, score_of
from .label_maps import map_or_mask
from .region_mask import RegionMask
from .region_source import RegionSource, expect_count

ONE_REGION = ({"box"}, {"polygons"})  # keys of what `load_mask` takes


def regions_of_object(
    value, size: tuple[int, int], threshold: float = 0.5, label_map: bool | None = None
) -> list[RegionSource]:
    """Returns the regions of a value in memory, for an image of (width, height).

    Raises ValueError for what is none of the known kinds.
    """
    if isinstance(value, Image.Image):
        return map_or_mask(value, "image", label_map)
    if is_array(value):
        return regions_of_array(value, size, threshold=threshold, label_map=label_map)

    # Results of detectors are known by their attributes: no package of theirs is imported.
    if hasattr(value, "orig_shape") and hasattr(value, "boxes"):
        return _ultralytics(value, size)
    if hasattr(value, "xyxy") and hasattr(value, "confidence"):
        return _detections(value, size)

    if isinstance(value, Mapping):
        return _mapping(value, size, threshold)
    if isinstance(value, tuple) and _is_prediction(value):
        return regions_of_array(value[0], size, threshold=threshold, scores=value[1], name="masks")
    if isinstance(value, (list, tuple)):
        return _each(value, size, threshold)
    return [_one(value, 0, size, threshold)]


def _ultralytics(result, size: tuple[int, int]) -> list[RegionSource]:
    """Reads ultralytics' `Results` of one image: masks where it has them, boxes else.

    Its masks are of the network's size unless asked for otherwise; its outlines are in the image's.
    """
    expect_size(tuple(result.orig_shape)[::-1], size, "results")
    boxes, masks, names = result.boxes, result.masks, result.names
    scores = labels = None
    if boxes is not None:
        scores = boxes.conf
        labels = [names[int(number)] for number in to_array(boxes.cls)]

    if masks is None:
        if boxes is None:
            raise ValueError("expected boxes or masks in ultralytics' results, got neither")
        shapes = [{"box": box} for box in to_array(boxes.xyxy).tolist()]
    elif tuple(masks.data.shape[1:]) == tuple(result.orig_shape):
        shapes = list(to_array(masks.data) > 0)
    else:
        shapes = [{"polygons": [to_array(outline).ravel().tolist()]} for outline in masks.xy]
    return _together(shapes, size, scores, labels, "result")


def _detections(found, size: tuple[int, int]) -> list[RegionSource]:
    """Reads supervision's `Detections`: masks where it has them, boxes (x0, y0, x1, y1) else."""
    names = (getattr(found, "data", None) or {}).get("class_name")
    class_ids = getattr(found, "class_id", None)
    labels = names if names is not None else class_ids
    masks = getattr(found, "mask", None)
    if masks is None:
        shapes = [{"box": box} for box in to_array(found.xyxy).tolist()]
    else:
        shapes = list(np.asarray(masks).astype(bool))
    return _together(shapes, size, found.confidence, labels, "detection")


def _mapping(value: Mapping, size: tuple[int, int], threshold: float) -> list[RegionSource]:
    """Reads a dict: of masks and scores, of a transformers processor, or one region."""
    if "segments_info" in value:
        return _segments(value, size)
    for name in ("masks", "boxes"):
        if name in value and set(value) not in ONE_REGION:
            given, scores = value[name], value.get("scores", value.get("iou_scores"))
            labels = value.get("labels", value.get("text_labels"))
            labels = to_array(labels).tolist() if is_array(labels) else labels
            stack = given if is_array(given) else _stacked(given)
            options = {"scores": scores, "labels": labels, "name": name}
            if name == "boxes" and (stack.ndim != 2 or stack.shape[1] != 4):
                raise ValueError(f"expected boxes (N, 4), got {tuple(stack.shape)}")
            return regions_of_array(stack, size, threshold=threshold, **options)
    return [_one(value, 0, size, threshold)]


def _stacked(masks) -> np.ndarray:
    """Stacks a list of masks of one size, as transformers' mask generation gives them."""
    arrays = [to_array(mask) for mask in masks]
    if len({array.shape for array in arrays}) != 1:
        shapes = sorted({array.shape for array in arrays})[:3]
        raise ValueError(f"expected masks of one shape, got {shapes or 'none'}")
    return np.stack(arrays)


def _segments(value: Mapping, size: tuple[int, int]) -> list[RegionSource]:
    """Reads what `post_process_panoptic_segmentation`, or of instances, returns for an image."""
    infos, segmentation = value["segments_info"], value.get("segmentation")
    if not is_array(segmentation) or not isinstance(infos, (list, tuple)):
        raise ValueError(
            "expected `segmentation` (H, W) and a list `segments_info`, got"
            f" {type(segmentation).__name__} and {type(infos).__name__}"
        )
    ids = to_array(segmentation)
    if ids.ndim == 3 and len(ids) != len(infos):
        raise ValueError(f"expected {len(infos)} maps for `segments_info`, got {len(ids)}")
    masks = list(ids > 0) if ids.ndim == 3 else [ids == info["id"] for info in infos]
    labels = [info.get("label", info.get("label_id")) for info in infos]
    return _together(masks, size, [info.get("score") for info in infos], labels, "segment")


def _together(shapes: list, size, scores, labels, name: str) -> list[RegionSource]:
    """Puts masks, scores and labels together, one of each for a region."""
    expect_count(len(shapes), size, f"{name}s")
    scores = [None] * len(shapes) if scores is None else list(scores)
    labels = [None] * len(shapes) if labels is None else list(labels)
    if not len(shapes) == len(scores) == len(labels):
        counts = f"{len(scores)} scores and {len(labels)} labels"
        raise ValueError(f"expected one for each of {len(shapes)} {name}s, got {counts}")

    return [
        RegionSource(
            shape,
            f"{name} {k}",
            label=None if label is None else str(label),
            score=None if score is None else float(score),
        )
        for k, (shape, score, label) in enumerate(zip(shapes, scores, labels, strict=True))
    ]


def _is_prediction(value: tuple) -> bool:
    """Tells whether a tuple is SAM's masks (N, H, W), scores (N) and perhaps logits."""
    if len(value) not in (2, 3) or not all(map(is_array, value)):
        return False
    return value[0].ndim in (3, 4) and value[1].ndim in (1, 2) and len(value[0]) == len(value[1])


def _each(values, size: tuple[int, int], threshold: float) -> list[RegionSource]:
    """Reads a list of regions; four plain numbers are one box."""
    if is_box(values):
        return [RegionSource(list(values), "box")]
    if len(values) == 1 and hasattr(values[0], "orig_shape"):
        return _ultralytics(values[0], size)
    if any(hasattr(value, "orig_shape") or hasattr(value, "xyxy") for value in values):
        raise ValueError(
            f"expected the results of one image, got a list of {len(values)}: give one, say"
            " results[0]"
        )
    expect_count(len(values), size, "the list")
    return [_one(value, k, size, threshold) for k, value in enumerate(values)]


def _one(value, k: int, size: tuple[int, int], threshold: float) -> RegionSource:
    """Reads one region: what `load_mask` takes, or a dict of a mask and what is said about it."""
    origin = f"region {k}"
    if isinstance(value, RegionSource):
        return value
    if isinstance(value, RegionMask):
        return RegionSource(value.mask, value.origin or origin, {}, value.label, value.score)
    if is_array(value):
        return _only(regions_of_array(value, size, threshold=threshold, name=origin), origin)
    if not isinstance(value, Mapping):
        return RegionSource(value, origin)

    mask = value.get("mask", value.get("segmentation"))
    if is_array(mask):
        mask = _only(regions_of_array(mask, size, threshold=threshold, name=origin), origin).mask
    elif not isinstance(mask, Image.Image):
        mask = annotation_mask(dict(value), origin)
    return RegionSource(mask, origin, label=label_of(value), score=score_of(value))


def _only(found: list[RegionSource], origin: str) -> RegionSource:
    """Returns the one region of an array in a list."""
    if len(found) != 1:
        raise ValueError(f"expected one region, got {len(found)} in {origin} of a list")
    return found[0]
