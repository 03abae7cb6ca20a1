"""Whole runs on an embedded Ray: nothing lost, nothing twice, the captions of the model alone."""

import dataclasses
import json
import socket
from collections import Counter
from pathlib import Path

import pytest
import scale_data
import scale_runs
from perceptiondlm.apps.captioning.captioner import EMBEDDED, EMBEDDED_SUBFOLDER
from perceptiondlm.apps.cli import main
from perceptiondlm.common.loading import load_model
from perceptiondlm.common.ray_session import pool_size, ray_session
from perceptiondlm.image_loading import load_image, load_mask
from perceptiondlm.image_masks import encode_rle
from perceptiondlm.pipelines import dataset
from perceptiondlm.pipelines.captioning_stage import CaptionOptions
from perceptiondlm.pipelines.dataset import DatasetOptions, TooManyErrors, caption_dataset, prepare
from perceptiondlm.pipelines.open_sources import open_source
from perceptiondlm.pipelines.writers import read_rows
from shapes import ARGUMENTS, ROOT, SHAPES

ray = pytest.importorskip("ray")
DECODING = {"caption_length": 4}


@pytest.fixture(scope="session")
def session():
    """Starts Ray once for all runs."""
    ray.init(
        num_cpus=2, include_dashboard=False, object_store_memory=200 << 20, log_to_driver=False
    )
    yield ray
    ray.shutdown()


def options_for(output: Path, **options) -> DatasetOptions:
    caption = CaptionOptions(str(ROOT), SHAPES, device="cpu", decoding=DECODING)
    values = {"actors": 1, "shard_images": 4, **options}
    return DatasetOptions(output=str(output), caption=caption, **values)


@pytest.fixture(scope="module")
def mixed(session, tmp_path_factory):
    """One run over four kinds of sources, with broken rows among them."""
    folder = tmp_path_factory.mktemp("mixed")
    drawn = scale_data.draw(6)
    lines = scale_data.write_lines(folder / "lines", drawn)
    lines.write_text("{\n" + lines.read_text() + '{"image": "no.png", "mask_rles": []}\n')
    places = [
        lines,
        scale_data.write_tars(folder / "tars", drawn),
        scale_data.write_parquet(folder / "table", drawn),
        scale_data.write_coco(folder / "coco", drawn),
    ]
    sources = [open_source(str(place)) for place in places]
    options = options_for(folder / "out", max_error_share=0.5)
    return drawn, sources, options, caption_dataset(sources, options)


def test_every_region_of_every_source_appears_once(mixed):
    drawn, sources, options, summary = mixed
    rows = scale_runs.written(Path(options.output))
    expected = Counter(
        (data, encode_rle(mask)["counts"]) for data, masks in drawn for mask in masks
    )
    assert scale_runs.regions_of(rows) == Counter({k: 4 * v for k, v in expected.items()})
    assert len({row["id"] for row in rows}) == 4 * len(drawn) == summary["images"]


def test_captions_are_those_of_the_model_in_this_process(mixed):
    drawn, _, options, _ = mixed
    model, processor = load_model(ROOT, SHAPES, device="cpu")
    for row in scale_runs.written(Path(options.output)):
        ((data, masks),) = [one for one in drawn if one[0] == row["image"]]
        masks = [load_mask(mask, scale_data.SIZE) for mask in masks]
        alone = model.diffusion_generate(load_image(data), masks, processor=processor, **DECODING)
        assert row["captions"] == alone.texts[0]
        assert row["scores"] == pytest.approx(alone.scores[0], abs=1e-5)


def test_broken_rows_are_errors_with_their_reasons(mixed):
    _, _, options, summary = mixed
    rows = read_rows(f"{options.output}/errors.parquet")
    assert {row["id"].split("/")[1]: row["kind"] for row in rows} == {
        "rows.jsonl:1": "read",
        "rows.jsonl:8": "read",
    }
    assert all(row["reason"] for row in rows)
    assert summary["errors"] == {"read": 2}
    assert summary == json.loads(Path(options.output, "summary.json").read_text())
    assert summary["this_run"]["failed"] == 2


def test_a_run_goes_on_with_what_is_missing_alone(mixed):
    drawn, sources, options, summary = mixed
    output = Path(options.output)
    before = scale_runs.written(output)
    lost = sorted(output.glob("captions/*"))[0]
    missing = {row["id"] for row in read_rows(str(lost))}
    lost.unlink()

    again = caption_dataset(sources, options)
    assert again["this_run"]["images"] == len(missing)
    assert again["this_run"]["failed"] == 0
    rows = scale_runs.written(output)
    assert scale_runs.regions_of(rows) == scale_runs.regions_of(before)
    assert len({row["id"] for row in rows}) == len(rows) == len(before)
    assert scale_runs.captions_of(rows) == scale_runs.captions_of(before)


@pytest.mark.slow
def test_a_run_that_is_mostly_broken_stops(session, tmp_path):
    path = scale_data.write_lines(tmp_path, scale_data.draw(2))
    path.write_text("{\n" * 5 + path.read_text())
    with pytest.raises(TooManyErrors, match="10%.*got 5 in 7"):
        caption_dataset([open_source(str(path))], options_for(tmp_path / "out"))
    assert len(scale_runs.written(tmp_path / "out")) == 2  # what was done is kept


def test_more_actors_than_there_are_gpus_for_are_refused(session):
    with pytest.raises(ValueError, match="expected GPUs for 2 actors"):
        pool_size(session, 2, 0.5)
    assert pool_size(session, None, 0)[0] == 2
    for count in (1, 2, 8):  # something is left for reading and writing
        assert count * pool_size(session, count, 0)[1] <= 1


# What is refused before anything runs.


def test_an_output_of_other_options_is_refused(tmp_path):
    identity, other = {"decoding": {"steps": 4}}, {"decoding": {"steps": 8}}
    output, folders = str(tmp_path / "out"), [str(tmp_path / "out/captions")]
    for accepted in (identity, other, identity):  # while nothing has been made with them
        prepare(output, folders, accepted)
    Path(folders[0], "part-0.parquet").write_bytes(b"")
    prepare(output, folders, identity)
    with pytest.raises(ValueError, match='another decoding: {"steps": 8} instead of {"steps": 4}'):
        prepare(output, folders, other)


def test_an_output_with_something_else_in_it_is_refused(tmp_path):
    (tmp_path / "thesis.txt").write_text("")
    with pytest.raises(ValueError, match="expected a new folder"):
        prepare(str(tmp_path), [], {})


def run(tmp_path, *arguments) -> int:
    place = scale_data.write_lines(tmp_path / "in", scale_data.draw(1))
    return main(["caption-dataset", str(place), *map(str, arguments)])


def test_an_output_that_cannot_be_written_is_refused_in_a_line(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert run(tmp_path, "--output", tmp_path / "file" / "out") == 2
    assert capsys.readouterr().err.strip().splitlines()[-1].startswith("perceptiondlm")


def test_options_that_cannot_be_used_are_refused_in_a_line(tmp_path, capsys):
    out = ("--output", tmp_path / "out")
    for bad in (
        ("--max-error-share", 2),
        ("--batch-regions", 0),
        ("--steps", 0),
        ("--model", tmp_path / "nothing"),
        ("--max-new-tokens", 8),
    ):
        assert run(tmp_path, *out, *bad) == 2, bad
        assert "expected" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_embedded_model_captions_unless_another_is_named(tmp_path, monkeypatch):
    asked = []

    def captioned(sources, options, show):
        asked.append((options.caption.model, options.caption.subfolder))
        raise ValueError("enough")

    monkeypatch.setattr(dataset, "caption_dataset", captioned)
    for given in ((), ARGUMENTS):
        assert run(tmp_path, "--output", tmp_path / "out", *given) == 2
    assert asked == [(str(EMBEDDED), EMBEDDED_SUBFOLDER), (str(ROOT), SHAPES)]
    assert (EMBEDDED / EMBEDDED_SUBFOLDER / "config.json").is_file()


def test_paths_of_images_that_have_none_are_refused(tmp_path):
    source = open_source(str(scale_data.write_tars(tmp_path, scale_data.draw(1))))
    options = options_for(tmp_path / "out", images="path")
    with pytest.raises(ValueError, match="expected images as bytes"):
        caption_dataset([source], options)


class JoinedRay:
    """Stands for a Ray of which this process has joined a cluster."""

    def __init__(self, gcs_address: str):
        self.gcs_address = gcs_address

    def is_initialized(self) -> bool:
        return True

    def get_runtime_context(self):
        return self


@pytest.mark.parametrize("spelling", ["127.0.0.1", "localhost"])
def test_the_address_of_the_cluster_that_was_joined_is_taken_and_no_other(spelling, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as own, socket.create_server(("127.0.0.1", 0)) as b:
        (_, port), (_, other) = own.getsockname(), b.getsockname()
        joined = JoinedRay(f"127.0.0.1:{port}")
        monkeypatch.setattr("perceptiondlm.common.ray_session.import_ray", lambda: joined)
        for address in (None, "auto", f"{spelling}:{port}"):
            with ray_session(address) as given:
                assert given is joined
        with pytest.raises(ValueError, match=f"expected 127.0.0.1:{port}, the Ray cluster that"):
            with ray_session(f"{spelling}:{other}"):
                pass


def test_a_joined_cluster_whose_host_is_not_known_here_is_another_one(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        joined = JoinedRay(f"nowhere.invalid:{port}")
        monkeypatch.setattr("perceptiondlm.common.ray_session.import_ray", lambda: joined)
        with pytest.raises(ValueError, match="expected nowhere.invalid:"):
            with ray_session(f"127.0.0.1:{port}"):
                pass


@pytest.mark.parametrize("is_joined", [False, True])
@pytest.mark.parametrize("address", ["nonsense", "127.0.0.1:99999", "closed"])
def test_an_address_at_which_nobody_answers_is_refused(address, is_joined, monkeypatch):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    joined = JoinedRay("127.0.0.1:6379") if is_joined else ray
    monkeypatch.setattr("perceptiondlm.common.ray_session.import_ray", lambda: joined)
    if not is_joined:
        monkeypatch.setattr(ray, "is_initialized", lambda: False)
    address = f"127.0.0.1:{port}" if address == "closed" else address
    with pytest.raises(ValueError, match="expected a(n address| Ray cluster)"):
        with ray_session(address):
            pass


def test_options_can_be_replaced_in_python(tmp_path):
    options = options_for(tmp_path)
    with pytest.raises(ValueError, match="expected actors of 1 or more"):
        dataclasses.replace(options, actors=0)
