"""Every way a conversion fails: its exception, its exit code, and that nothing is left behind."""

import errno
import os
import shutil
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from conversion_sources import (
    VECTORS,
    copy_source,
    edit_json,
    edit_tensors,
    make_llada,
    make_siglip,
    split_weights,
)
from perceptiondlm.conversion import convert as convert_module
from perceptiondlm.convert_checkpoint import convert, main
from safetensors import SafetensorError
from safetensors.torch import load_file

REGION = "released-region"


def run(source, output, *options: str) -> int:
    return main(["--source", str(source), "--output", str(output), *options])


def expect_failure(capsys, folder: Path, source, code: int, message: str, *options: str):
    """The command fails so, and leaves nothing where it would have written."""
    output = folder / "made" / "out"
    assert run(source, output, *options) == code
    said = capsys.readouterr().err
    assert "error: expected" in said and message in said, said
    assert not output.parent.exists() or not any(output.parent.iterdir())


def truncate(path: Path):
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def lose_shard(source: Path):
    split_weights(source)
    (source / "model-00002-of-00002.safetensors").unlink()


def truncate_shard(source: Path):
    split_weights(source)
    truncate(source / "model-00002-of-00002.safetensors")


def truncate_pickle(source: Path):
    torch.save({"a": torch.ones(1000)}, source / "pytorch_model.bin")
    (source / "model.safetensors").unlink()
    truncate(source / "pytorch_model.bin")


def rename(old: str, new: str):
    return lambda source: edit_tensors(source, lambda t: t.update({new: t.pop(old)}))


def add(name: str):
    return lambda source: edit_tensors(source, lambda t: t.update({name: torch.ones(1)}))


def remove(name: str):
    return lambda source: edit_tensors(source, lambda t: t.pop(name))


def cut(name: str):
    def change(tensors):
        tensors[name] = tensors[name][:-1].clone()

    return lambda source: edit_tensors(source, change)


def forget_token(source: Path):
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        text = (source / name).read_text().replace("<IMG_CONTEXT>", "<else>")
        (source / name).write_text(text)


NORM = "language_model.model.norm.weight"
QUERY = "language_model.model.layers.1.self_attn.q_proj.weight"
FAILURES = {
    "no config": (lambda s: (s / "config.json").unlink(), 3, "a config.json"),
    "another model": (lambda s: edit_json(s / "config.json", model_type="bert"), 3, "got 'bert'"),
    "a lost shard": (lose_shard, 4, "the shard model-00002-of-00002.safetensors"),
    "no weights": (lambda s: (s / "model.safetensors").unlink(), 4, "one of model.safetensors"),
    "no tokenizer": (lambda s: (s / "tokenizer.json").unlink(), 4, "tokenizer.json"),
    "a short file": (lambda s: truncate(s / "model.safetensors"), 5, "a whole safetensors file"),
    "an empty file": (lambda s: (s / "model.safetensors").write_bytes(b""), 5, "a whole safet"),
    "a short shard": (truncate_shard, 5, "model-00002-of-00002.safetensors"),
    "a short torch file": (truncate_pickle, 5, "a whole torch file"),
    "a short config": (lambda s: truncate(s / "config.json"), 5, "JSON"),
    "a short tokenizer": (lambda s: truncate(s / "tokenizer.json"), 5, "JSON"),
    "an unknown name": (rename(NORM, "language_model.other"), 6, "'language_model.other'"),
    "an unknown part": (add(QUERY + "s"), 6, QUERY + "s"),
    "a rule's tensor missing": (remove(NORM), 7, r"language_model\.model\.norm\.weight"),
    "a layer's tensor missing": (remove(QUERY), 7, QUERY),
    "a wrong shape": (cut(QUERY), 8, "of [63, 64] (expected [64, 64])"),
    "a token missing": (forget_token, 1, "a tokenizer with <IMG_CONTEXT>"),
    "a key missing": (
        lambda s: edit_json(s / "config.json", downsample_ratio=None),
        1,
        "a config with 'downsample_ratio'",
    ),
}


@pytest.mark.parametrize("name", FAILURES)
def test_a_damaged_source_fails_with_its_own_code_and_leaves_nothing(capsys, tmp_path, name):
    spoil, code, message = FAILURES[name]
    source = copy_source(REGION, tmp_path / "source")
    spoil(source)
    expect_failure(capsys, tmp_path, source, code, message)


def test_a_source_that_is_not_there_is_said_so(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    expect_failure(capsys, tmp_path, tmp_path / "nowhere" / "at" / "all", 3, "a folder or the id")
    expect_failure(capsys, tmp_path, "no-one/nothing", 3, "got 'no-one/nothing'")


def test_no_disk_space_is_noticed_before_writing(capsys, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")(10**6, 10**6 - 10, 10)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    assert run(VECTORS / REGION, tmp_path / "made" / "out") == 9
    assert "bytes free for the weights, got 10" in capsys.readouterr().err
    assert not any((tmp_path / "made").iterdir())


def test_a_disk_that_fills_while_writing_raises_enospc_and_leaves_nothing(tmp_path, monkeypatch):
    def full(tensors, path, metadata):
        Path(path).write_bytes(b"half")
        message = "Error while serializing: I/O error: No space left on device (os error 28)"
        raise SafetensorError(message)

    monkeypatch.setattr(convert_module, "save_file", full)
    with pytest.raises(OSError, match="No space left on device") as raised:
        convert(VECTORS / REGION, tmp_path / "out")
    assert raised.value.errno == errno.ENOSPC
    assert not any(tmp_path.iterdir())
    assert run(VECTORS / REGION, tmp_path / "out") == 9


def test_an_existing_output_is_left_alone_without_force(capsys, tmp_path):
    output = tmp_path / "out"
    output.mkdir()
    (output / "mine.txt").write_text("keep")
    assert run(VECTORS / REGION, output) == 10
    assert "see force" in capsys.readouterr().err
    assert (output / "mine.txt").read_text() == "keep"


def test_force_replaces_an_existing_output_whole(tmp_path):
    output = tmp_path / "out"
    output.mkdir()
    (output / "mine.txt").write_text("old")
    assert run(VECTORS / REGION, output, "--force") == 0
    assert (output / "config.json").exists() and not (output / "mine.txt").exists()
    assert os.listdir(tmp_path) == ["out"]


def test_a_failed_force_leaves_the_old_output(tmp_path):
    output = tmp_path / "out"
    output.mkdir()
    (output / "mine.txt").write_text("keep")
    source = copy_source(REGION, tmp_path / "source")
    cut(QUERY)(source)
    assert run(source, output, "--force") == 8
    assert os.listdir(output) == ["mine.txt"]


@pytest.mark.parametrize("output", [".", ".."])
def test_the_source_is_never_replaced(tmp_path, output):
    source = copy_source(REGION, tmp_path / "source")
    assert run(source, source / output, "--force") == 10
    assert (source / "model.safetensors").exists()


@pytest.mark.parametrize("option", ["base", "vision_source"])
def test_neither_a_base_nor_a_vision_source_is_replaced(tmp_path, option):
    used = copy_source(REGION, tmp_path / "used")
    with pytest.raises(FileExistsError, match="an output apart from the source"):
        convert(VECTORS / REGION, used, force=True, **{option: used})
    assert (used / "model.safetensors").exists()


def test_verification_notices_weights_that_differ_in_one_bit(capsys, tmp_path, monkeypatch):
    write = convert_module.save_file

    def flip(tensors, path, metadata):
        first = next(iter(tensors))
        changed = tensors[first].clone()
        changed.view(torch.uint8).view(-1)[0] ^= 1
        write({**tensors, first: changed}, path, metadata)

    monkeypatch.setattr(convert_module, "save_file", flip)
    expect_failure(capsys, tmp_path, VECTORS / REGION, 11, "as in the source", "--verify")


def test_llada_without_a_vision_source_says_what_is_needed(capsys, tmp_path):
    llada = make_llada(tmp_path / "llada", original=True)
    expect_failure(capsys, tmp_path, llada, 1, "vision_source, a SigLIP-2 model")


def test_a_vision_source_that_is_not_siglip_is_refused(capsys, tmp_path):
    llada = make_llada(tmp_path / "llada", original=True)
    siglip = make_siglip(tmp_path / "siglip", whole=True)
    edit_json(siglip / "config.json", model_type="clip")
    options = ("--vision-source", str(siglip))
    expect_failure(capsys, tmp_path, llada, 3, "SigLIP vision config", *options)


def test_another_network_under_lladas_names_is_refused(capsys, tmp_path):
    llada = make_llada(tmp_path / "llada", original=True)
    siglip = make_siglip(tmp_path / "siglip", whole=True)
    edit_json(llada / "config.json", block_type="sequential")
    options = ("--vision-source", str(siglip))
    expect_failure(capsys, tmp_path, llada, 1, "block_type 'llama'", *options)


@pytest.mark.parametrize("option", ["--vision-source", "--base"])
def test_an_option_that_a_source_has_no_use_for_is_refused(capsys, tmp_path, option):
    expect_failure(capsys, tmp_path, VECTORS / REGION, 1, "expected no", option, str(VECTORS))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("mm_projector_type", "linear"),
        ("mm_patch_merge_type", "flat"),
        ("image_aspect_ratio", "pad"),
        ("image_grid_pinpoints", [[224, 224], [224, 448]]),
    ],
)
def test_another_way_with_images_than_llada_vs_is_refused(capsys, tmp_path, name, value):
    source = copy_source("released-llava", tmp_path / "source")
    edit_json(source / "config.json", **{name: value})
    options = ("--vision-source", str(source / "vision"))
    expect_failure(capsys, tmp_path, source, 1, name, *options)


def test_a_training_checkpoint_without_its_base_says_what_is_missing(capsys, tmp_path):
    converted = convert(VECTORS / REGION, tmp_path / "converted")
    (converted / "tokenizer.json").unlink()
    expect_failure(capsys, tmp_path, converted, 4, "name a base that has it")


def test_a_lost_shard_of_fsdps_is_named(capsys, tmp_path):
    from torch.distributed.checkpoint import save

    sharded = tmp_path / "checkpoint-10" / "pytorch_model_fsdp_0"
    save({"model": {"connector.linear_1.bias": torch.ones(3)}}, checkpoint_id=sharded, no_dist=True)
    (shard,) = sharded.glob("*.distcp")
    shard.unlink()
    expect_failure(capsys, tmp_path, sharded.parent, 4, f"the shard {shard.name}")


def test_a_short_shard_of_fsdps_is_damage_and_leaves_nothing(capsys, tmp_path):
    from torch.distributed.checkpoint import save

    converted = convert(VECTORS / REGION, tmp_path / "converted")
    sharded = tmp_path / "checkpoint-10" / "pytorch_model_fsdp_0"
    weights = load_file(converted / "model.safetensors")
    save({"model": weights}, checkpoint_id=sharded, no_dist=True)
    (shard,) = sharded.glob("*.distcp")
    truncate(shard)
    options = ("--base", str(converted))
    expect_failure(capsys, tmp_path, sharded.parent, 5, "whole in", *options)


def test_an_adapter_says_what_base_it_needs(capsys, tmp_path):
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    expect_failure(capsys, tmp_path, adapter, 1, "expected base, the model that")
    options = ("--base", str(VECTORS / REGION))
    expect_failure(capsys, tmp_path, adapter, 3, "a converted base", *options)


def test_token_ids_beyond_the_embedding_are_refused(capsys, tmp_path):
    converted = convert(VECTORS / REGION, tmp_path / "converted")
    edit_json(converted / "config.json", image_token_id=468)
    expect_failure(capsys, tmp_path, converted, 8, "under the 468 rows")


@pytest.mark.parametrize(
    ("options", "message"),
    [({"dtype": "int8"}, "dtype among float32"), ({"max_shard_size": "5 apples"}, "such as 5GB")],
)
def test_options_out_of_range_are_refused(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        convert(VECTORS / REGION, tmp_path / "out", **options)


def test_wrong_arguments_end_with_code_2(tmp_path):
    with pytest.raises(SystemExit) as raised:
        main(["--source", "a"])
    assert raised.value.code == 2


def test_help_lists_every_exit_code(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    said = capsys.readouterr().out
    for code in range(12):
        assert f"\n  {code:<2} " in said
