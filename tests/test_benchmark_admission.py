"""The benchmark of short requests beside a long one: what it asks for, and what it makes of it."""

import numpy as np
import pytest

pytest.importorskip("fastapi", reason="the engine needs the package's apps extra")

from perceptiondlm.benchmarks import admission, admission_client  # noqa: E402


def test_medians_are_of_the_rounds_after_the_first_and_ratios_of_those():
    def found(seconds: list[float], long: float) -> dict:
        return {"short_seconds": seconds, "long_seconds": long, "captions": [["a"]]}

    rounds = {
        "this": [found([9, 9, 9], 99), found([1, 2, 9], 10), found([3, 4, 5], 12)],
        "against": [found([1, 1, 1], 1), found([5, 6, 7], 20), found([6, 6, 8], 24)],
    }
    result = admission.summary(rounds)
    assert result["engines"]["this"]["rounds"] == [2, 4]
    assert result["engines"]["this"]["slowest"] == [9, 5]
    assert result["engines"]["this"]["median_seconds"] == 3
    assert result["ratio"] == 3 / 6 and result["long_seconds_ratio"] == 11 / 22
    assert result["same_captions"]
    rounds["against"][2]["captions"] = [["b"]]
    assert not admission.summary(rounds)["same_captions"]


def test_one_checkout_has_no_ratio():
    one = {"short_seconds": [2.0], "seconds": 4.0, "captions": []}
    result = admission.summary({"this": [one]})
    assert result == {
        "engines": {"this": {"rounds": [2], "slowest": [2], "seconds": [4], "median_seconds": 2}}
    }


def test_each_request_is_about_an_image_of_its_own_and_the_same_in_every_process():
    first, second = (admission_client.drawn_job(number, 3) for number in (0, 1))
    again = admission_client.drawn_job(0, 3)
    assert first.digest == again.digest != second.digest
    assert [int(np.asarray(mask).astype(bool).sum()) for mask in first.masks] == [24 * 24] * 3
