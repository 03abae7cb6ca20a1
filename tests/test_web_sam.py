"""Masks from clicks, with a tiny SAM of random weights."""

import json
from pathlib import Path

import pytest
from perceptiondlm.apps.serving.limits import Limits
from perceptiondlm.apps.web.sam import find_sam
from PIL import Image
from serving import data_url
from transformers import SamConfig, SamModel, SamProcessor

IMAGE = Path(__file__).parent / "fixtures" / "vectors" / "region_0.png"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    kind = pytest.importorskip("transformers.models.sam.image_processing_pil_sam")
    size = {"image_size": 64, "patch_size": 8}
    config = SamConfig(
        vision_config={
            "hidden_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "mlp_dim": 16,
            "output_channels": 16,
            "num_pos_feats": 8,
            "global_attn_indexes": [0],
            "window_size": 2,
            **size,
        },
        prompt_encoder_config={"hidden_size": 16, "mask_input_channels": 4, **size},
        mask_decoder_config={
            "hidden_size": 16,
            "mlp_dim": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "iou_head_hidden_dim": 16,
        },
    )
    path = tmp_path_factory.mktemp("sam")
    SamModel(config).save_pretrained(path)
    processor = kind.SamImageProcessorPil(
        size={"longest_edge": 64},
        mask_size={"longest_edge": 16},
        pad_size={"height": 64, "width": 64},
        mask_pad_size={"height": 16, "width": 16},
    )
    SamProcessor(processor).save_pretrained(path)
    return path


def test_a_click_gives_a_mask_of_the_pictures_size(folder):
    picture = Image.open(IMAGE).convert("RGB")
    mask = find_sam(str(folder))(picture, 20, 30)
    assert mask.size == picture.size and set(mask.tobytes()) <= {0, 255}


def test_without_weights_there_is_no_clicking():
    assert find_sam() is None
    with pytest.raises(OSError, match="no such file or folder"):
        find_sam("/nowhere")


def test_the_pages_outline_answers_with_a_mask_or_says_why_not(folder):
    gradio = pytest.importorskip("gradio", reason="the page needs the package's apps extra")
    from perceptiondlm.apps.web.page import Page

    assert gradio
    page = Page(None, "tester", Limits(), find_sam(str(folder)))
    answer = page.outline(data_url(IMAGE), 20, 30)
    assert set(answer) in ({"url"}, {"problem"})
    for arguments in (
        (data_url(IMAGE), -1, 3),
        ("/etc/passwd", 1, 1),
        (None, 1, 1),
        (data_url(IMAGE), "a", 1),
        (data_url(IMAGE), None, None),
    ):
        assert set(json.loads(json.dumps(page.outline(*arguments)))) == {"problem"}


def test_a_file_that_is_no_checkpoint_is_named(tmp_path):
    (tmp_path / "list.json").write_text("[1]")
    with pytest.raises(OSError, match="expected a SAM checkpoint in .*list.json"):
        find_sam(str(tmp_path / "list.json"))
