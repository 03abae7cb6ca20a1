"""Prediction runs: grouping, resuming, sharding, efficiency, and what is refused."""

import copy
import dataclasses
import json
import os
import socket
import subprocess
import sys
import threading
from types import SimpleNamespace

import pytest
import torch
from perceptiondlm.apps.cli import main
from perceptiondlm.common.fingerprints import weights_fingerprint
from perceptiondlm.evaluation.benchmarks import load_benchmark
from perceptiondlm.evaluation.checkpoint import parse_option
from perceptiondlm.evaluation.files import read_json
from perceptiondlm.evaluation.predict import predict
from perceptiondlm.evaluation.sharding import Shard
from perceptiondlm.evaluation.throughput import (
    BatchCost,
    effective_length,
    stop_ids,
    total_throughput,
)
from test_evaluation_benchmarks import write_paradlc

IMAGES, REGIONS = 5, 2
END, PAD = 7, 8  # end of turn, end of text

LOAD_MODEL = "perceptiondlm.evaluation.checkpoint.load_model"


class FakeModel:
    """Captions a region by the left edge of its mask, in 4 forward passes per image.

    Of each caption's 6 positions the first 2 come before the end of turn. `fail_at` is the call
    that ends like a kill.
    """

    device = torch.device("cpu")
    dtype = torch.float32
    config = SimpleNamespace(eot_token_id=END, eos_token_id=PAD)

    def __init__(self, fail_at: int | None = None):
        self.fail_at = fail_at
        self.calls = []
        self.options = []

    def named_parameters(self):
        return [("weight", torch.zeros(2))]

    def diffusion_generate(self, *, images, masks, processor, **options):
        if len(self.calls) == self.fail_at:
            raise KeyboardInterrupt
        assert processor == "processor" and len(images) == len(masks)
        self.calls.append([len(regions) for regions in masks])
        self.options.append(options)
        texts = [
            [f"colour {image.getpixel((0, 0))[0]} edge {mask.getbbox()[0]}" for mask in regions]
            for image, regions in zip(images, masks, strict=True)
        ]
        ids = [[[1, 2, END, PAD, PAD, PAD] for _ in regions] for regions in masks]
        return SimpleNamespace(texts=texts, token_ids=ids, num_forwards=4 * len(images))


@pytest.fixture
def samples(tmp_path):
    return load_benchmark(write_paradlc(tmp_path / "bench", IMAGES, REGIONS)).samples


@pytest.fixture
def output(tmp_path):
    return tmp_path / "out" / "captions.json"


def run(samples, output, model=None, **options):
    return predict(model or FakeModel(), "processor", samples, output, progress=False, **options)


EXPECTED = {f"7{i}_{r}": f"colour {40 * i} edge {5 + 9 * r}" for i in range(5) for r in range(2)}


def test_every_region_gets_the_caption_of_its_own_mask(samples, output):
    prediction = run(samples, output)
    assert prediction.captions == EXPECTED
    assert list(json.loads(output.read_text()).items()) == list(EXPECTED.items())


def test_regions_of_one_image_go_together_in_batches(samples, output):
    model = FakeModel()
    mixed = [*samples[::2], *samples[1::2]]
    prediction = run(mixed, output, model, batch_size=2)
    assert model.calls == [[2, 2], [2, 2], [2]]
    assert list(prediction.captions) == [sample.key for sample in mixed]


def test_options_reach_the_model(samples, output):
    model = FakeModel()
    run(samples, output, model, options={"steps": 3})
    assert model.options == [{"steps": 3}] * IMAGES


@pytest.mark.parametrize("fail_at", [0, 1, 2])
def test_a_killed_run_goes_on_with_nothing_done_twice(samples, output, fail_at):
    first, second = FakeModel(fail_at), FakeModel()
    with pytest.raises(KeyboardInterrupt):
        run(samples, output, first, batch_size=2)
    assert not output.exists()
    prediction = run(samples, output, second, batch_size=2)
    assert prediction.captions == EXPECTED
    assert sum(map(sum, first.calls + second.calls)) == IMAGES * REGIONS
    assert prediction.throughput.regions == IMAGES * REGIONS


def test_a_torn_journal_line_is_done_again(samples, output):
    run(samples, output)
    journal = output.parent / "captions.rank0.journal.jsonl"
    journal.write_bytes(journal.read_bytes()[:-20])
    model = FakeModel()
    assert run(samples, output, model).captions == EXPECTED
    assert model.calls == [[2]]


def test_a_finished_run_calls_the_model_no_more(samples, output):
    run(samples, output)
    model = FakeModel()
    assert run(samples, output, model).captions == EXPECTED and model.calls == []


def test_a_journal_of_other_options_or_weights_is_refused(samples, output):
    run(samples, output, options={"steps": 3}, checkpoint="a")
    with pytest.raises(ValueError, match="expected a journal of .*'steps': 4.* got one of"):
        run(samples, output, options={"steps": 4}, checkpoint="a")
    with pytest.raises(ValueError, match="'checkpoint': 'b'"):
        run(samples, output, options={"steps": 3}, checkpoint="b")


def run_shards(samples, output, models: list[FakeModel]) -> list:
    """All shards at once, in threads that wait for each other."""
    barrier = threading.Barrier(len(models), timeout=20)
    results = [None] * len(models)

    def work(rank):
        shard = Shard(rank, len(models), barrier.wait)
        results[rank] = run(samples, output, models[rank], shard=shard)

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(len(models))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def test_shards_share_the_images_and_the_first_merges(samples, output):
    models = [FakeModel(), FakeModel(), FakeModel()]
    merged, *rest = run_shards(samples, output, models)
    assert merged.captions == read_json(output) == EXPECTED and rest == [None, None]
    assert [len(model.calls) for model in models] == [2, 2, 1]
    assert merged.throughput.processes == 3


def test_a_run_may_go_on_with_another_number_of_shards(samples, output):
    with pytest.raises(KeyboardInterrupt):
        run(samples, output, FakeModel(fail_at=2))
    models = [FakeModel(), FakeModel()]
    merged = run_shards(samples, output, models)[0]
    assert merged.captions == EXPECTED
    assert [len(model.calls) for model in models] == [2, 1]


def test_processes_of_one_launch_know_their_ranks():
    """Two real processes, as torchrun starts them, on the CPU."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    program = (
        "from perceptiondlm.evaluation.sharding import Shard\n"
        "shard = Shard.from_accelerate(); shard.barrier(); print(shard.rank, shard.count)"
    )
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    common |= {"LOCAL_WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", program],
            env={**os.environ, **common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        for rank in range(2)
    ]
    printed = [process.communicate(timeout=120)[0].split() for process in processes]
    assert printed == [["0", "2"], ["1", "2"]]


def test_warming_up_is_not_counted(samples, output):
    model = FakeModel()
    prediction = run(samples, output, model, warmup=2)
    assert len(model.calls) == IMAGES + 2
    assert prediction.throughput.images == IMAGES
    assert prediction.throughput.forwards == 4 * IMAGES


def test_tokens_per_forward_are_counted_with_and_without_padding(samples, output):
    throughput = run(samples, output, batch_size=3).throughput
    assert throughput.nominal_tpf == 6 * REGIONS / 4
    assert throughput.effective_tpf == 2 * REGIONS / 4
    assert 0 < throughput.generate_seconds <= throughput.end_to_end_seconds
    assert throughput.tokens_per_second == pytest.approx(
        2 * IMAGES * REGIONS / throughput.end_to_end_seconds
    )


def test_seconds_of_processes_side_by_side_are_the_slowest_ones():
    cost = BatchCost(1, 2, 4, 12, 6, generate_seconds=1.0, end_to_end_seconds=2.0, rank=0)
    other = dataclasses.replace(cost, rank=1, generate_seconds=3.5, end_to_end_seconds=3.75)
    total = total_throughput([cost, cost, other])
    assert (total.generate_seconds, total.end_to_end_seconds) == (3.5, 4.0)
    assert (total.images, total.forwards, total.nominal_tpf) == (3, 12, 3.0)
    assert total_throughput([]).nominal_tpf == 0


def test_the_clock_waits_for_the_device(samples, output, monkeypatch):
    events = []
    model = FakeModel()
    monkeypatch.setattr(model, "device", torch.device("cuda"), raising=False)
    monkeypatch.setattr(torch.accelerator, "synchronize", lambda device: events.append("wait"))
    original = model.diffusion_generate
    model.diffusion_generate = lambda **given: events.append("generate") or original(**given)
    run(samples[:2], output, model)
    assert events == ["wait", "generate", "wait"]


def test_a_caption_ends_at_the_first_stop():
    assert effective_length([1, 2, 7, 1], [7, 8]) == 2
    assert effective_length([7, 1], [7]) == 0
    assert effective_length([1, 2], [7]) == 2


@pytest.mark.parametrize(("eos", "stops"), [(8, (7, 8)), ([8, 9], (7, 8, 9)), (None, (7,))])
def test_stops_are_the_configs_ends(eos, stops):
    assert stop_ids(SimpleNamespace(eot_token_id=7, eos_token_id=eos)) == stops


DAMAGE = {
    "none": lambda path: path.unlink(),
    "half": lambda path: path.write_bytes(path.read_bytes()[:60]),
    "text": lambda path: path.write_text("<html>"),
    "folder": lambda path: (path.unlink(), path.mkdir()),
}


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("kind", DAMAGE)
def test_a_broken_image_belongs_to_its_regions_and_the_next_run_tries_them_again(
    samples, output, kind, batch_size, caplog
):
    image = samples[2].image_path
    whole = image.read_bytes()
    DAMAGE[kind](image)
    first = run(samples, output, batch_size=batch_size)
    assert first.missing == ("71_0", "71_1")
    assert first.captions == read_json(output)
    assert first.captions == {k: v for k, v in EXPECTED.items() if k not in first.missing}
    named = [record.getMessage() for record in caplog.records if "left out" in record.message]
    assert [line.split(":")[0] for line in named] == [
        f"left out region {key} of {image}" for key in first.missing
    ]
    if image.is_dir():
        image.rmdir()
    image.write_bytes(whole)
    model = FakeModel()
    assert run(samples, output, model).captions == EXPECTED and model.calls == [[2]]


def test_a_mask_that_does_not_fit_is_named_and_the_others_of_its_image_are_captioned(
    samples, output, caplog
):
    other = dataclasses.replace(samples[0], mask={"size": [2, 2], "counts": [0, 4]})
    assert run([other, *samples[1:]], output).missing == ("70_0",)
    assert (
        "left out region 70_0 of" in caplog.text and "0.png: expected a region mask" in caplog.text
    )
    assert read_json(output) == {k: v for k, v in EXPECTED.items() if k != "70_0"}


def test_a_run_in_which_all_is_broken_leaves_the_old_captions(samples, output):
    run(samples, output)
    before = output.read_bytes()
    for sample in samples:
        sample.image_path.unlink(missing_ok=True)
    prediction = run(samples, output, restart=True)
    assert len(prediction.missing) == IMAGES * REGIONS and output.read_bytes() == before


def test_the_command_says_how_many_regions_have_no_caption(samples, output, monkeypatch, capsys):
    monkeypatch.setattr(LOAD_MODEL, lambda *_, **named: (FakeModel(), "processor"))
    bench = samples[0].image_path.parent.parent
    given = ["evaluate", "predict", "--benchmark", str(bench), "--output", str(output)]
    given += ["--model", "some/model", "--device", "cpu"]
    samples[0].image_path.write_text("no image")
    assert main(given) == 1
    assert "2 of 10 regions have no caption" in capsys.readouterr().err
    assert read_json(output.with_suffix(".run.json"))["missing"] == ["70_0", "70_1"]


def test_sizes_that_make_no_sense_are_refused(samples, output):
    with pytest.raises(ValueError, match="batch_size of 1 or more, got 0"):
        run(samples, output, batch_size=0)
    with pytest.raises(ValueError, match="rank from 0 to 1, got 2"):
        Shard(2, 2)


def test_the_command_writes_captions_and_the_record_of_the_run(samples, output, monkeypatch):
    model, loaded = FakeModel(), []
    monkeypatch.setattr(
        LOAD_MODEL, lambda *given, **named: loaded.append(given) or (model, "processor")
    )
    bench = str(samples[0].image_path.parent.parent)
    arguments = ["--benchmark", bench, "--output", str(output), "--model", "some/model"]
    options = ["--subfolder", "tiny", "--limit", "4", "--option", "steps=3", "--option", "mode=x"]
    assert main(["evaluate", "predict", *arguments, *options, "--device", "cpu"]) == 0
    assert loaded == [("some/model", "tiny", "auto", "cpu")]
    assert model.options[0] == {"steps": 3, "mode": "x"}
    assert read_json(output) == dict(list(EXPECTED.items())[:4])
    record = read_json(output.with_suffix(".run.json"))
    assert record["checkpoint"] == "some/model/tiny"
    assert record["options"] == {"steps": 3, "mode": "x"}
    assert record["throughput"]["regions"] == 4


def test_a_restarted_run_forgets_what_was_done(samples, output):
    first, second = FakeModel(fail_at=2), FakeModel()
    with pytest.raises(KeyboardInterrupt):
        run(samples, output, first)
    run(samples, output, second, restart=True)
    assert sum(map(sum, second.calls)) == IMAGES * REGIONS


def test_weights_are_told_apart_by_their_values():
    layers = [torch.nn.Linear(3, 2) for _ in range(2)]
    layers.append(copy.deepcopy(layers[0]))
    names = [weights_fingerprint(layer) for layer in layers]
    assert names[0] == names[2] != names[1]


def test_options_are_read_as_json_where_they_are():
    assert parse_option("steps=3") == ("steps", 3)
    assert parse_option("seed=null") == ("seed", None)
    assert parse_option("remasking=random") == ("remasking", "random")
    with pytest.raises(Exception, match="expected NAME=VALUE, got 'steps'"):
        parse_option("steps")
