"""Whatever a user throws at the processor: valid inputs or a ValueError, nothing else."""

import io
import warnings

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from perceptiondlm.image_loading import load_image, load_mask
from perceptiondlm.image_processing_perceptiondlm import (
    choose_canvas,
    choose_grid,
)
from perceptiondlm.image_tiling import anyres_map_size
from PIL import Image
from pycocotools import mask as coco

# Fixed examples: a run either passes everywhere or fails everywhere.
THROW = settings(
    max_examples=100,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
MODES = [
    "1",
    "L",
    "LA",
    "La",
    "P",
    "PA",
    "RGB",
    "RGBA",
    "RGBa",
    "RGBX",
    "CMYK",
    "YCbCr",
    "HSV",
    "LAB",
    "I",
    "F",
    "I;16",
    "I;16B",
    "I;16L",
]
SIDES = st.one_of(st.sampled_from([1, 2, 3]), st.integers(1, 90))
TALL_OR_WIDE = st.tuples(st.just(1), st.integers(1, 3000)) | st.tuples(
    st.integers(1, 3000), st.just(1)
)
SIZES = st.tuples(SIDES, SIDES) | TALL_OR_WIDE


@st.composite
def pil_images(draw, sizes=SIZES):
    mode, size = draw(st.sampled_from(MODES)), draw(sizes)
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    if mode == "P":
        image = Image.fromarray(rng.integers(0, 256, size[::-1], dtype=np.uint8)).convert("P")
        if draw(st.booleans()):
            image.info["transparency"] = draw(st.sampled_from([0, b"\0\1", 255]))
        return image
    if mode == "F":
        values = rng.normal(size=size[::-1]) * draw(st.sampled_from([0.1, 1, 1e30]))
        return Image.fromarray(values.astype(np.float32))
    if mode == "I":
        top = draw(st.sampled_from([256, 2**16, 2**31 - 1]))
        return Image.fromarray(rng.integers(0, top, size[::-1]).astype(np.int32))
    blank = Image.new(mode, size)
    return Image.frombytes(mode, size, rng.bytes(len(blank.tobytes())))


@st.composite
def arrays(draw):
    shape = draw(
        hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=9)
        | st.tuples(SIDES, SIDES, st.sampled_from([1, 2, 3, 4]))
        | st.tuples(st.sampled_from([1, 3, 4]), SIDES, SIDES)
    )
    kind = draw(
        st.sampled_from(
            [
                "u1",
                "u2",
                "u4",
                "u8",
                "i1",
                "i2",
                "i4",
                "i8",
                "f2",
                "f4",
                "f8",
                "?",
                "c8",
                ">u2",
                ">f4",
            ]
        )
    )
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    values = (rng.random(shape) * draw(st.sampled_from([0, 1, 1.5, 255, 70000]))).astype(kind)
    if values.dtype.kind == "f" and values.size and draw(st.booleans()):
        values.flat[0] = draw(st.sampled_from([np.nan, np.inf, -np.inf, -1]))
    return values


@st.composite
def tensors(draw):
    array = draw(arrays())
    native = array.astype(array.dtype.newbyteorder("="))
    tensor = torch.from_numpy(np.asarray(native))
    return (
        tensor.to(torch.bfloat16) if draw(st.booleans()) and tensor.is_floating_point() else tensor
    )


ANYTHING = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=5),
    st.binary(max_size=20),
    st.lists(st.integers(), max_size=5),
    st.lists(st.floats(), min_size=4, max_size=4),
    st.lists(st.lists(st.floats(), max_size=9), max_size=3),
    st.dictionaries(st.sampled_from(["size", "counts", "box", "polygons"]), st.none(), max_size=4),
)


def outcome(call):
    """What a call returns, or None when it refuses; any other error is the test's failure."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return call()
        except (ValueError, FileNotFoundError) as error:
            assert str(error), "an error that says nothing"
            return None


def expect_image(image):
    if image is not None:
        assert image.mode == "RGB" and min(image.size) >= 1


@THROW
@given(pil_images())
def test_any_pil_image_is_an_image_or_refused(image):
    opened = outcome(lambda: load_image(image))
    expect_image(opened)
    assert image.mode in ("I", "F", "La") or opened is not None
    assert opened is None or opened.size == image.size


@THROW
@given(st.one_of(arrays(), tensors(), ANYTHING))
def test_anything_is_an_image_or_refused(thing):
    expect_image(outcome(lambda: load_image(thing)))


@THROW
@given(
    pil_images(st.tuples(SIDES, SIDES)),
    st.sampled_from(["PNG", "JPEG", "GIF", "TIFF", "WEBP"]),
    st.data(),
)
def test_any_damaged_file_is_an_image_or_refused(image, kind, data):
    buffer = io.BytesIO()
    try:
        image.save(buffer, kind)
    except (OSError, ValueError, KeyError):  # a mode that this kind of file cannot hold
        buffer = io.BytesIO()
        Image.new("RGB", image.size, (9, 99, 199)).save(buffer, kind)
    content = bytearray(buffer.getvalue())
    for _ in range(data.draw(st.integers(0, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    del content[data.draw(st.integers(0, len(content))) :]
    expect_image(outcome(lambda: load_image(bytes(content))))


SIZE = (23, 17)  # width, height


def expect_mask(mask):
    if mask is not None:
        assert mask.mode == "L" and mask.size == SIZE and np.asarray(mask).any()


@THROW
@given(pil_images(st.sampled_from([SIZE, SIZE[::-1], (1, 1)])))
def test_any_pil_image_is_a_mask_or_refused(image):
    expect_mask(outcome(lambda: load_mask(image, SIZE)))


@THROW
@given(st.one_of(arrays(), tensors(), ANYTHING))
def test_anything_is_a_mask_or_refused(thing):
    expect_mask(outcome(lambda: load_mask(thing, SIZE)))


@THROW
@given(
    st.integers(0, 2**32 - 1),
    st.sampled_from([bool, np.uint8, np.int64, np.float16, np.float64]),
    st.booleans(),
)
def test_every_array_of_the_right_size_with_a_pixel_is_a_mask(seed, dtype, as_tensor):
    rng = np.random.default_rng(seed)
    values = (rng.random(SIZE[::-1]) < rng.random()).astype(dtype) * dtype(1)
    mask = outcome(lambda: load_mask(torch.from_numpy(values) if as_tensor else values, SIZE))
    expect_mask(mask)
    assert (mask is not None) == bool(values.any())
    assert mask is None or np.array_equal(np.asarray(mask) > 0, values > 0)


@THROW
@given(st.data())
def test_corrupted_rle_never_reaches_the_decoder(data):
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    rle = coco.encode(np.asfortranarray(rng.random(SIZE[::-1]) < 0.5).astype(np.uint8))
    counts = bytearray(rle["counts"])
    for _ in range(data.draw(st.integers(0, 6))):
        counts[data.draw(st.integers(0, len(counts) - 1))] = data.draw(st.integers(0, 255))
    counts += data.draw(st.binary(max_size=4))
    text = data.draw(st.sampled_from([bytes, lambda b: b.decode("latin-1")]))(bytes(counts))
    expect_mask(outcome(lambda: load_mask({"size": rle["size"], "counts": text}, SIZE)))


@THROW
@given(st.lists(st.integers(0, 63), max_size=40))
def test_any_rle_text_is_a_mask_or_refused(chunks):
    """Digits of the right alphabet, long continuations included."""
    text = bytes(48 + chunk for chunk in chunks)
    expect_mask(outcome(lambda: load_mask({"size": [17, 23], "counts": text}, SIZE)))


NUMBERS = st.one_of(
    st.integers(-50, 50), st.integers(), st.floats(), st.floats(-50, 50), st.just("3"), st.none()
)


@THROW
@given(st.lists(NUMBERS, max_size=12), st.lists(NUMBERS, max_size=3))
def test_any_uncompressed_rle_is_a_mask_or_refused(counts, size):
    expect_mask(outcome(lambda: load_mask({"size": size, "counts": counts}, SIZE)))
    expect_mask(outcome(lambda: load_mask({"size": [17, 23], "counts": counts}, SIZE)))


@THROW
@given(st.lists(NUMBERS, min_size=3, max_size=5))
def test_any_box_is_a_mask_or_refused(box):
    expect_mask(outcome(lambda: load_mask({"box": box}, SIZE)))
    expect_mask(outcome(lambda: load_mask(box, SIZE)))


@THROW
@given(st.lists(st.floats(-5, 30), min_size=4, max_size=4))
def test_a_box_that_overlaps_the_image_by_a_pixel_is_a_mask(box):
    left, top, right, bottom = box
    mask = outcome(lambda: load_mask(box, SIZE))
    expect_mask(mask)
    overlap = min(right, SIZE[0]) - max(left, 0), min(bottom, SIZE[1]) - max(top, 0)
    if min(overlap) >= 1:
        assert mask is not None


@THROW
@given(st.lists(st.lists(NUMBERS, max_size=10), max_size=3))
def test_any_polygon_is_a_mask_or_refused(polygons):
    expect_mask(outcome(lambda: load_mask({"polygons": polygons}, SIZE)))
    expect_mask(outcome(lambda: load_mask(polygons, SIZE)))


@THROW
@given(SIZES, st.sampled_from([16, 448, 512]), st.integers(1, 12))
def test_a_grid_has_no_more_tiles_than_allowed_and_none_is_closer(size, side, most):
    columns, rows = choose_grid(size, side, most)
    assert 1 <= columns * rows <= most
    distance = abs(size[0] / size[1] - columns / rows)
    others = [
        abs(size[0] / size[1] - w / h) for w in range(1, most + 1) for h in range(1, most // w + 1)
    ]
    assert distance == min(others)


@THROW
@given(SIZES, st.sampled_from([(384, 27, 4), (224, 7, 4), (64, 8, 1)]))
def test_an_anyres_map_is_no_larger_than_allowed(size, frame):
    """A sliver may leave no cell at all: its rows are newlines then."""
    side, unit, most = frame
    grid = choose_canvas(size, side)
    crop_h, crop_w, h, w = anyres_map_size(size[::-1], grid, unit, most)
    assert min(h, w, crop_h, crop_w) >= 0
    assert h <= grid[1] * unit - 2 * crop_h and w <= grid[0] * unit - 2 * crop_w
    assert h * w <= 1.1**2 * most * unit**2


@settings(THROW, max_examples=40)
@given(pil_images(), st.integers(0, 7), st.integers(0, 2**32 - 1))
def test_any_image_with_any_masks_makes_valid_inputs_or_is_refused(make, image, count, seed):
    _, processor = make()
    rng = np.random.default_rng(seed)
    masks = [rng.random(image.size[::-1]) < 0.5 for _ in range(count)]
    inputs = outcome(lambda: processor(image, masks=masks, caption_length=3))
    expected = (
        1 <= count <= 6 and all(mask.any() for mask in masks) and image.mode not in ("I", "F", "La")
    )
    assert (inputs is not None) >= expected
    if inputs is None:
        return
    ids = inputs["input_ids"][0]
    tokens = int((ids == processor.image_token_id).sum())
    assert tokens == inputs["pixel_values"].shape[0] * 16
    assert int((ids == processor.mask_token_id).sum()) == 3 * count
    assert inputs["boxes"].shape == (count, 4)
    assert bool(((inputs["boxes"] >= 0) & (inputs["boxes"] <= 1)).all())
    assert bool((inputs["pixel_values"].abs() <= 1).all())


@settings(THROW, max_examples=15)
@given(
    st.lists(st.tuples(st.tuples(SIDES, SIDES), st.integers(1, 6)), min_size=1, max_size=3),
    st.sampled_from(["released", "independent"]),
)
@torch.no_grad()
def test_any_batch_gives_finite_logits(make, draw_image, batch, layout):
    model, processor = make(region_layout=layout)
    images = [draw_image(*size) for size, _ in batch]
    masks = [[np.ones(size[::-1], bool)] * count for size, count in batch]
    logits = model(**processor(images, masks=masks, caption_length=2)).logits
    assert bool(logits.isfinite().all())


@pytest.mark.parametrize("size", [(1, 1), (1, 300), (300, 1), (33, 7), (1, 9)])
@torch.no_grad()
def test_an_anyres_image_of_any_shape_gives_finite_logits(make, size):
    model, processor = make(
        image_layout="anyres", num_region_prompts=0, spatial_merge_size=1, vision={"patch_size": 8}
    )
    logits = model(**processor(Image.new("RGB", size), prompts="What?")).logits
    assert bool(logits.isfinite().all())


def test_floats_outside_their_range_are_refused_not_clipped():
    with pytest.raises(ValueError, match="floats in .0, 1."):
        load_image(np.full((3, 3, 3), 1.0001))
