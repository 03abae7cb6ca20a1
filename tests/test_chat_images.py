"""Chat templates take images in every form that other processors take."""

import base64
import io

import pytest
import torch


@pytest.fixture(scope="module")
def encoded(draw_image):
    """An image as PNG bytes, and as base64 text."""
    buffer = io.BytesIO()
    draw_image(61, 47).save(buffer, "PNG")
    return buffer.getvalue(), base64.b64encode(buffer.getvalue()).decode()


def ask(processor, part: dict):
    content = [{"type": "image", **part}, {"type": "text", "text": "What?"}]
    message = [{"role": "user", "content": content}]
    return processor.apply_chat_template(
        message, tokenize=True, return_dict=True, add_generation_prompt=True
    )


@pytest.mark.parametrize("form", ["url", "image", "base64", "path", "wrapped"])
def test_an_image_of_a_conversation_can_have_any_form(make, draw_image, encoded, tmp_path, form):
    _, processor = make()
    data, text = encoded
    (tmp_path / "a.png").write_bytes(data)
    lines = "\n".join(text[i : i + 76] for i in range(0, len(text), 76))
    parts = {
        "url": {"url": f"data:image/png;base64,{text}"},
        "image": {"image": f"data:image/png;base64,{text}"},
        "base64": {"base64": text},
        "wrapped": {"base64": lines},
        "path": {"path": str(tmp_path / "a.png")},
    }
    got, expected = ask(processor, parts[form]), ask(processor, {"image": draw_image(61, 47)})
    assert torch.equal(got["input_ids"], expected["input_ids"])
    assert torch.equal(got["pixel_values"], expected["pixel_values"])
