"""Converted fixtures reproduce what the released implementations computed, in a fresh process."""

import pytest
from conversion_sources import VECTORS, case_names, replay_in_fresh_process
from perceptiondlm.convert_checkpoint import convert

SOURCES = {
    "region": "released-region",
    "wide": "wide/released-region",
    "base": "released-base",
    "llava": "released-llava",
}


@pytest.fixture(scope="module")
def replayed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("converted")
    vision = {"llava": VECTORS / "released-llava" / "vision"}
    converted = {
        kind: convert(VECTORS / name, folder / kind, vision_source=vision.get(kind))
        for kind, name in SOURCES.items()
    }
    return replay_in_fresh_process(converted, folder)


@pytest.mark.parametrize(
    ("kind", "name"), [(kind, name) for kind in SOURCES for name in case_names(kind)]
)
def test_a_converted_checkpoint_reproduces_the_recorded_case(replayed, kind, name):
    result = replayed[kind][name]
    assert result.pop("features") < 1e-4
    assert result.pop("logits") < 1e-4
    assert all(result.values()), result
