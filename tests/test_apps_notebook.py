"""Results show themselves in a notebook: the image with its regions, and what was said."""

import base64
import io
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from perceptiondlm.apps.captioning.results import Answers, Region, RegionCaptions
from PIL import Image

GRAY = (120, 130, 140)
COST = {"num_forwards": 1, "tokens_per_forward": 1.0, "seconds": 0.1}


class Reader(HTMLParser):
    """Collects the words of a page, its images, and tags that are left open."""

    def __init__(self, text: str):
        super().__init__()
        self.words, self.images, self.open = "", [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        if tag == "img":
            kind, data = re.fullmatch(
                r"data:image/(\w+);base64,(.+)", dict(attributes)["src"]
            ).groups()
            self.images.append(Image.open(io.BytesIO(base64.b64decode(data))))
        elif tag != "br":
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words += f"{data}\n"


def captions_of(texts: list[str]) -> RegionCaptions:
    image = Image.new("RGB", (900, 600), GRAY)
    masks = []
    for k in range(len(texts)):
        mask = Image.new("L", image.size)
        mask.paste(255, (40 + 200 * k, 100, 200 + 200 * k, 400))
        masks.append(mask)
    return RegionCaptions(image=image, regions=Region.each(texts, masks), **COST)


def test_captions_stand_below_the_image_with_its_regions_marked():
    texts = ["a <b>red</b> mug & more", "", "a spoon\nin it"]
    page = Reader(captions_of(texts)._repr_html_())
    assert page.open == []
    assert page.words.split("\n")[:-1] == [
        *("1", "a <b>red</b> mug & more"),
        *("2", "(nothing)"),
        *("3", "a spoon in it"),
    ]
    (image,) = page.images
    pixels = np.asarray(image.convert("RGB")).astype(int)
    assert image.size == (900, 600)
    changed = np.abs(pixels - GRAY).max(-1) > 40
    assert changed[240:260, 38:46].any()  # the first region's left edge
    assert not changed[420:, :].any()  # nothing is written on the image


@pytest.mark.parametrize("size", [(4000, 3000), (9, 7)])
def test_a_notebook_keeps_images_of_a_moderate_size(size):
    mask = Image.new("L", size, 255)
    image = Image.new("RGB", size, GRAY)
    result = RegionCaptions(image=image, regions=Region.each(["all"], [mask]), **COST)
    (shown,) = Reader(result._repr_html_()).images
    assert 700 <= max(shown.size) <= 1000


def test_answers_stand_below_the_image():
    result = Answers(
        image=Image.new("RGB", (30, 20), GRAY),
        questions=["What <is> it?", "Why?"],
        answers=["a cup", ""],
        **COST,
    )
    page = Reader(result._repr_html_())
    assert page.words.split("\n")[:-1] == ["What <is> it?", "a cup", "Why?", "(nothing)"]
    assert len(page.images) == 1 and page.open == []


def test_without_html_the_drawing_is_shown():
    result = captions_of(["a mug", "a spoon"])
    assert Image.open(io.BytesIO(result._repr_png_())).size == result.draw().size
