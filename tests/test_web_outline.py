"""The page's outlines, as its script asks for them: masks, or why there are none."""

import base64
import io
import json
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("gradio", reason="the page needs the package's apps extra")
pytest.importorskip("cv2", reason="the offline segmenter needs the package's regions extra")
pytest.importorskip("skimage", reason="the offline segmenter needs the package's regions extra")

from perceptiondlm.apps.serving.limits import Limits  # noqa: E402
from perceptiondlm.apps.web import command  # noqa: E402
from perceptiondlm.apps.web.page import Page  # noqa: E402
from perceptiondlm.common.extras import MissingExtra  # noqa: E402
from perceptiondlm.regions.segmenters import load_segmenter  # noqa: E402
from PIL import Image  # noqa: E402
from serving import data_url  # noqa: E402

IMAGE = Path(__file__).parent / "fixtures" / "vectors" / "region_0.png"  # 150x140


@pytest.fixture(scope="module")
def page():
    return Page(None, "tester", Limits(masks=4), load_segmenter())


def asked(image, points=None, boxes=None) -> dict:
    return {"image": image, "points": points, "boxes": boxes}


def masks_of(answer: dict) -> list[np.ndarray]:
    files = [base64.b64decode(url.partition(",")[2]) for url in answer["urls"]]
    return [np.asarray(Image.open(io.BytesIO(file))) != 0 for file in files]


@pytest.mark.parametrize(
    ("points", "boxes"),
    [([[20, 30]], None), (None, [[10, 20, 90, 110]]), ([[20, 30]], [[10, 20, 90, 110]])],
)
def test_outlines_are_the_segmenters_masks_of_the_images_size(page, points, boxes):
    expected = load_segmenter()(Image.open(IMAGE), points=points, boxes=boxes)
    masks = masks_of(page.outline(asked(data_url(IMAGE), points, boxes)))
    assert len(masks) == len(expected)
    for mask, region in zip(masks, expected, strict=True):
        assert (mask == region.mask).all()


def test_of_everything_one_more_comes_than_may_be_sent_so_that_the_page_says_so(page):
    expected = load_segmenter()(Image.open(IMAGE))
    assert len(expected) > 5
    masks = masks_of(page.outline(asked(data_url(IMAGE))))
    assert len(masks) == 5 and (masks[4] == expected[4].mask).all()


@pytest.mark.parametrize(
    "sent",
    [
        asked(data_url(IMAGE), [[-1, 3]], None),
        asked(data_url(IMAGE), [[150, 3]], None),
        asked(data_url(IMAGE), None, [[5, 5, 5, 9]]),
        asked(data_url(IMAGE), [["a", 1]], None),
        asked(data_url(IMAGE), [[None, None]], None),
        asked(data_url(IMAGE), 3, None),
        asked(data_url(IMAGE), {"x": 1}, None),
        asked(data_url(IMAGE), [[1, 1]] * 5, None),
        asked(data_url(Image.new("RGB", (9, 9))), None, None),
        asked("/etc/passwd", [[1, 1]], None),
        asked(None, [[1, 1]], None),
        asked(data_url(IMAGE)) | {"text": "mug"},
        {},
        None,
    ],
    ids=range(14),
)
def test_what_cannot_be_outlined_is_a_problem_in_words(page, sent):
    answer = json.loads(json.dumps(page.outline(sent)))
    assert set(answer) == {"problem"} and "Traceback" not in answer["problem"]
    assert answer["problem"].startswith(("expected", "the image"))


def test_the_command_says_which_segmenter_it_has_or_lacks(monkeypatch, capsys):
    assert command._load_segmenter(None) is not None
    assert "the offline segmenter" in capsys.readouterr().err

    def missing(name):
        raise MissingExtra(ImportError("No module named 'cv2'"), "regions")

    monkeypatch.setattr(command, "load_segmenter", missing)
    assert command._load_segmenter(None) is None
    assert "no outlines: No module named" in capsys.readouterr().err
    with pytest.raises(MissingExtra):
        command._load_segmenter("owner/name")
