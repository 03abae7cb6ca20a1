"""What an image judge is shown: windows worked out by hand, and the messages around them."""

import base64
import io

import numpy as np
import pytest
from perceptiondlm.common.crops import crop_window, png_data_url
from perceptiondlm.evaluation.benchmarks import load_benchmark
from perceptiondlm.evaluation.crops import region_crops
from perceptiondlm.evaluation.judge_prompts import (
    PROMPT_VERSION,
    JudgePrompt,
    default_mode,
    lettered,
)
from PIL import Image
from test_evaluation_benchmarks import SIZE, box_rle, edit, write_paradlc


def mask_of(size: tuple[int, int], x0: int, y0: int, x1: int, y1: int) -> np.ndarray:
    mask = np.zeros(size, dtype=np.uint8)
    mask[y0:y1, x0:x1] = 1
    return mask


@pytest.mark.parametrize(
    ("size", "box", "window"),
    [
        # 60x80 box at (200, 300): one box more on each side
        ((1000, 1000), (200, 300, 260, 380), (140, 220, 320, 460)),
        # 10x20 box: sides become 56 about the center (105, 210): corner (77, 182), then 3x
        ((1000, 1000), (100, 200, 110, 220), (21, 126, 189, 294)),
        # one wide side: 100 stays, 9 becomes 56; center y 54.5, corner int(26.5) = 26
        ((1000, 1000), (300, 50, 400, 59), (200, 0, 500, 138)),
        # in the corner: center (2, 2), corner -26; cut at 0, far end -26 + 112
        ((1000, 1000), (0, 0, 4, 4), (0, 0, 86, 86)),
        # half a pixel beyond the border: center 27.5, corner int(-0.5) = 0, not -1
        ((1000, 1000), (27, 27, 28, 28), (0, 0, 112, 112)),
        # cut at the far borders: corner (872, 922), ends at the image's
        ((980, 950), (890, 940, 910, 960), (816, 866, 950, 980)),
        # a small image is shown whole
        ((40, 60), (5, 4, 12, 20), (0, 0, 60, 40)),
    ],
)
def test_the_window_is_three_boxes_of_at_least_56_pixels(size, box, window):
    assert crop_window(mask_of(size, *box)) == window


def test_an_empty_mask_has_no_window():
    with pytest.raises(ValueError, match="at least one non-zero pixel"):
        crop_window(np.zeros((5, 5)))


def test_crops_of_image_and_mask_agree(tmp_path):
    folder = write_paradlc(tmp_path)
    edit(folder / "annotations.json", lambda c: grow(c[0], (400, 300)))
    Image.new("RGB", (300, 400), (9, 99, 199)).save(folder / "images" / "0.png")
    image, mask = region_crops(load_benchmark(folder).samples[0])
    # 100x74 box at (200, 50): columns 100 to 400, cut at 300; rows -24 to 198, cut at 0
    assert image.size == mask.size == (200, 198)
    assert image.getpixel((0, 0)) == (9, 99, 199)
    inside = np.asarray(mask)
    assert set(np.unique(inside)) == {0, 255}
    assert np.argwhere(inside).min(axis=0).tolist() == [50, 100]
    assert np.count_nonzero(inside) == 100 * 74


def grow(image: dict, size: tuple[int, int]):
    """Another size for the first image: a 100x74 box at (200, 50) is its first region."""
    image.update(height=size[0], width=size[1])
    image["annotations"] = image["annotations"][:1] + [
        {**image["annotations"][1], "mask_rle": box_rle(1, 1, 9, 9, size)}
    ]
    image["annotations"][0]["mask_rle"] = box_rle(200, 50, 300, 124, size)


def test_an_image_of_another_size_is_refused(tmp_path):
    folder = write_paradlc(tmp_path)
    Image.new("RGB", (61, 40)).save(folder / "images" / "0.png")
    with pytest.raises(ValueError, match="0.png: expected the annotated 60x40.*got 61x40"):
        region_crops(load_benchmark(folder).samples[0])


def test_a_data_url_holds_the_very_pixels():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (7, 5, 3), dtype=np.uint8))
    head, data = png_data_url(image).split(",")
    assert head == "data:image/png;base64"
    decoded = Image.open(io.BytesIO(base64.b64decode(data)))
    assert np.array_equal(np.asarray(decoded), np.asarray(image))


def messages_of(folder, mode: str) -> list:
    benchmark = load_benchmark(folder)
    sample = benchmark.samples[0]
    questions = benchmark.questions[sample.key]
    return JudgePrompt(mode).region_messages(sample, questions, "a red {dog}")


def test_an_image_judge_is_shown_the_region_then_asked(tmp_path):
    messages = messages_of(write_paradlc(tmp_path), "image")
    assert len(messages) == 3  # recognition and two questions
    [message] = messages[0]
    kinds = [part["type"] for part in message["content"]]
    assert kinds == ["text", "image_url", "text", "image_url", "text"]
    assert (
        "given class: hound 70_0 or object of a similar type?\nA. Yes\nB. No"
        in (message["content"][-1]["text"])
    )


def test_a_text_judge_is_shown_no_image(tmp_path):
    messages = messages_of(write_paradlc(tmp_path), "text")
    content = messages[1][0]["content"]
    assert isinstance(content, str) and "a red {dog}" in content
    assert "Which applies?\nA. It is red.\nB. It is not mentioned.\nC. It is blue." in content
    assert "hound 70_0" in messages[0][0]["content"]


def test_a_question_is_lettered():
    assert lettered("Which?", ("x", "y")) == "Which?\nA. x\nB. y"


def test_the_published_benchmarks_have_their_modes(tmp_path):
    benchmark = load_benchmark(write_paradlc(tmp_path))
    assert default_mode(benchmark) == "image" and SIZE == benchmark.samples[0].size


def test_another_wording_has_another_version(tmp_path):
    file = tmp_path / "prompt.txt"
    file.write_text("{caption} -> {question}")
    prompt = JudgePrompt.from_file(file, "text")
    assert prompt.version.startswith("file-") and prompt.version != PROMPT_VERSION
    file.write_text("{caption}")
    with pytest.raises(ValueError, match="fields {caption} and {question}, got"):
        JudgePrompt.from_file(file, "text")
    file.write_text("Is it {caption}?\n---\n{caption} -> {question}")
    with pytest.raises(ValueError, match="fields {name}, got"):
        JudgePrompt.from_file(file, "text")
    with pytest.raises(ValueError, match="mode to be one of"):
        JudgePrompt("voice")


def test_a_prompt_file_may_word_the_recognition_question(tmp_path):
    sample = load_benchmark(write_paradlc(tmp_path)).samples[0]
    file = tmp_path / "prompt.txt"
    file.write_text("Is it of the class {name}?\n---\n{caption} -> {question}")
    prompt = JudgePrompt.from_file(file, "text")
    (message,), *_ = prompt.region_messages(sample, (), "a tabby")
    assert message["content"].startswith(f"a tabby -> Is it of the class {sample.class_name}?\nA.")
