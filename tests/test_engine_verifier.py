"""Our own model as verifier: it is shown the region, and its two answers are compared."""

import math
import pickle

import pytest
from engine_data import Played, kept, rules, write_panoptic
from perceptiondlm.pipelines import captioners
from perceptiondlm.pipelines.captioners import CaptionRegions, ModelOptions, load_own
from perceptiondlm.pipelines.engine import run_engine
from perceptiondlm.pipelines.recipe import build_recipe
from perceptiondlm.pipelines.records import mask_of, open_images
from perceptiondlm.pipelines.region_verifier import (
    QUESTION,
    ModelVerification,
    ModelVerifier,
    VerifyRegions,
)
from perceptiondlm.pipelines.sources import PanopticSource
from perceptiondlm.pipelines.stages import make_stages
from test_engine_runs import expect_counts, values_of


@pytest.fixture
def records(tmp_path):
    write_panoptic(tmp_path / "data", [0, 1])
    folders = [str(tmp_path / "data" / name) for name in ("panoptic.json", "masks", "images")]
    source = PanopticSource(*folders)
    found = [source.read(item) for item in source.items()]
    for record in found:
        for region in record.regions:
            region.caption = f"A {region.category} of some color"
    return found


def verifier_of(pair, **options) -> ModelVerifier:
    verifier = ModelVerifier(ModelVerification(checkpoint="own", **options))
    verifier.__dict__["_loaded"] = pair
    return verifier


def yes_by_hand(model, processor, record) -> list[float]:
    """The probability of Yes against No for each region, each answer scored in its own call."""
    ((_, image),) = open_images([record], "test")
    masks = [mask_of(region) for region in record.regions]
    questions = [QUESTION.format(caption=r.caption, category=r.category) for r in record.regions]
    options = {"method": "one_pass", "length": 0, "processor": processor, "prompts": questions}
    yes, no = (model.diffusion_score(image, masks, text, **options)[0] for text in ("Yes", "No"))
    return [1 / (1 + math.exp(n - y)) for y, n in zip(yes, no, strict=True)]


@pytest.mark.parametrize("side", [-1e-3, 1e-3])
def test_a_region_is_kept_up_to_its_own_probability_of_yes(make, records, side):
    """The threshold a little below, and a little above, that of one region among many."""
    model, processor = make(region_layout="independent")
    expected = [yes_by_hand(model, processor, record) for record in records]
    threshold = expected[0][1] + side
    verifier = verifier_of((model, processor), min_yes=threshold)
    keys = [[region.key for region in record.regions] for record in records]
    VerifyRegions(verifier)(records)

    for record, names, probabilities in zip(records, keys, expected, strict=True):
        own = [name for name, yes in zip(names, probabilities, strict=True) if yes >= threshold]
        assert [region.key for region in record.regions] == own
        assert set(rules(record).values()) <= {"category"}
    assert (keys[0][1] in [region.key for region in records[0].regions]) is (side < 0)


def test_what_the_model_refuses_is_no_answer_and_the_others_are_asked(make, records):
    pair = make(region_layout="independent")
    records[0].regions[0].caption = "Beside <region 99>, a star"  # of which there is none
    total = len(records[0].regions)
    VerifyRegions(verifier_of(pair, min_yes=0.0))(records)
    assert rules(records[0]) == {r.region.key: "no answer" for r in records[0].dropped}
    assert len(records[0].dropped) == total and records[1].dropped == []


def test_an_image_that_cannot_be_read_drops_its_regions(make, records, tmp_path):
    (tmp_path / "data" / "images" / "0.png").write_bytes(b"no image")
    VerifyRegions(verifier_of(make(region_layout="independent"), min_yes=0.0))(records)
    assert set(rules(records[0]).values()) == {"image"} and kept(records[1])


def test_a_captioner_and_a_verifier_of_one_checkpoint_share_it(monkeypatch):
    loaded = []
    monkeypatch.setattr(captioners, "load_model", lambda *a, **k: loaded.append(a) or (a, None))
    captioners._load_once.cache_clear()
    options = {"checkpoint": "shared", "device": "cpu"}
    one = load_own(ModelOptions(**options))
    assert load_own(ModelVerification(**options)) is one and len(loaded) == 1
    load_own(ModelVerification(**options, dtype="float32"))
    assert len(loaded) == 2
    captioners._load_once.cache_clear()


def test_counts_add_up_through_the_engine(make, tmp_path):
    total = write_panoptic(tmp_path / "data", [0, 1])
    values = values_of(tmp_path, "coconut", verifier={"kind": "model", "checkpoint": "own"})
    recipe = build_recipe(values)
    stages = make_stages(recipe)
    assert pickle.loads(pickle.dumps(stages[1])).verifier.options == recipe.verifier
    stages[1].verifier.__dict__["_loaded"] = make(region_layout="independent")
    stages[0] = CaptionRegions(Played({}))
    expect_counts(run_engine(recipe, stages=stages), tmp_path / "out", total)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "expected verifier.checkpoint, a folder or Hub id, got none"),
        ({"prompt": "{caption}?"}, r"expected \{caption\} and \{category\} in the prompt"),
        ({"answers": ["Yes"]}, "expected verifier.answers as two texts"),
        ({"answers": ["Yes", "Yes"]}, "expected verifier.answers as two texts"),
        ({"min_yes": 1.5}, "verifier.min_yes between 0 and 1"),
    ],
)
def test_options_of_no_use_are_refused(tmp_path, options, message):
    given = {"checkpoint": "own", **options} if options else {}
    with pytest.raises(ValueError, match=message):
        ModelVerification(**given)


def test_our_own_model_is_no_extractor_of_a_captions_category(tmp_path):
    (tmp_path / "data").mkdir()
    values = values_of(tmp_path, categories={"kind": "model", "checkpoint": "own"})
    with pytest.raises(ValueError, match="categories.kind words, endpoint or transformers, got m"):
        build_recipe(values)
