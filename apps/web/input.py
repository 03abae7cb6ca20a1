"""Reads and checks what the page's painter sends, an image and its regions; makes its examples."""

import base64
import io
from dataclasses import dataclass

import numpy as np
from PIL import Image

from ...common.json_text import parse_json
from ...image_loading import load_image, load_mask
from ...scenes.example_scenes import EMBEDDED_KIND, EXAMPLE_KINDS, open_example
from ..captioning.drawing import PALETTE
from ..serving.decode import MASK_BYTES, Decoder
from ..serving.limits import Limits, each_numbered

IMAGE = "the image"


def read_page(text: str | None, limits: Limits) -> tuple[Image.Image | None, list[Image.Image]]:
    """Reads what the painter sends (see `read_payload`) into an upright RGB image and its masks."""
    decoder = Decoder(limits)
    image, regions = read_payload(text, limits, decoder)
    return image, region_masks(regions, image.size, limits, decoder) if regions else []


def read_payload(
    text: str | None, limits: Limits, decoder: Decoder | None = None
) -> tuple[Image.Image | None, list]:
    """Reads the image, as upright RGB, and leaves the regions as the painter describes them.

    `text` is JSON: `image`, a data URL or null, and `regions`, a list of `{"painted": data URL}`
    (a mask at the painter's own scale), `{"exact": data URL}` or `{"box": [x0, y0, x1, y1]}`.
    Raises ValueError for anything else.
    """
    if not text:
        return None, []
    if len(text) > 2 * limits.body_bytes:
        raise ValueError(f"expected at most {limits.body_bytes >> 20} MiB of image and masks")
    content = parse_json(text, "what the page sent")
    if not isinstance(content, dict) or not isinstance(content.get("regions"), list):
        raise ValueError("expected an image and regions from the page")

    if content.get("image") is None:
        return None, []
    if not isinstance(content["image"], str):
        raise ValueError("expected the image as data URL from the page")
    decoder = decoder or Decoder(limits)
    data = decoder.data_url(content["image"], IMAGE)
    return load_image(decoder.image(data, IMAGE)), content["regions"]


def region_masks(
    regions: list, size: tuple[int, int], limits: Limits, decoder: Decoder | None = None
) -> list[Image.Image]:
    """Returns the masks of `read_payload`'s regions, of the image's size (width, height)."""
    decoder = decoder or Decoder(limits)
    decoder.expect_masks(len(regions), size)
    return each_numbered("region", regions, lambda region: _mask(region, size, decoder))


def _mask(region, size: tuple[int, int], decoder: Decoder) -> Image.Image:
    if not isinstance(region, dict) or len(region) != 1:
        raise ValueError(f"expected one of painted, exact and box, got {str(region)[:60]}")
    ((kind, content),) = region.items()
    if kind == "painted" and isinstance(content, str):
        mask = decoder.mask_image(decoder.data_url(content, "mask"), None)
        decoder.spend(size[0] * size[1] * MASK_BYTES)
        return load_mask(fit_mask(mask.convert("RGBA").getchannel("A"), size), size)
    if kind == "exact":
        return decoder.mask(content, size)
    if kind == "box":
        return decoder.mask({"box": content}, size)
    raise ValueError(f"expected one of painted, exact and box, got {str(kind)[:60]!r}")


def fit_mask(mask: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Scales a mask (8-bit, 255 inside) to a size (width, height).

    A pixel is inside where half of it is; where that would leave nothing, any part is enough.
    """
    kind = Image.Resampling.BOX if mask.width > size[0] else Image.Resampling.BILINEAR
    fitted = mask.resize(size, kind)
    half = fitted.point([0] * 128 + [255] * 128)
    return half if half.getbbox() else fitted.point([0] + [255] * 255)


@dataclass(frozen=True, eq=False)
class Example:
    """An image, its regions as masks, and a question."""

    image: Image.Image
    masks: list[Image.Image]
    question: str

    def to_dict(self) -> dict:
        """Returns what the painter loads, ready for JSON."""
        masks = [data_url(mask) for mask in self.masks]
        return {"image": data_url(self.image), "regions": masks, "question": self.question}


def examples() -> list[Example]:
    """Returns scenes of what the embedded model knows, with no more regions than colors each."""
    made = []
    for seed in EXAMPLE_KINDS[EMBEDDED_KIND].shown:
        scene = open_example(EMBEDDED_KIND, seed)
        things = scene.objects[: len(PALETTE)]
        masks = [Image.fromarray(thing.mask.astype(np.uint8) * 255) for thing in things]
        question = scene.questions[0].question if scene.questions else ""
        made.append(Example(scene.image, masks, question))
    return made


def data_url(image: Image.Image, kind: str = "PNG") -> str:
    """Encodes an image as a data URL."""
    buffer = io.BytesIO()
    image.save(buffer, kind, quality=90)
    content = base64.b64encode(buffer.getvalue()).decode()
    return f"data:image/{kind.lower()};base64,{content}"
