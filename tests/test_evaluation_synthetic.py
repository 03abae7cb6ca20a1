"""The synthetic benchmark: written, judged and scored through the commands a user types."""

import json

import pytest
from perceptiondlm.apps.cli import main
from perceptiondlm.evaluation.benchmarks import load_benchmark
from perceptiondlm.evaluation.files import read_json
from perceptiondlm.evaluation.predict import predict
from perceptiondlm.evaluation.synthetic_folder import exact_answers, region_questions
from perceptiondlm.scenes.language import caption_of
from perceptiondlm.scenes.shapes import render_scene

OWN = {"shape": "star", "colour": "red", "size": "small", "pattern": "plain", "position": "top"}
OTHER = {"shape": "ring", "colour": "blue", "size": "large", "pattern": "plain", "position": "left"}


@pytest.mark.parametrize(
    ("caption", "answers"),
    [
        # recognition; shape, colour, size, pattern, position; the other region
        (caption_of(OWN), ["Yes", "A", "A", "A", "A", "A", "B"]),
        (caption_of(OTHER), ["No", "C", "C", "C", "A", "C", "A"]),
        ("a star", ["Yes", "A", "B", "B", "B", "B", "B"]),
        ("a red and blue star", ["Yes", "A", "C", "B", "B", "B", "A"]),
        ("a large green star", ["Yes", "A", "C", "C", "B", "B", "B"]),  # sizes tell nothing apart
        ("", ["No", "B", "B", "B", "B", "B", "B"]),
    ],
)
def test_the_judge_answers_from_the_truth(caption, answers):
    assert exact_answers(caption, OWN, [OTHER]) == answers


def test_questions_are_of_the_published_form():
    questions = region_questions(OWN, [OTHER, OTHER])
    assert [q["type"] for q in questions] == ["positive"] * 5 + ["negative"] * 2
    assert questions[1]["choices"][0] == ["The colour is given as red and nothing else.", 1]
    assert questions[5]["subtype"] == "salient negative"


def judged(tmp_path, captions: dict) -> tuple[dict, dict]:
    """Scores and the exact accuracies of captions, through the commands."""
    bench, files = tmp_path / "bench", [str(tmp_path / f"{n}.json") for n in ("c", "a", "s")]
    (tmp_path / "c.json").write_text(json.dumps(captions))
    given = ["--benchmark", str(bench), "--predictions", files[0], "--output", files[1]]
    assert main(["evaluate", "synthetic", "judge", *given]) == 0
    given = ["--annotations", str(bench), "--answers", files[1], "--output", files[2]]
    assert main(["evaluate", "score", *given]) == 0
    return read_json(files[2]), read_json(tmp_path / "a.run.json")["exact"]


@pytest.fixture
def bench(tmp_path):
    folder = tmp_path / "bench"
    given = ["--scenes", "3", "--start", "10", "--output", str(folder)]
    assert main(["evaluate", "synthetic", "write", *given]) == 0
    return load_benchmark(folder)


def test_true_captions_score_everything(tmp_path, bench):
    truth = read_json(tmp_path / "bench" / "truth.json")
    scores, exact = judged(tmp_path, {key: caption_of(own) for key, own in truth.items()})
    assert scores["summary"] == {
        "average_positive": 1,
        "average_negative": 1,
        "average": 1,
    }
    assert exact["attribute_accuracy"] == exact["exact_caption_rate"] == 1
    assert scores["interference"]["mentioned_rate"] == 0


def test_captions_of_a_neighbor_are_interference(tmp_path, bench):
    truth = read_json(tmp_path / "bench" / "truth.json")
    keys = list(truth)
    swapped = {a: caption_of(truth[b]) for a, b in zip(keys, [*keys[1:], keys[0]], strict=True)}
    scores, exact = judged(tmp_path, swapped)
    assert scores["summary"]["average"] < 0.5
    assert scores["interference"]["mentioned_rate"] > 0 and exact["interference_rate"] > 0


def test_missing_captions_are_reported_and_wrong(tmp_path, bench):
    truth = read_json(tmp_path / "bench" / "truth.json")
    captions = {key: caption_of(own) for key, own in truth.items()}
    lost = next(iter(captions))
    del captions[lost]
    scores, exact = judged(tmp_path, captions)
    assert scores["missing"]["regions"] == [lost] and exact["missing"] == 1
    assert scores["summary"]["average_positive"] == pytest.approx(1 - 1 / len(truth))


def test_written_masks_and_images_are_the_scenes_own(tmp_path, bench):
    from types import SimpleNamespace

    import numpy as np

    scene = render_scene(10, "heldout")
    seen = []

    def generate(*, images, masks, processor):
        seen.append((images[0], [np.asarray(mask) > 0 for mask in masks[0]]))
        return SimpleNamespace(
            texts=[["x"] * len(m) for m in masks],
            token_ids=[[[1]] * len(m) for m in masks],
            num_forwards=1,
        )

    config = SimpleNamespace(eot_token_id=0, eos_token_id=None)
    model = SimpleNamespace(diffusion_generate=generate, config=config, device="cpu")
    predict(model, None, bench.samples, tmp_path / "c.json", progress=False)
    image, masks = seen[0]
    assert np.array_equal(np.asarray(image), np.asarray(scene.image.convert("RGB")))
    for mask, thing in zip(masks, scene.objects, strict=True):
        assert np.array_equal(mask, thing.mask)


def test_no_scenes_are_refused(tmp_path, capsys):
    given = ["--scenes", "0", "--output", str(tmp_path)]
    assert main(["evaluate", "synthetic", "write", *given]) == 2
    assert "expected scenes of 1 or more, got 0" in capsys.readouterr().err
