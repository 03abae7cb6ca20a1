"""What the page's painter may send, and what the page shows of a model's words."""

import io
import json
from pathlib import Path
from urllib.parse import quote_from_bytes

import numpy as np
import pytest
from perceptiondlm.apps.captioning.captioner import MASKED
from perceptiondlm.apps.serving.decode import Decoder
from perceptiondlm.apps.serving.limits import Limits
from perceptiondlm.apps.web.input import examples, fit_mask, read_payload, region_masks
from perceptiondlm.apps.web.painter import markup
from perceptiondlm.apps.web.view import answer_view, captions_view
from perceptiondlm.image_loading import load_image
from PIL import Image
from serving import data_url

VECTORS = Path(__file__).parent / "fixtures" / "vectors"
IMAGE = VECTORS / "region_0.png"
SIZE = Image.open(IMAGE).size
LIMITS = Limits(body_bytes=1 << 20, pixels=1_000_000, masks=4)


def sent(image=IMAGE, regions=()) -> str:
    image = data_url(image) if isinstance(image, (Path, bytes, Image.Image)) else image
    return json.dumps({"image": image, "regions": list(regions)})


def painted(mask: np.ndarray) -> dict:
    """A region as a canvas gives it: opaque where painted."""
    rgba = np.zeros((*mask.shape, 4), np.uint8)
    rgba[..., 3] = mask * 255
    return {"painted": data_url(Image.fromarray(rgba))}


def test_a_payload_is_an_image_and_masks_of_its_size():
    exact = VECTORS / "region_0_mask_0.png"
    regions = [{"box": [1, 2, 30, 40]}, {"exact": data_url(exact)}]
    image, read = read_payload(sent(regions=regions), LIMITS)
    masks = region_masks(read, image.size, LIMITS)
    assert image.tobytes() == Image.open(IMAGE).convert("RGB").tobytes()
    assert masks[0].getbbox() == (1, 2, 30, 40)
    assert masks[1].tobytes() == Image.open(exact).convert("L").tobytes()


@pytest.mark.parametrize(
    "way",
    [
        lambda url: url.replace("data:", "DATA:").replace("base64", "BASE64"),
        lambda url: url.replace(";base64", ";charset=utf-8;base64"),
        lambda url: url[:40] + "\r\n" + url[40:],
        lambda url: url.rstrip("=").replace("+", "-").replace("/", "_").replace("_", "/", 1),
        lambda url: "data:image/png," + quote_from_bytes(IMAGE.read_bytes()),
    ],
)
def test_a_data_url_is_read_however_it_is_written(way):
    image, _ = read_payload(sent(way(data_url(IMAGE))), LIMITS)
    assert image.tobytes() == Image.open(IMAGE).convert("RGB").tobytes()


def test_an_image_with_an_orientation_is_turned_once_and_masks_have_its_upright_size():
    exif = Image.Exif()
    exif[0x0112] = 6
    stored = Image.fromarray(np.arange(12 * 8, dtype=np.uint8).reshape(8, 12) * 2)
    buffer = io.BytesIO()
    stored.save(buffer, "PNG", exif=exif)
    opened = Decoder(LIMITS).image(buffer.getvalue(), "the image")
    rle = {"size": [12, 8], "counts": [5, 30, 61]}
    assert opened.size == (8, 12)
    assert np.count_nonzero(Decoder(LIMITS).mask(rle, opened.size)) == 30
    with pytest.raises(ValueError, match="EXIF orientation"):
        Decoder(LIMITS).mask(rle, stored.size)
    assert np.array_equal(np.asarray(load_image(opened))[..., 0], np.rot90(stored, -1))


@pytest.mark.parametrize("kind", ["JPEG", "WEBP"])
def test_a_lossy_mask_is_refused(kind):
    buffer = io.BytesIO()
    Image.open(VECTORS / "region_0_mask_0.png").rotate(10).convert("RGB").save(buffer, kind)
    with pytest.raises(ValueError, match="region 1: expected .*mask without loss, say as PNG"):
        region_masks([{"exact": data_url(buffer.getvalue())}], SIZE, LIMITS)


def test_a_lossless_mask_with_a_soft_edge_is_read_of_any_format():
    mask = Image.open(VECTORS / "region_0_mask_0.png").resize((75, 70)).resize(SIZE)
    for kind, options in (("PNG", {}), ("WEBP", {"lossless": True}), ("TIFF", {})):
        buffer = io.BytesIO()
        mask.save(buffer, kind, **options)
        (got,) = region_masks([{"exact": data_url(buffer.getvalue())}], SIZE, LIMITS)
        assert np.array_equal(np.asarray(got) > 0, np.asarray(mask) > 0)


@pytest.mark.parametrize("scale", [0.25, 1, 4])
def test_a_painted_mask_is_brought_to_the_images_scale(scale):
    width, height = (round(side * scale) for side in SIZE)
    mask = np.zeros((height, width), bool)
    mask[height // 2 :, : width // 2] = True
    (fitted,) = region_masks([painted(mask)], SIZE, LIMITS)
    left, top, right, bottom = fitted.getbbox()
    assert fitted.size == SIZE and set(fitted.tobytes()) <= {0, 255}
    assert (left, bottom) == (0, SIZE[1])
    assert abs(right - SIZE[0] / 2) <= 2 / min(scale, 1)
    assert abs(top - SIZE[1] / 2) <= 2 / min(scale, 1)


def test_a_speck_does_not_vanish_when_made_smaller():
    mask = Image.new("L", (1000, 1000))
    mask.putpixel((500, 500), 255)
    assert fit_mask(mask, (50, 50)).getbbox() is not None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "JSON"),
        ("[" * 100_000, "JSON"),
        ("[]", "image and regions"),
        ('{"image": "x"}', "image and regions"),
        ('{"image": 3, "regions": []}', "data URL"),
        (sent("/etc/passwd"), "data:image"),
        (sent("file:///etc/passwd"), "data:image"),
        (sent(b"<svg/>"), "got SVG"),
        (sent(IMAGE.read_bytes()[:200]), "damaged"),
        (sent(Image.new("L", (2000, 2000))), "pixels"),
        ("x" * (3 << 20), "at most 1 MiB"),
    ],
)
def test_a_payload_that_will_not_do_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        read_payload(text, LIMITS)


@pytest.mark.parametrize(
    ("region", "message"),
    [
        ({"box": [5, 5, 1, 1]}, "region 1: .*x0 < x1"),
        ({"box": [1e999, 0, 1, 1]}, "region 1"),
        ({"exact": "/etc/passwd"}, "region 1: .*data:image"),
        ({"exact": data_url(Image.new("L", (3, 3), 1))}, "image's size"),
        ({"painted": 3}, "region 1"),
        ({"painted": data_url(Image.new("RGBA", (9, 9)))}, "empty"),
        ({"other": 3}, "one of painted"),
        ({"box": [0, 0, 1, 1], "exact": "x"}, "one of painted"),
        ("box", "one of painted"),
        (None, "one of painted"),
    ],
)
def test_a_region_that_will_not_do_is_refused_by_its_number(region, message):
    with pytest.raises(ValueError, match=message):
        region_masks([region], SIZE, LIMITS)


def test_too_many_regions_are_refused():
    with pytest.raises(ValueError, match="at most 4 masks"):
        region_masks([{"box": [0, 0, 9, 9]}] * 5, SIZE, LIMITS)


def test_what_a_model_says_is_shown_as_text():
    evil = "<img src=x onerror=alert(1)>"
    assert "<img" not in captions_view([evil, MASKED]) + answer_view(evil, evil)
    assert 'class="pd-mask"' in captions_view([f"a {MASKED} b"])


def test_examples_are_scenes_with_masks_of_their_size():
    for example in examples():
        assert example.masks and all(mask.size == example.image.size for mask in example.masks)
        assert all(mask.getbbox() for mask in example.masks)


def test_the_painters_setup_survives_being_put_into_markup():
    text = markup(LIMITS, [{"image": 'a"b<', "regions": []}], regions=True, outlines=False)
    assert 'a"b<' not in text and "a\\&quot;b&lt;" in text


def test_a_byte_order_mark_before_what_the_page_sends_is_no_matter():
    assert read_payload("\ufeff" + sent(), LIMITS)[0].size == SIZE
