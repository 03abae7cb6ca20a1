"""Images of every form to tiles, against a plain implementation."""

import io
import time

import numpy as np
import pytest
import reference
import skimage.data
import torch
from perceptiondlm.image_loading import load_image
from perceptiondlm.image_processing_perceptiondlm import (
    PerceptionDLMImageProcessor,
    normalize,
    pair_masks,
    resize,
)
from perceptiondlm.image_tiling import anyres_map_size, choose_canvas, choose_grid
from PIL import Image

SIDE = 32
SIZES = [(40, 40), (100, 30), (30, 100), (61, 47), (200, 190), (33, 180), (1, 1), (1, 90), (90, 1)]


@pytest.fixture
def process():
    return PerceptionDLMImageProcessor(image_size=SIDE, patch_size=4)


def as_bytes(pixels: torch.Tensor) -> np.ndarray:
    """Normalized (T, 3, S, S) back to uint8 (T, S, S, 3)."""
    return ((pixels + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()


@pytest.mark.parametrize("size", SIZES)
def test_tiles_equal_the_plain_ones(process, draw_image, size):
    image = draw_image(*size)
    expected = reference.cut(image, reference.best_grid(*size, SIDE), SIDE)
    pixels = process(image)["pixel_values"]
    assert pixels.dtype == torch.float32
    assert np.array_equal(as_bytes(pixels), expected)
    assert torch.allclose(pixels.double(), reference.normalize(expected), rtol=0, atol=1e-7)


@pytest.mark.parametrize("size", SIZES)
def test_tiles_that_are_not_normalized_are_bytes(process, draw_image, size):
    image = draw_image(*size)
    expected = reference.cut(image, reference.best_grid(*size, SIDE), SIDE)
    tiles = process(image, do_normalize=False)["pixel_values"]
    assert tiles.dtype == torch.uint8 and tiles.is_contiguous()
    assert np.array_equal(tiles.permute(0, 2, 3, 1).numpy(), expected)
    assert torch.equal(normalize(tiles), process(image)["pixel_values"])


def test_normalizing_keeps_the_bytes(process, draw_image):
    tiles = process(draw_image(40, 40), do_normalize=False)["pixel_values"]
    before = tiles.clone()
    values = normalize(tiles)
    assert torch.equal(tiles, before)
    assert torch.equal(normalize(tiles.float()), values) and torch.equal(tiles, before)


@pytest.mark.parametrize("value", [0, 0.5, "no", [False]])
def test_another_value_of_do_normalize_is_refused(process, draw_image, value):
    with pytest.raises(ValueError, match="expected do_normalize True or False, got"):
        process(draw_image(40, 40), do_normalize=value)


def test_grids_equal_the_plain_ones_for_random_sizes():
    rng = np.random.default_rng(5)
    for width, height in rng.integers(1, 3000, (300, 2)).tolist():
        for side, most in ((SIDE, 6), (512, 6), (512, 4), (448, 12)):
            ours = choose_grid((width, height), side, most)
            assert ours == reference.best_grid(width, height, side, most)


def test_equally_close_grids_go_to_the_larger_image_alone():
    assert choose_grid((100, 100), 512, 6) == (1, 1)
    assert choose_grid((2000, 2000), 512, 6) == (2, 2)
    side = int((0.5 * 512 * 512 * 4) ** 0.5)  # half of the 2x2 grid's area lies just above
    assert choose_grid((side, side), 512, 6) == (1, 1)
    assert choose_grid((side + 1, side + 1), 512, 6) == (2, 2)


def test_max_tiles_limits_the_grid_for_all_or_for_each(process, draw_image):
    images = [draw_image(200, 60), draw_image(200, 60, seed=1)]
    assert process(images, max_tiles=1)["image_grids"].tolist() == [[1, 1], [1, 1]]
    assert process(images, max_tiles=[1, None])["image_grids"].tolist() == [[1, 1], [3, 1]]


@pytest.mark.parametrize(
    ("images", "masks", "message"),
    [
        (None, [1], "expected an image for the masks, got none"),
        ([], [], "for each of 0 images, got 0"),
        (["a", "b"], [[1]], "for each of 2 images, got 1"),
        (["a"], 5, "for each of 1 images, got int"),
        (["a"], "mask.png", "for each of 1 images, got str 'mask.png'"),
        ("a", {"box": [1, 2, 3, 4]}, "a list of masks for each image, got dict"),
        ("a", None, "a list of masks for each image, got NoneType"),
        ("a", torch.tensor(1), "a list of masks for each image, got Tensor"),
    ],
)
def test_masks_that_belong_to_no_image_are_refused(process, images, masks, message):
    with pytest.raises(ValueError, match=message):
        pair_masks(images, masks)


def test_what_is_paired_with_its_masks_stays_as_it_is():
    assert pair_masks("a", [1, 2]) == (["a"], [[1, 2]])
    assert pair_masks(*pair_masks("a", [1, 2])) == (["a"], [[1, 2]])
    assert pair_masks(("a", "b"), ([1], (2, 3))) == (["a", "b"], [[1], (2, 3)])


def test_sizes_are_height_and_width(process, draw_image):
    assert process(draw_image(200, 60))["image_sizes"].tolist() == [[60, 200]]


def test_images_are_processed_one_after_another(process, draw_image):
    images = [draw_image(40, 40), draw_image(200, 60, seed=1), draw_image(40, 90, seed=2)]
    together = process(images)["pixel_values"]
    apart = torch.cat([process(image)["pixel_values"] for image in images])
    assert torch.equal(together, apart)


def test_a_tall_image_is_resized_as_by_pillow_13(draw_image):
    """The pass that loses most goes first; rounding between passes is 8 bits deep."""
    tall, flat = draw_image(140, 300), draw_image(300, 140)
    vertical_first = tall.resize((140, 64), Image.BICUBIC).resize((32, 64), Image.BICUBIC)
    assert np.array_equal(resize(tall, (32, 64)), vertical_first)
    horizontal_first = flat.resize((64, 140), Image.BICUBIC).resize((64, 32), Image.BICUBIC)
    assert np.array_equal(resize(flat, (64, 32)), horizontal_first)


# Forms of images: each equals the same image given as RGB.


@pytest.fixture
def rgb(draw_image):
    return np.asarray(draw_image(37, 29))


def test_arrays_tensors_files_and_bytes_are_the_same_image(rgb, tmp_path):
    Image.fromarray(rgb).save(tmp_path / "a.png")
    tensor = torch.from_numpy(rgb.copy())
    forms = [
        rgb,
        rgb.astype(np.float64) / 255,
        rgb.astype(np.float32) / 255,
        rgb.astype(np.uint16) * 257,
        np.asfortranarray(rgb),
        rgb[::-1][::-1],
        tensor.permute(2, 0, 1),
        tensor.permute(2, 0, 1).float() / 255,
        tmp_path / "a.png",
        str(tmp_path / "a.png"),
        (tmp_path / "a.png").read_bytes(),
    ]
    for form in forms:
        assert np.array_equal(load_image(form), rgb)


def test_grey_arrays_of_any_layout_are_grey_images(rgb):
    gray = rgb[..., 0]
    expected = np.stack([gray] * 3, -1)
    tensor = torch.from_numpy(gray.copy())
    for form in (gray, gray[..., None], tensor, tensor[None], tensor[None].float() / 255):
        assert np.array_equal(load_image(form), expected)
    assert np.array_equal(load_image(gray > 100), np.where(expected > 100, 255, 0))


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "CMYK", "YCbCr", "HSV", "1", "LAB"])
def test_every_mode_opens_as_pil_converts_it(rgb, mode):
    source = Image.fromarray(rgb)
    if mode == "LAB":
        image = Image.frombytes("LAB", source.size, rgb.tobytes())
        assert load_image(image).mode == "RGB"
        return
    image = source.convert(mode)
    assert np.array_equal(load_image(image), image.convert("RGB"))


def test_alpha_is_dropped(rgb):
    alpha = np.random.default_rng(0).integers(0, 256, rgb.shape[:2], dtype=np.uint8)
    rgba = np.dstack([rgb, alpha])
    assert np.array_equal(load_image(Image.fromarray(rgba)), rgb)
    assert np.array_equal(load_image(rgba), rgb)


@pytest.mark.parametrize("mode", ["I;16", "I;16B", "I"])
def test_sixteen_bit_grey_is_scaled_to_eight(mode, tmp_path):
    eight = np.arange(256, dtype=np.uint8).reshape(16, 16)
    wide = eight.astype(np.uint16) * 257
    if mode == "I":
        image = Image.fromarray(wide.astype(np.int32))
    else:
        data = wide.astype("<u2" if mode == "I;16" else ">u2").tobytes()
        image = Image.frombytes(mode, (16, 16), data)
    assert image.mode == mode
    assert np.array_equal(load_image(image), np.stack([eight] * 3, -1))


def test_a_sixteen_bit_png_file_is_scaled_to_eight(tmp_path):
    eight = np.arange(256, dtype=np.uint8).reshape(16, 16)
    Image.fromarray(eight.astype(np.uint16) * 257).save(tmp_path / "deep.png")
    assert np.array_equal(load_image(tmp_path / "deep.png"), np.stack([eight] * 3, -1))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation, draw_image):
    image = draw_image(16, 8)
    exif = Image.Exif()
    exif[0x0112] = orientation
    buffer = io.BytesIO()
    image.save(buffer, "PNG", exif=exif)
    upright = np.asarray(image)
    if orientation in (2, 3, 7, 6):
        upright = upright[:, ::-1]
    if orientation in (3, 4, 7, 8):
        upright = upright[::-1]
    if orientation in (5, 6, 7, 8):
        upright = _turned(np.asarray(image), orientation)
    assert np.array_equal(load_image(buffer.getvalue()), upright)


def _turned(pixels, orientation):
    transposed = pixels.swapaxes(0, 1)
    flips = {5: transposed, 6: transposed[:, ::-1], 7: transposed[::-1, ::-1], 8: transposed[::-1]}
    return flips[orientation]


def test_an_animation_gives_its_first_frame(draw_image, tmp_path):
    frames = [draw_image(20, 20, seed=s).quantize() for s in (1, 2)]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert np.array_equal(load_image(tmp_path / "a.gif"), frames[0].convert("RGB"))


def test_a_url_is_fetched(monkeypatch, draw_image):
    import perceptiondlm.image_loading as loading

    image, asked = draw_image(9, 9), []
    monkeypatch.setattr(loading, "fetch_image", lambda url: asked.append(url) or image)
    assert load_image("https://example.org/a.png").tobytes() == image.tobytes()
    assert asked == ["https://example.org/a.png"]


def test_giving_an_image_leaves_it_as_it_was(process, rgb):
    before = rgb.copy()
    process(rgb)
    assert np.array_equal(rgb, before)


# LLaVA's images.


def test_canvases_keep_most_pixels_and_then_waste_least():
    for width, height in np.random.default_rng(1).integers(1, 2500, (200, 2)).tolist():
        expected = reference.best_canvas(width, height, 384)
        assert choose_canvas((width, height), 384) == expected


def test_anyres_tokens_are_those_of_the_map_that_is_left():
    """A 500x200 image on a 2x1 canvas of 27-cell tiles, by hand."""
    crop_h, crop_w, h, w = anyres_map_size((200, 500), (2, 1), 27, 4)
    # 54 cells wide: 200 * 54 / 500 = 21.6, so 21 of 27 rows, half of the 6 spare on each side
    assert (crop_h, crop_w, h, w) == (3, 0, 21, 54)


def test_a_large_anyres_map_is_shrunk():
    """A square image on 4x4 tiles of 10 cells, at most 4 tiles' worth: t = 2."""
    assert anyres_map_size((900, 900), (4, 4), 10, 4) == (0, 0, 20, 20)
    assert anyres_map_size((900, 900), (2, 2), 10, 4) == (0, 0, 20, 20)


@pytest.fixture
def anyres():
    return PerceptionDLMImageProcessor(
        image_size=SIDE, patch_size=4, spatial_merge_size=1, image_layout="anyres"
    )


@pytest.mark.parametrize("size", [(100, 30), (31, 99), (64, 64), (7, 200), (1, 1)])
def test_anyres_tiles_equal_the_plain_ones(anyres, draw_image, size):
    out = anyres(draw_image(*size))
    grid = reference.best_canvas(*size, SIDE)
    assert out["image_grids"].tolist() == [list(grid)]
    assert np.array_equal(
        as_bytes(out["pixel_values"]), reference.cut_anyres(draw_image(*size), grid, SIDE)
    )


def test_a_single_anyres_tile_is_padded_with_gray(anyres):
    """White, 60x20, on a square of 60: the middle third of the rows is the image."""
    out = anyres(Image.new("RGB", (60, 20), "white"), max_tiles=1)
    assert out["image_grids"].tolist() == [[0, 0]]
    (tile,) = as_bytes(out["pixel_values"])
    assert (tile[16] == 255).all() and (tile[:8] == 127).all() and (tile[-8:] == 127).all()


def test_an_anyres_image_takes_no_other_limit(anyres, draw_image):
    with pytest.raises(ValueError, match="expected max_tiles of None or 1 with anyres, got 3"):
        anyres(draw_image(60, 20), max_tiles=3)


# Photographs.


@pytest.mark.parametrize(("megapixels", "seconds"), [(1, 5), (12, 15)])
def test_a_photograph_with_irregular_masks_is_prepared_in_time(megapixels, seconds):
    scale = (megapixels * 1e6 / (512 * 512 * 0.75)) ** 0.5
    width, height = round(512 * scale), round(384 * scale)
    photo = Image.fromarray(skimage.data.astronaut()).resize((width, height))
    gray = np.asarray(photo.convert("L"))
    bands = [(0, 40), (40, 80), (80, 120), (120, 170), (170, 220), (220, 256)]
    masks = [(gray >= low) & (gray < high) for low, high in bands]
    process = PerceptionDLMImageProcessor(image_size=512, patch_size=16)
    start = time.process_time()  # the machine may be busy with other things
    out = process(photo, masks)
    assert time.process_time() - start < seconds
    assert out["pixel_values"].shape == (7, 3, 512, 512)
    assert bool(out["region_patches"].any((0, 2, 3)).all())
