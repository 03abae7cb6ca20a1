"""What scores tell: the area under the ROC curve, and a trained model on a few scenes."""

import itertools

import pytest
from perceptiondlm.common.loading import load_model
from perceptiondlm.evaluation.confidence import calibration, measure, roc_area
from perceptiondlm.evaluation.held_out import held_out_scenes
from shapes import ROOT, SHAPES


def test_the_area_counts_pairs():
    scores, right = [0.1, 0.4, 0.35, 0.8, 0.4], [False, False, True, True, True]
    pairs = [
        1.0 if a > b else 0.5 if a == b else 0.0
        for (a, good), (b, other) in itertools.product(zip(scores, right, strict=True), repeat=2)
        if good and not other
    ]
    assert roc_area(scores, right) == pytest.approx(sum(pairs) / len(pairs))
    assert roc_area(scores, [True] * 5) is None


def test_calibration_compares_probabilities_with_how_often_they_are_right():
    found = calibration([0.95, 0.9, 1.0, 0.25, 0.05], [True, True, False, False, True])
    counts = [(row["from"], row["count"], row["right"]) for row in found["bins"]]
    assert counts == [(0.0, 1, 1.0), (0.2, 1, 0.0), (0.9, 3, pytest.approx(2 / 3))]
    by_hand = (1 * abs(0.05 - 1) + 1 * abs(0.25 - 0) + 3 * abs(0.95 - 2 / 3)) / 5
    assert found["calibration_error"] == pytest.approx(by_hand)
    assert calibration([], []) == {"bins": [], "calibration_error": None}


@pytest.mark.parametrize("stranger", [-0.7, 1.01, float("nan")])
def test_what_is_no_probability_has_no_calibration(stranger):
    with pytest.raises(ValueError, match=f"probabilities from 0 to 1, got {stranger}"):
        calibration([0.5, stranger], [True, False])


def test_a_trained_model_finds_the_region_of_a_caption():
    model, processor = load_model(ROOT, SHAPES)
    found = measure(model, processor, held_out_scenes(0, 3, progress=False), {}, "one_pass")
    assert found["region_found"] >= 0.9 and found["regions"] >= found["captions_looked_for"]
    bins = found["calibration"]["bins"]  # exp of scores, which lie near 0
    assert sum(row["count"] for row in bins) == found["regions"]
    assert all(row["from"] <= row["mean_probability"] <= row["to"] for row in bins)
    assert bins[-1]["from"] == 0.9
