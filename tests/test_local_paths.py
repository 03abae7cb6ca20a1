"""Files name only files inside their own folder: indexes, annotations, records."""

import json
import os
import shutil

import numpy as np
import pytest
from perceptiondlm.configuration_perceptiondlm import path_inside
from perceptiondlm.conversion.files import DamagedFile, weight_files
from perceptiondlm.evaluation.benchmarks import load_benchmark
from perceptiondlm.modeling_perceptiondlm import PerceptionDLMForConditionalGeneration
from perceptiondlm.training.records import Record
from perceptiondlm.training.regions import image_path
from test_evaluation_benchmarks import write_paradlc

OUTSIDE = ["../secret", "a/../../secret", "/etc/passwd", "..", ".", "", "link", "C:\\x", "a\0b"]


@pytest.fixture
def place(tmp_path):
    """A folder with a file, a link to it, and a link out of it."""
    folder = tmp_path / "data"
    (folder / "sub").mkdir(parents=True)
    (folder / "a.png").write_text("inside")
    (tmp_path / "secret").write_text("canary")
    (folder / "link").symlink_to("../secret")
    (folder / "own_link").symlink_to("a.png")
    (folder / "linked_folder").symlink_to("..")
    return folder


@pytest.mark.parametrize("name", [*OUTSIDE, "linked_folder/secret", "sub/../../secret", None, 3])
def test_a_name_that_leads_out_of_its_folder_is_refused(place, name):
    with pytest.raises(ValueError, match="expected the name of a file"):
        path_inside(place, name)


@pytest.mark.parametrize("name", ["a.png", "own_link", "sub/../a.png", "new.png", "C:x", "..a"])
def test_a_name_inside_its_folder_is_taken(place, name, tmp_path):
    assert path_inside(place, name) == place / name
    (tmp_path / "way").symlink_to("data")  # the folder itself may be a link
    assert path_inside(tmp_path / "way", name) == tmp_path / "way" / name


def test_the_root_holds_everything(place, tmp_path):
    assert path_inside("/", str(tmp_path / "secret")) == tmp_path / "secret"


def test_links_of_a_hub_cache_lead_to_its_own_files(tmp_path):
    repository = tmp_path / "models--a--b"
    snapshot = repository / "snapshots" / "abc"
    (repository / "blobs").mkdir(parents=True)
    (repository / "refs").mkdir()
    snapshot.mkdir(parents=True)
    (repository / "blobs" / "f00d").write_text("weights")
    (snapshot / "model.safetensors").symlink_to("../../blobs/f00d")
    (snapshot / "refs").symlink_to("../../refs/main")
    assert path_inside(snapshot, "model.safetensors").read_text() == "weights"
    with pytest.raises(ValueError, match="expected the name of a file"):
        path_inside(snapshot, "refs")


@pytest.mark.parametrize("shard", ["../secret.safetensors", "{root}/secret.safetensors", ""])
def test_an_index_names_shards_beside_it_alone(converted, tmp_path, shard):
    shutil.copytree(converted("released-region"), tmp_path / "model")
    os.rename(tmp_path / "model" / "model.safetensors", tmp_path / "secret.safetensors")
    index = {"metadata": {}, "weight_map": {"a": shard.format(root=tmp_path)}}
    (tmp_path / "model" / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(DamagedFile, match="expected only files of .* in its index"):
        weight_files(tmp_path / "model")
    with pytest.raises(ValueError, match="expected the name of a file in"):
        PerceptionDLMForConditionalGeneration.from_pretrained(tmp_path / "model")


def test_a_sharded_model_still_loads(converted, tmp_path):
    from perceptiondlm.convert_checkpoint import convert

    source = converted("released-region")
    folder = convert(source, tmp_path / "sharded", max_shard_size="20KB")
    assert len(weight_files(folder)) > 1
    whole = PerceptionDLMForConditionalGeneration.from_pretrained(source).state_dict()
    sharded = PerceptionDLMForConditionalGeneration.from_pretrained(folder).state_dict()
    assert all((np.asarray(whole[k]) == np.asarray(sharded[k])).all() for k in whole)


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "link", "http://127.0.0.1:9/a.png"])
def test_a_record_names_images_beside_it_alone(place, name):
    record = Record({}, None, [], "here", (0, 0), place)
    if name.startswith("http"):  # is a file's name like any other, and never fetched
        assert image_path(name, record, None) == str(place / "http:/127.0.0.1:9/a.png")
        return
    with pytest.raises(ValueError, match="see data.image_root"):
        image_path(name, record, None)
    assert image_path("/etc/passwd", record, "/") == "/etc/passwd"


def test_a_benchmarks_images_are_no_links_out_of_its_folder(tmp_path):
    folder = write_paradlc(tmp_path / "bench", 1, 1)
    load_benchmark(folder)
    (tmp_path / "secret.png").write_bytes((folder / "images" / "0.png").read_bytes())
    (folder / "images" / "0.png").unlink()
    (folder / "images" / "0.png").symlink_to(tmp_path / "secret.png")
    with pytest.raises(ValueError, match="image 0.*expected a file_name inside"):
        load_benchmark(folder)
