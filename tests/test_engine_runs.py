"""The data engine from end to end: synthetic SA-1B and COCONut, played models, real files."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import datasets
import pytest
import yaml
from engine_data import (
    Found,
    Played,
    PlayedSegmenter,
    caption_of,
    record_of,
    rectangle,
    write_panoptic,
    write_sa1b,
)
from perceptiondlm.apps.cli import main
from perceptiondlm.image_masks import decode_rle
from perceptiondlm.pipelines.captioners import CaptionRegions, ModelCaptioner, ModelOptions
from perceptiondlm.pipelines.categories import ExtractCategories, VerifyCategories, head_nouns
from perceptiondlm.pipelines.engine import run_engine
from perceptiondlm.pipelines.mask_checks import CheckMasks, MaskCheckOptions
from perceptiondlm.pipelines.mask_filters import MaskFilters, MaskOptions
from perceptiondlm.pipelines.output import link_image
from perceptiondlm.pipelines.recipe import build_recipe
from perceptiondlm.pipelines.stages import make_stages
from perceptiondlm.pipelines.text_filters import TextFilters, TextOptions
from perceptiondlm.scenes.shapes import render_scene
from perceptiondlm.training.recipe import build_recipe as build_training_recipe
from perceptiondlm.training.run import train
from PIL import Image
from shapes import ROOT, SHAPES
from test_judge_server import completion, error, serving
from training_runs import losses_of, recipe_values

SEEDS = range(5)
MASKS = {"min_pixels": 16, "min_area_share": 0.0, "max_border_share": 1.0, "max_hull_covered": 1.0}
TEXTS = {"max_overlap": 1.0}


def recipe_of(folder: Path, branch: str = "sa1b", **sections):
    return build_recipe(values_of(folder, branch, **sections))


def values_of(folder: Path, branch: str = "sa1b", **sections) -> dict:
    sources = {
        "sa1b": {"kind": "sa1b", "path": str(folder / "data")},
        "coconut": {
            "kind": "panoptic",
            "annotations": str(folder / "data" / "panoptic.json"),
            "masks": str(folder / "data" / "masks"),
            "images": str(folder / "data" / "images"),
        },
    }
    output = {"folder": str(folder / "out"), "part_images": 2, "batch_images": 2, "card": False}
    values = {
        "branch": branch,
        "source": sources[branch],
        "captioner": {"kind": "model", "checkpoint": "played"},
        **sections,
    }
    values["output"] = {**output, **sections.get("output", {})}
    return values


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def expect_counts(summary: dict, folder: Path, total: int):
    """Every region is in one of the two files, once, and each stage's counts add up."""
    records, dropped = lines(folder / "records.jsonl"), lines(folder / "dropped.jsonl")
    names = [(line["key"], name) for line in records for name in line["regions"]]
    names += [(row["key"], row["region"]) for row in dropped]
    assert len(names) == len(set(names)) == total

    left = total
    for name, count in summary["stages"].items():
        assert count["regions_in"] == left, name
        left = count["regions_out"]
        assert count["regions_in"] == left + sum(count["dropped"].values())
        rows = [row["rule"] for row in dropped if row["stage"] == name]
        assert {rule: rows.count(rule) for rule in rows} == count["dropped"]
    assert left == summary["regions"] == sum(len(line["captions"]) for line in records)
    assert all(row["reason"] for row in dropped)
    assert json.loads((folder / "summary.json").read_text()) == summary


def test_sa1b_goes_through_all_stages(tmp_path):
    counts = write_sa1b(tmp_path / "data", SEEDS, extra=2)
    total, specks = sum(counts.values()), 2 * len(counts)
    wrong = {1: None, 2: "I'm sorry, I cannot describe it", 3: "with of the"}
    found = {}  # by name, every object of that shape; no star is found
    for seed in SEEDS:
        for thing in render_scene(seed).objects:
            found.setdefault(thing.attributes["shape"], []).append(Found(thing.mask))
    stars = sum(len(found.get(name, [])) for name in ("star",))
    found.pop("star", None)

    class Segmenter(PlayedSegmenter):
        def __call__(self, image, text):
            size = image.size[::-1]
            return [one for one in super().__call__(image, text) if one.mask.shape == size]

    stages = [
        MaskFilters(MaskOptions(**MASKS)),
        CaptionRegions(Played(wrong)),
        ExtractCategories(head_nouns),
        CheckMasks(MaskCheckOptions(segmenter="played"), Segmenter(found)),
        TextFilters(TextOptions(**TEXTS)),
    ]
    recipe = recipe_of(tmp_path, output={"max_regions": 2})
    summary = run_engine(recipe, stages=stages)

    expect_counts(summary, tmp_path / "out", total)
    dropped = {name: count["dropped"] for name, count in summary["stages"].items()}
    assert dropped["read"] == {}
    assert dropped["masks"] == {"tiny": specks}
    assert dropped["caption"] == {"no caption": 1}
    assert dropped["categories"] == {"no category": 1}
    assert dropped["mask_check"].get("not found", 0) <= stars + 1  # stars, and the refusal
    assert summary["regions"] > total - specks - 3 - stars - 1

    for line in lines(tmp_path / "out" / "records.jsonl"):
        assert len(line["captions"]) <= 2
        image = Image.open(tmp_path / "out" / line["image"])
        for rle, caption in zip(line["mask_rles"], line["captions"], strict=True):
            truth = caption_of(image, decode_rle(rle, image.size))
            assert caption.startswith(truth)


def test_coconut_keeps_captions_of_the_annotated_category(tmp_path):
    total = write_panoptic(tmp_path / "data", SEEDS)
    stages = make_stages(recipe_of(tmp_path, "coconut", verifier={"kind": "words"}, texts=TEXTS))
    stages[0] = CaptionRegions(Played({2: "A small brown dog sleeping on a mat"}))
    assert [type(stage) for stage in stages] == [CaptionRegions, VerifyCategories, TextFilters]

    summary = run_engine(recipe_of(tmp_path, "coconut"), stages=stages)
    expect_counts(summary, tmp_path / "out", total)
    (row,) = lines(tmp_path / "out" / "dropped.jsonl")
    assert (row["stage"], row["rule"]) == ("verify", "category") and "dog" in row["caption"]
    assert summary["regions"] == total - 1


def test_an_endpoint_with_every_trouble_ends_with_every_region_once(tmp_path, monkeypatch, capsys):
    """By the command, from the recipe's file; of the same regions each time."""
    monkeypatch.setenv("OPENAI_API_KEY", "sk-x")
    total = write_panoptic(tmp_path / "data", range(2))
    slow = completion("A slow caption of a thing that is here")
    slow.delay = 0.8

    def script(number, body):
        kind = body["model"]
        if kind == "judge":
            return completion("No." if number % 5 == 0 else "Yes")
        trouble = {0: error(429, Retry_After="0.05"), 1: error(500), 2: slow, 3: error(400, "long")}
        return trouble.get(number, completion(f"A blue thing with number {number} on its side"))

    with serving(script) as server:
        ask = {"kind": "endpoint", "base_url": server.url, "first_delay": 0.01, "timeout": 0.4}
        values = values_of(
            tmp_path,
            "coconut",
            captioner={**ask, "model": "eye", "concurrency": 4},
            verifier={**ask, "model": "judge"},
            texts=TEXTS,
        )
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values))
        assert main(["engine", str(tmp_path / "recipe.yaml")]) == 0
        asked = len(server.requests)

        summary = json.loads((tmp_path / "out" / "summary.json").read_text())
        expect_counts(summary, tmp_path / "out", total)
        assert summary["stages"]["caption"]["dropped"] == {"no caption": 1}  # the refused one
        assert "verify" in capsys.readouterr().out

        # again from the beginning: everything but the refused call is answered from the disk
        assert main(["engine", str(tmp_path / "recipe.yaml"), "--restart"]) == 0
        assert asked < len(server.requests) <= asked + 2


def test_an_endpoint_that_goes_away_is_named_and_the_command_goes_on(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-x")
    total = write_sa1b(tmp_path / "data", SEEDS)
    captions = "A blue thing with number {} on its side"

    def dies(number, body):
        return completion(captions.format(number)) if number < 8 else error(401, "expired")

    with serving(dies) as server:
        section = {"kind": "endpoint", "model": "m", "base_url": server.url, "concurrency": 2}
        values = values_of(tmp_path, captioner=section)
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values))
        assert main(["engine", str(tmp_path / "recipe.yaml")]) == 1
        assert "expired" in capsys.readouterr().err
        answered = server.answered
    with serving(lambda number, body: completion(captions.format(100 + number))) as server:
        values["captioner"]["base_url"] = server.url
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values))
        assert main(["engine", str(tmp_path / "recipe.yaml")]) == 0
        assert len(server.requests) == sum(total.values()) - answered
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    expect_counts(summary, tmp_path / "out", sum(total.values()))


def test_training_reads_the_output_as_it_is(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    write_sa1b(tmp_path / "data", SEEDS)
    run_engine(recipe_of(tmp_path), stages=[CaptionRegions(Played({}))])
    values = recipe_values(tmp_path / "run", trainer={"max_steps": 2})
    values["data"] = {"kind": "regions", "files": [str(tmp_path / "out" / "records.jsonl")]}
    values["data"]["max_broken_share"] = 0.0
    assert len(losses_of(train(build_training_recipe(values)))) == 2


def test_paths_are_trained_on_with_the_image_root_that_the_summary_names(tmp_path):
    write_sa1b(tmp_path / "data", [0])
    recipe = recipe_of(tmp_path, output={"images": "path"})
    summary = run_engine(recipe, stages=[CaptionRegions(Played({}))])
    assert summary["train_with"] == f"data.image_root={tmp_path / 'data'}"
    assert not (tmp_path / "out" / "images").exists()
    (line,) = lines(tmp_path / "out" / "records.jsonl")
    assert (tmp_path / "data" / line["image"]).is_file()


def test_images_are_linked_and_take_no_room(tmp_path):
    write_sa1b(tmp_path / "data" / "deep", [0])
    run_engine(recipe_of(tmp_path), stages=[CaptionRegions(Played({}))])
    (line,) = lines(tmp_path / "out" / "records.jsonl")
    assert line["image"] == "images/deep/sa_0.jpg"
    linked, own = tmp_path / "out" / line["image"], tmp_path / "data" / "deep" / "sa_0.jpg"
    assert os.path.samefile(linked, own)


def test_our_own_model_captions_as_it_does_by_itself(tmp_path, make):
    model, processor = make()
    counts = write_sa1b(tmp_path / "data", [0, 1])
    captioner = ModelCaptioner(ModelOptions(checkpoint="own", decoding={"caption_length": 4}))
    captioner.__dict__["_loaded"] = model, processor
    run_engine(recipe_of(tmp_path), stages=[CaptionRegions(captioner)])

    captions = {}
    for line in lines(tmp_path / "out" / "records.jsonl"):
        for name, caption, score in zip(
            line["regions"], line["captions"], line["scores"], strict=True
        ):
            captions[line["key"], name] = caption, score
    dropped = lines(tmp_path / "out" / "dropped.jsonl")  # what it said nothing about
    assert len(captions) + len(dropped) == sum(counts.values())
    for seed in (0, 1):
        image = Image.open(tmp_path / "data" / f"sa_{seed}.jpg")
        masks = [thing.mask for thing in render_scene(seed).objects]
        out = model.diffusion_generate(image, masks, processor=processor, caption_length=4)
        for i, (text, score) in enumerate(zip(out.texts[0], out.scores[0], strict=True)):
            if text.strip():
                got = captions[f"sa_{seed}", str(100 * seed + i)]
                assert got == (text.strip(), pytest.approx(score, abs=1e-4))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"checkpoint": "./none"}, "expected a folder or the id of a Hub repository"),
        ({"checkpoint": str(ROOT), "subfolder": SHAPES, "decoding": {"step": 3}}, "step"),
        ({"checkpoint": str(ROOT), "subfolder": SHAPES, "decoding": {"steps": 0}}, "steps"),
    ],
)
def test_a_model_that_cannot_be_used_ends_the_run(tmp_path, capsys, options, message):
    """Instead of dropping every region for the same reason."""
    write_sa1b(tmp_path / "data", [0])
    values = values_of(tmp_path, captioner={"kind": "model", "device": "cpu", **options})
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values))
    assert main(["engine", str(tmp_path / "recipe.yaml")]) == 2
    assert message in capsys.readouterr().err


# Broken data.


def test_broken_images_are_dropped_with_their_reason_up_to_a_share(tmp_path):
    counts = write_sa1b(tmp_path / "data", SEEDS)
    (tmp_path / "data" / "sa_0.json").write_text("{")
    (tmp_path / "data" / "sa_1.jpg").write_bytes(b"no image")
    recipe = recipe_of(tmp_path, output={"part_images": 5})
    summary = run_engine(recipe, stages=[CaptionRegions(Played({}))])
    assert summary["broken_images"] == 2
    expect_counts(summary, tmp_path / "out", sum(counts.values()) - counts["sa_0"] + 1)
    assert summary["stages"]["caption"]["dropped"] == {"image": counts["sa_1"]}

    strict = recipe_of(tmp_path, output={"part_images": 5, "max_broken_share": 0.1})
    with pytest.raises(ValueError, match=r"0.1 of the images broken.*got 2 of 5.*sa_0.json"):
        run_engine(strict, stages=[CaptionRegions(Played({}))])


@pytest.mark.parametrize(("share", "stops"), [(0.25, False), (0.24, True)])
def test_one_broken_image_of_four_is_too_many_below_a_quarter(tmp_path, share, stops):
    counts = write_sa1b(tmp_path / "data", range(4))
    (tmp_path / "data" / "sa_0.json").write_text("{")
    recipe = recipe_of(tmp_path, output={"part_images": 4, "max_broken_share": share})
    if stops:
        with pytest.raises(ValueError, match="got 1 of 4"):
            run_engine(recipe, stages=[CaptionRegions(Played({}))])
    else:
        summary = run_engine(recipe, stages=[CaptionRegions(Played({}))])
        expect_counts(summary, tmp_path / "out", sum(counts.values()) - counts["sa_0"] + 1)


def test_images_that_are_missing_are_found_without_a_captioner_too(tmp_path):
    mask = {"size": [4, 4], "counts": [0, 8, 8]}
    values = {"image": "gone.png", "mask_rles": [mask, mask], "captions": ["a cup", None]}
    (tmp_path / "data.jsonl").write_text(json.dumps(values))
    source = {"kind": "lines", "path": str(tmp_path / "data.jsonl")}
    output = {"max_broken_share": 1.0}
    summary = run_engine(recipe_of(tmp_path, source=source, captioner=None, output=output))
    assert summary["stages"]["output"]["dropped"] == {"no caption": 1, "image": 1}
    expect_counts(summary, tmp_path / "out", 2)


def test_a_captioner_that_says_nothing_stops_the_run(tmp_path):
    write_sa1b(tmp_path / "data", SEEDS)
    silent = CaptionRegions(Played(dict.fromkeys(range(99))))
    with pytest.raises(ValueError, match=r"got 2 of 2, say: expected a caption, got: played"):
        run_engine(recipe_of(tmp_path), stages=[silent])


def test_images_that_are_bytes_or_on_another_disk_are_written(tmp_path, monkeypatch):
    record = record_of(rectangle((4, 4), 0, 0, 2, 2))
    record.image, record.name = b"bytes", "deep/a.png"
    assert link_image(record, tmp_path) == "images/deep/a.png"
    assert (tmp_path / "images" / "deep" / "a.png").read_bytes() == b"bytes"

    def refuse(*_):
        raise OSError("another device")

    monkeypatch.setattr(os, "link", refuse)
    (tmp_path / "own.png").write_bytes(b"own")
    record.image, record.name = str(tmp_path / "own.png"), "b.png"
    assert link_image(record, tmp_path) == link_image(record, tmp_path) == "images/b.png"
    assert (tmp_path / "images" / "b.png").read_bytes() == b"own"
    assert {path.name for path in (tmp_path / "images").iterdir()} == {"deep", "b.png"}


# Going on.


def test_a_run_goes_on_after_its_last_part(tmp_path):
    counts = write_sa1b(tmp_path / "data", SEEDS)
    played = Played({})
    run_engine(recipe_of(tmp_path), stages=[CaptionRegions(played)])
    first = (tmp_path / "out" / "records.jsonl").read_bytes()
    done = played.number
    (tmp_path / "out" / "parts" / "000001.json").unlink()

    played.number = counts["sa_0"] + counts["sa_1"]  # the captions hold these numbers
    summary = run_engine(recipe_of(tmp_path), stages=[CaptionRegions(played)])
    assert played.number == done - counts["sa_4"]  # two of the five images, again
    assert (tmp_path / "out" / "records.jsonl").read_bytes() == first
    expect_counts(summary, tmp_path / "out", sum(counts.values()))


def test_other_options_or_another_source_are_refused_until_restarted(tmp_path):
    write_sa1b(tmp_path / "data", SEEDS)
    stages = [CaptionRegions(Played({}))]
    run_engine(recipe_of(tmp_path, texts={"min_words": 2}), stages=stages)
    with pytest.raises(ValueError, match="got texts.min_words of 3 instead of 2"):
        run_engine(recipe_of(tmp_path, texts={"min_words": 3}), stages=stages)
    run_engine(recipe_of(tmp_path, texts={"min_words": 3}), stages=stages, restart=True)

    (tmp_path / "data" / "sa_0.json").unlink()
    with pytest.raises(ValueError, match="expected the source that .*000000.json was made of"):
        run_engine(recipe_of(tmp_path, texts={"min_words": 3}), stages=stages)


def test_options_that_change_nothing_in_the_output_may_change(tmp_path):
    write_sa1b(tmp_path / "data", [0])
    stages = [CaptionRegions(Played({}))]
    for url in ("http://a/v1", "http://b/v1"):
        section = {"kind": "endpoint", "model": "m", "base_url": url}
        run_engine(recipe_of(tmp_path, captioner=section), stages=stages)


KILLED = """
import json, sys, time
sys.path.insert(0, {tests!r})
from engine_data import Played
from test_engine_runs import recipe_of
from perceptiondlm.pipelines.captioners import CaptionRegions
from perceptiondlm.pipelines.engine import run_engine
from pathlib import Path

class Slow(Played):
    def __call__(self, asked):
        time.sleep(0.2)
        return super().__call__(asked)

print("ready", flush=True)
run_engine(recipe_of(Path({folder!r})), stages=[CaptionRegions(Slow({{}}))])
"""


@pytest.mark.slow
def test_killed_runs_lose_nothing_and_repeat_nothing(tmp_path):
    counts = write_sa1b(tmp_path / "data", range(10))
    program = KILLED.format(tests=str(ROOT / "tests"), folder=str(tmp_path))
    for wait in (0.1, 0.3, 0.5):
        process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE)
        assert process.stdout.readline() == b"ready\n"
        time.sleep(wait)
        process.send_signal(signal.SIGKILL)
        process.wait()
        for part in (tmp_path / "out" / "parts").glob("*.json"):
            json.loads(part.read_text())  # whole, at every moment
    summary = run_engine(recipe_of(tmp_path), stages=[CaptionRegions(Played({}))])
    expect_counts(summary, tmp_path / "out", sum(counts.values()))


# The card.


def test_the_card_has_the_numbers_and_the_figures(tmp_path):
    counts = write_sa1b(tmp_path / "data", [0, 1], extra=1)
    recipe = recipe_of(tmp_path, output={"card": True, "sheet": 3})
    stages = [
        MaskFilters(MaskOptions(**MASKS)),
        CaptionRegions(Played({})),
        ExtractCategories(head_nouns),
    ]
    summary = run_engine(recipe, stages=stages)
    text = (tmp_path / "out" / "README.md").read_text()
    assert f"| regions kept | {summary['regions']} |" in text
    assert "| masks | tiny | 2 | |" in text
    assert f"| regions of an image, mean | {(sum(counts.values()) - 2) / 2:.1f} |" in text
    names = {"dropped.png", "regions.png", "words.png", "samples.png", "categories.png"}
    assert {path.name for path in (tmp_path / "out" / "figures").iterdir()} == names
    for name in names:
        assert f"(figures/{name})" in text
        assert min(Image.open(tmp_path / "out" / "figures" / name).size) > 150
