"""The same mask or image in every form and mode is the same, or is refused with the reason."""

import base64
import io
import struct

import numpy as np
import pytest
import torch
from perceptiondlm.image_loading import load_image, load_mask, split_label_map, turn_upright
from PIL import Image, ImageDraw, ImageFilter

SIZE = (46, 34)


@pytest.fixture(scope="module")
def region() -> np.ndarray:
    """An object that touches two edges, with a hole and a separate part."""
    mask = np.zeros(SIZE[::-1], bool)
    mask[:20, 5:46] = True
    mask[8:12, 20:28] = False
    mask[27:31, 2:9] = True
    return mask


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def loaded(mask) -> np.ndarray:
    image = load_mask(mask, SIZE)
    assert image.mode == "L" and set(image.tobytes()) <= {0, 255}
    return np.asarray(image) > 0


# Modes: PIL's conversions of a mask that is white on black.


def gray(region) -> Image.Image:
    return Image.fromarray(region.astype(np.uint8) * 255)


def colored(region, inside=(200, 30, 40), mode="RGB") -> Image.Image:
    image = Image.new("RGB", SIZE)
    image.paste(inside, mask=gray(region))
    return image.convert(mode)


def shown(region, mode: str) -> Image.Image:
    """White everywhere, transparent outside."""
    white = Image.new("L", SIZE, 255)
    bands = [white] * (len(mode) - 1)
    return Image.merge(mode, [*bands, gray(region)])


def with_palette(region, inside: int, colors: dict[int, tuple], **info) -> Image.Image:
    """Indices 7 outside and `inside` inside."""
    image = Image.fromarray(np.where(region, inside, 7).astype(np.uint8)).convert("P")
    palette = np.full((256, 3), 99, np.uint8)
    for index, color in colors.items():
        palette[index] = color
    image.putpalette(palette.tobytes())
    image.info.update(info)
    return image


def _with_alpha(image: Image.Image, region) -> Image.Image:
    image.putalpha(gray(region))
    return image


MODES = {
    "1": lambda r: gray(r).convert("1"),
    "L": gray,
    "L of ones": lambda r: Image.fromarray(r.astype(np.uint8)),
    "LA, opaque": lambda r: gray(r).convert("LA"),
    "LA, transparent outside": lambda r: shown(r, "LA"),
    "La, transparent outside": lambda r: shown(r, "LA").convert("La"),
    "P": lambda r: gray(r).convert("P"),
    "P, quantized": lambda r: gray(r).quantize(2),
    "P, quantized by median cut": lambda r: gray(r).convert("RGB").quantize(2, method=0),
    "P, black as a high index": lambda r: with_palette(r, 0, {0: (9, 9, 250), 7: (0, 0, 0)}),
    "P, a transparent index": lambda r: with_palette(
        r, 3, {3: (9, 9, 9), 7: (250, 250, 250)}, transparency=7
    ),
    "P, transparent indices": lambda r: with_palette(
        r, 3, {3: (9, 9, 9), 7: (9, 9, 9)}, transparency=bytes([0] * 3 + [200] + [0] * 9)
    ),
    "PA, transparent outside": lambda r: _with_alpha(Image.new("L", SIZE, 255).convert("P"), r),
    "I": lambda r: gray(r).convert("I"),
    "I, 16 bits": lambda r: Image.fromarray(r.astype(np.int32) * 65535),
    "I;16": lambda r: Image.fromarray(r.astype(np.uint16) * 65535),
    "I;16, low": lambda r: Image.fromarray(r.astype(np.uint16)),
    "I;16B": lambda r: Image.frombytes("I;16B", SIZE, (r * 256).astype(">u2").tobytes()),
    "F": lambda r: Image.fromarray(r.astype(np.float32)),
    "F of 255": lambda r: gray(r).convert("F"),
    "RGB": lambda r: gray(r).convert("RGB"),
    "RGB, a color": colored,
    "RGB, a dark color": lambda r: colored(r, (1, 0, 0)),
    "RGBX": lambda r: gray(r).convert("RGBX"),
    "RGBA, opaque": lambda r: colored(r, mode="RGBA"),
    "RGBA, transparent outside": lambda r: shown(r, "RGBA"),
    "RGBa, transparent outside": lambda r: shown(r, "RGBA").convert("RGBa"),
    "CMYK": lambda r: colored(r, mode="CMYK"),
    "YCbCr": lambda r: colored(r, mode="YCbCr"),
    "HSV": lambda r: colored(r, mode="HSV"),
}


@pytest.mark.parametrize("mode", MODES)
def test_a_mask_in_any_mode_is_its_colors(region, mode):
    assert np.array_equal(loaded(MODES[mode](region)), region)


FILES = {"PNG": {}, "TIFF": {}, "WEBP": {"lossless": True}, "GIF": {}, "BMP": {}, "PPM": {}}


@pytest.mark.parametrize("kind", FILES)
@pytest.mark.parametrize("mode", MODES)
def test_a_mask_file_of_any_kind_and_mode_is_the_mask(region, mode, kind, tmp_path):
    try:
        data = encoded(MODES[mode](region), kind, **FILES[kind])
        saved = np.asarray(Image.open(io.BytesIO(data)).convert("RGBA"))
    except (OSError, ValueError, KeyError):
        pytest.skip(f"{kind} holds no {mode}")
    if saved[..., :3].any(-1).all() and saved[..., 3].all():
        pytest.skip(f"{kind} does not keep the outside of {mode}")
    path = tmp_path / f"mask.{kind.lower()}"
    path.write_bytes(data)
    text = base64.b64encode(data).decode()
    url = f"data:image/{kind.lower()};base64,{text}"
    opened = Image.open(io.BytesIO(data))
    for form in (path, str(path), data, bytearray(data), url, text, Image.open(path), opened):
        assert np.array_equal(loaded(form), region), type(form)
    assert np.array_equal(loaded(opened), region)  # again, decoded by now


@pytest.mark.parametrize("hidden", [0, 255])
def test_a_gray_that_a_png_declares_transparent_is_outside(region, hidden):
    values = np.where(region, 255 - hidden or 40, hidden).astype(np.uint8)
    data = encoded(Image.fromarray(values), "PNG", transparency=hidden)
    if hidden:
        values[values == 0] = 1
        data = encoded(Image.fromarray(values), "PNG", transparency=hidden)
    assert np.array_equal(loaded(data), region)


def test_masks_that_are_black_all_over_are_empty_whatever_their_alpha(region):
    black = Image.new("RGBA", SIZE)
    black.putalpha(gray(region))
    with pytest.raises(ValueError, match="empty region mask"):
        load_mask(black, SIZE)


def test_a_photograph_cut_out_by_its_alpha_is_its_alpha(region):
    """Its colors fill no area, and it may have black pixels."""
    noise = np.random.default_rng(0).integers(0, 2, (*SIZE[::-1], 3), dtype=np.uint8) * 255
    cutout = Image.fromarray(noise)
    cutout.putalpha(gray(region))
    assert np.array_equal(loaded(cutout), region)


# Soft edges, soft masks, and loss.


def blurred(region, radius=1.5) -> Image.Image:
    return gray(region).filter(ImageFilter.GaussianBlur(radius))


SOFT = {
    "L": lambda soft: soft,
    "array": np.asarray,
    "int64": lambda soft: np.asarray(soft).astype(np.int64),
    "16 bits": lambda soft: np.asarray(soft).astype(np.uint16) * 257,
    "tensor": lambda soft: torch.from_numpy(np.array(soft)),
    "PNG": lambda soft: encoded(soft, "PNG"),
    "WebP": lambda soft: encoded(soft.convert("RGB"), "WEBP", lossless=True),
    "RGB": lambda soft: soft.convert("RGB"),
    "alpha": lambda soft: Image.merge("LA", [Image.new("L", SIZE, 255), soft]),
    "orange": lambda soft: Image.merge(
        "RGB", [soft, soft.point(lambda v: v // 3), Image.new("L", SIZE)]
    ),
}


@pytest.mark.parametrize("form", SOFT)
def test_a_soft_edge_of_eight_bits_belongs_to_the_region(region, form):
    soft = blurred(region)
    assert np.array_equal(loaded(SOFT[form](soft)), np.asarray(soft) > 0)


@pytest.mark.parametrize("kind", ["BILINEAR", "HAMMING", "BICUBIC", "LANCZOS", "BOX"])
@pytest.mark.parametrize("side", [20, 61, 97])
def test_a_resized_mask_has_soft_edges(kind, side):
    mask = Image.new("L", (60, 60))
    ImageDraw.Draw(mask).ellipse((9, 12, 41, 47), fill=255)
    resized = mask.resize((side, side), Image.Resampling[kind])
    assert np.array_equal(np.asarray(load_mask(resized, (side, side))) > 0, np.asarray(resized) > 0)


def sigmoid(region) -> np.ndarray:
    logits = np.asarray(blurred(region, 4), np.float64) / 16 - 8
    return 1 / (1 + np.exp(-logits))


FLOATS = {
    "float64": lambda p: p,
    "float32": lambda p: p.astype(np.float32),
    "float16": lambda p: p.astype(np.float16),
    "tensor": lambda p: torch.from_numpy(p)[None],
    "bfloat16": lambda p: torch.from_numpy(p).to(torch.bfloat16),
    "PIL": lambda p: Image.fromarray(p.astype(np.float32)),
    "TIFF": lambda p: encoded(Image.fromarray(p.astype(np.float32)), "TIFF"),
}


@pytest.mark.parametrize("form", FLOATS)
def test_the_region_of_a_float_mask_is_where_it_exceeds_one_half(region, form):
    probabilities = sigmoid(region)
    probabilities[np.abs(probabilities - 0.5) < 0.01] = 0.4  # no matter how it is rounded
    assert (probabilities > 0).all()
    assert np.array_equal(loaded(FLOATS[form](probabilities)), probabilities > 0.5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: p * 255, r"in \[0, 1\], got a maximum of 25"),
        (lambda p: p * 12 - 6, "0 or more, got a minimum of -.*logits > 0"),
        (lambda p: p * 0.4, "above 0.5, which are its region, got a maximum of 0.3"),
        (lambda p: np.where(p > 0.5, np.inf, 0), r"in \[0, 1\], got a maximum of inf"),
        (lambda p: np.where(p > 0.5, np.nan, p), "got a minimum of nan"),
        (lambda p: p * 0, "empty region mask"),
    ],
)
def test_a_float_mask_without_a_threshold_that_goes_without_saying_is_refused(
    region, change, message
):
    values = change(sigmoid(region))
    forms = (values, torch.from_numpy(values), Image.fromarray(values.astype(np.float32)))
    for form in forms:
        with pytest.raises(ValueError, match=message):
            load_mask(form, SIZE)


def test_a_soft_mask_of_eight_bits_whose_background_is_not_zero_is_refused(region):
    soft = np.rint(sigmoid(region) * 250 + 2).astype(np.uint8)
    for form in (soft, Image.fromarray(soft), encoded(Image.fromarray(soft), "PNG")):
        with pytest.raises(ValueError, match="a threshold, say `mask > 127`"):
            load_mask(form, SIZE)


LOSSY = {
    "JPEG": lambda image: encoded(image, "JPEG"),
    "JPEG, best": lambda image: encoded(image, "JPEG", quality=100),
    "WebP": lambda image: encoded(image, "WEBP"),
    "WebP, alpha": lambda image: encoded(Image.merge("RGBA", [image] * 4), "WEBP"),
    "TIFF of JPEG": lambda image: encoded(image, "TIFF", compression="jpeg"),
    "JPEG 2000": lambda image: encoded(image, "JPEG2000", irreversible=True, quality_layers=[40]),
}


@pytest.mark.parametrize("kind", LOSSY)
def test_a_lossy_mask_is_refused_in_every_form(region, kind, tmp_path):
    data = LOSSY[kind](gray(region).rotate(10))
    path = tmp_path / "mask.png"  # whatever it is called
    path.write_bytes(data)
    opened = Image.open(path)
    opened.load()
    forms = (data, path, "data:;base64," + base64.b64encode(data).decode(), opened)
    for form in (*forms, Image.open(io.BytesIO(data))):
        with pytest.raises(
            ValueError, match="expected a region mask without loss, say as PNG, got "
        ):
            load_mask(form, SIZE)


@pytest.mark.parametrize("quality", [75, 90, 95])
def test_what_a_lossy_format_left_in_an_array_is_refused(quality):
    mask = Image.new("L", (90, 70))
    ImageDraw.Draw(mask).ellipse((9, 12, 61, 57), fill=255)
    data = encoded(mask, "JPEG", quality=quality)
    for form in (np.asarray(Image.open(io.BytesIO(data))), Image.open(io.BytesIO(data)).copy()):
        with pytest.raises(ValueError, match="compressed with loss"):
            load_mask(form, (90, 70))


# Label maps.


@pytest.fixture(scope="module")
def labels() -> np.ndarray:
    """Two objects as VOC has them: 0 outside, 255 around each object."""
    values = np.zeros(SIZE[::-1], np.uint8)
    values[2:20, 3:20] = values[10:30, 24:40] = 255
    values[4:18, 5:18] = 1
    values[12:28, 26:38] = 2
    return values


def voc(labels) -> Image.Image:
    image = Image.fromarray(labels).convert("P")
    palette = np.random.default_rng(0).integers(1, 256, (256, 3), dtype=np.uint8)
    palette[0], palette[255] = (0, 0, 0), (224, 224, 192)
    image.putpalette(palette.tobytes())
    return image


def see_through(image: Image.Image, outside: np.ndarray) -> Image.Image:
    rgba = np.array(image.convert("RGBA"))
    rgba[outside] = (250, 250, 250, 0)
    return Image.fromarray(rgba)


LABEL_MAPS = {
    "L": Image.fromarray,
    "P": voc,
    "P file": lambda v: encoded(voc(v), "PNG"),
    "P file, transparent outside": lambda v: encoded(voc(v), "PNG", transparency=0),
    "RGB": lambda v: voc(v).convert("RGB"),
    "quantized RGB": lambda v: voc(v).convert("RGB").quantize(8),
    "RGBA": lambda v: see_through(voc(v), v == 0),
    "I;16": lambda v: Image.fromarray(v.astype(np.uint16)),
    "I": lambda v: Image.fromarray(v.astype(np.int32)),
    "array": lambda v: v,
    "int64": lambda v: torch.from_numpy(v.astype(np.int64)),
}


@pytest.mark.parametrize("form", LABEL_MAPS)
def test_a_label_map_as_one_mask_is_refused_with_what_to_do(labels, form):
    for values in (labels, np.where(labels == 255, 0, labels), np.where(labels == 2, 0, labels)):
        with pytest.raises(ValueError, match="of one region.*split_label_map.*--label-maps"):
            load_mask(LABEL_MAPS[form](values), SIZE)


@pytest.mark.parametrize("form", LABEL_MAPS)
def test_a_label_map_is_split_into_its_objects_without_the_void(labels, form):
    masks = list(split_label_map(LABEL_MAPS[form](labels)).values())
    expected = {(labels == 1).tobytes(), (labels == 2).tobytes()}
    assert {loaded(mask).tobytes() for mask in masks} == expected and len(masks) == 2


def test_labels_are_named_by_value_index_or_color(labels):
    color = "#{:02x}{:02x}{:02x}".format(*voc(labels).convert("RGB").getpixel((6, 5)))
    assert list(split_label_map(labels)) == list(split_label_map(voc(labels))) == ["1", "2"]
    assert color in split_label_map(voc(labels).convert("RGB"))


def test_void_is_a_label_on_request_and_where_it_is_no_void(labels):
    assert list(split_label_map(labels, void=None)) == ["1", "2", "255"]
    assert list(split_label_map(voc(labels), void=None)) == ["1", "2", "255"]
    assert list(split_label_map(labels, void=2)) == ["1", "2", "255"]
    assert list(split_label_map(np.where(labels == 1, 255, 0))) == ["255"]
    assert list(split_label_map(np.where(labels == 1, 300, labels.astype(int)))) == [
        "2",
        "255",
        "300",
    ]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (np.zeros((4, 4), int), "at least one label, got none"),
        (np.full((4, 4), -1), "labels of 0 or more, got -1"),
        (np.ones((4, 4)), "integers .H, W., got float64"),
        (Image.new("F", (4, 4), 1), "integers .H, W., got float32"),
        (np.ones((4, 4, 3), int), "integers .H, W., got int64 .4, 4, 3."),
        (7, "got int"),
    ],
)
def test_what_is_no_label_map_is_refused(given, message):
    with pytest.raises(ValueError, match=message):
        split_label_map(given)


def test_a_lossy_label_map_is_refused(labels):
    with pytest.raises(ValueError, match="expected a label map without loss"):
        split_label_map(encoded(voc(labels).convert("RGB"), "JPEG"))


def test_overlapping_and_small_label_maps_are_refused_as_one_mask():
    tiny = np.array([[0, 1, 1, 0], [0, 2, 2, 0], [0, 0, 0, 3]])
    for values in (tiny, tiny.astype(np.uint8), np.where(tiny == 3, 255, tiny)):
        with pytest.raises(ValueError, match="split_label_map"):
            load_mask(values, (4, 3))


def test_a_background_that_is_not_black_is_refused(region):
    white_paper = np.where(region[..., None], [200, 30, 30], 255).astype(np.uint8)
    light_gray = np.where(region, 255, 200).astype(np.uint8)
    for values in (white_paper, light_gray):
        with pytest.raises(ValueError, match="zero, black or transparent outside"):
            load_mask(Image.fromarray(values), SIZE)


# EXIF: orientation, and damage.


def turned(size=(40, 30)) -> tuple[Image.Image, np.ndarray, np.ndarray]:
    """Pixels and mask as stored on their side, and upright as a plain rotation gives them."""
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    mask = np.zeros(size[::-1], np.uint8)
    mask[3:9, 5:25] = 255
    return pixels, mask


def exif(orientation) -> Image.Exif:
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags


def test_a_mask_is_turned_upright_as_its_image_is():
    pixels, mask = turned()
    image = load_image(encoded(Image.fromarray(pixels), "PNG", exif=exif(6)))
    assert np.array_equal(image, np.rot90(pixels, -1))
    opened = Image.open(io.BytesIO(encoded(Image.fromarray(pixels), "PNG", exif=exif(6))))
    assert np.array_equal(load_image(turn_upright(opened)), image)
    for kind in ("PNG", "TIFF"):
        region = load_mask(encoded(Image.fromarray(mask), kind, exif=exif(6)), image.size)
        assert np.array_equal(region, np.rot90(mask, -1))


def test_a_mask_of_the_unrotated_size_is_told_of_the_orientation():
    pixels, mask = turned()
    image = load_image(encoded(Image.fromarray(pixels), "JPEG", exif=exif(6)))
    rle = {"size": list(mask.shape), "counts": [0, mask.size]}
    for form in (mask, Image.fromarray(mask), torch.from_numpy(mask), rle):
        with pytest.raises(ValueError, match="30x40 .*got 40x30: .*EXIF orientation"):
            load_mask(form, image.size)
    with pytest.raises(ValueError) as error:
        load_mask(mask, (50, 30))
    assert "EXIF" not in str(error.value)


DAMAGE = {
    "text": b"not a TIFF header",
    "a number": b"7",
    "a header alone": b"Exif\0\0II*\0",
    "a header that leads out": b"Exif\0\0II*\0\xff\xff\xff\x7f",
    "entries that are not there": b"Exif\0\0MM\0*\0\0\0\x08\xff\xff",
    "zeros": bytes(40),
    "an orientation there is none of": b"Exif\0\0" + exif(99).tobytes()[6:],
    "an orientation as text": b"Exif\0\0MM\0*\0\0\0\x08\0\1\1\x12\0\2\0\0\0\4six\0\0\0\0\0",
}


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "JPEG"])
@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_exif_says_nothing_and_the_pixels_are_kept(kind, damage):
    pixels, mask = turned()
    options = {"exif": DAMAGE[damage]} | ({"lossless": True} if kind == "WEBP" else {})
    data = encoded(Image.fromarray(pixels), kind, **options)
    expected = Image.open(io.BytesIO(data)).convert("RGB")
    assert np.array_equal(load_image(data), expected)
    assert np.array_equal(load_image(Image.open(io.BytesIO(data))), expected)
    if kind != "JPEG":
        image = Image.fromarray(mask).convert("RGB")
        assert np.array_equal(load_mask(encoded(image, kind, **options), (40, 30)), mask)


def test_an_orientation_beside_damage_is_applied():
    """The tags after it point beyond the end."""
    pixels, _ = turned()
    entry = struct.pack(">HHI", 0x0112, 3, 1) + struct.pack(">HH", 6, 0)
    broken = struct.pack(">HHII", 0x9286, 7, 9999, 9999)
    tags = b"MM\0*\0\0\0\x08" + struct.pack(">H", 2) + entry + broken + bytes(4)
    data = encoded(Image.fromarray(pixels), "PNG", exif=b"Exif\0\0" + tags)
    assert np.array_equal(load_image(data), np.rot90(pixels, -1))


@pytest.mark.parametrize("form", ["bytes", "file"])
def test_a_png_whose_exif_has_a_wrong_checksum_keeps_its_pixels(form, tmp_path):
    pixels, _ = turned()
    data = bytearray(encoded(Image.fromarray(pixels), "PNG", exif=exif(6)))
    at = data.index(b"eXIf")
    length = struct.unpack(">I", data[at - 4 : at])[0]
    data[at + 4 + length] ^= 255
    (tmp_path / "a.png").write_bytes(data)
    assert np.array_equal(load_image(tmp_path / "a.png" if form == "file" else bytes(data)), pixels)


# Images.


IMAGE_MODES = {
    "L": lambda g: g,
    "LA": lambda g: Image.merge("LA", [g, g.point(lambda v: 255 - v)]),
    "La, opaque": lambda g: g.convert("LA").convert("La"),
    "P": lambda g: g.convert("P"),
    "P, transparent": lambda g: Image.open(
        io.BytesIO(encoded(g.convert("P"), "PNG", transparency=5))
    ),
    "PA": lambda g: g.convert("PA"),
    "I": lambda g: Image.fromarray(np.asarray(g).astype(np.int32) * 257),
    "I;16": lambda g: Image.fromarray(np.asarray(g).astype(np.uint16) * 257),
    "F": lambda g: Image.fromarray(np.asarray(g).astype(np.float32) / 255),
    "RGB": lambda g: g.convert("RGB"),
    "RGBA": lambda g: g.convert("RGBA"),
    "RGBa": lambda g: g.convert("RGBA").convert("RGBa"),
    "CMYK": lambda g: g.convert("CMYK"),
    "YCbCr": lambda g: g.convert("YCbCr"),
    "HSV": lambda g: g.convert("RGB").convert("HSV"),
}


@pytest.mark.parametrize("mode", IMAGE_MODES)
def test_a_gray_image_of_any_mode_is_the_same_image(mode):
    levels = np.arange(256, dtype=np.uint8).reshape(16, 16)
    image = IMAGE_MODES[mode](Image.fromarray(levels))
    assert np.array_equal(load_image(image), np.stack([levels] * 3, -1))


@pytest.mark.parametrize("mode", ["I", "I;16", "uint16"])
def test_eight_bits_in_sixteen_are_refused_rather_than_black(mode):
    gray = Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16))
    image = np.asarray(gray).astype(np.uint16) if mode == "uint16" else gray.convert(mode)
    with pytest.raises(ValueError, match="16-bit gray values, got .0, 255.: give 8-bit"):
        load_image(image)
