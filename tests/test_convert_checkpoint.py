"""What `convert` makes of every source layout, and how it writes it."""

import json
import shutil
import weakref
from pathlib import Path

import pytest
import torch
from conversion_sources import (
    FIXTURES,
    VECTORS,
    copy_source,
    edit_json,
    edit_tensors,
    language_tensors,
    make_llada,
    make_siglip,
    original_name,
    split_weights,
)
from perceptiondlm.configuration_perceptiondlm import PerceptionDLMConfig
from perceptiondlm.conversion import files as checkpoint_files
from perceptiondlm.conversion.convert import parse_size
from perceptiondlm.conversion.files import StateDict, Tensors
from perceptiondlm.conversion.layouts import llama_rules, map_names, original_llada_rules
from perceptiondlm.conversion.source import model_shapes
from perceptiondlm.convert_checkpoint import convert
from perceptiondlm.modeling_perceptiondlm import PerceptionDLMForConditionalGeneration
from perceptiondlm.processing_perceptiondlm import PerceptionDLMProcessor
from safetensors import safe_open
from safetensors.torch import load_file
from shapes import ROOT, SHAPES
from transformers import AutoConfig, PreTrainedTokenizerFast

REGION, BASE = VECTORS / "released-region", VECTORS / "released-base"


@pytest.fixture(scope="module")
def region(tmp_path_factory):
    """The released region fixture, converted."""
    return convert(REGION, tmp_path_factory.mktemp("region") / "converted")


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a converted folder."""
    return {k: v for f in folder.glob("*.safetensors") for k, v in load_file(f).items()}


def config_of(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# Released checkpoints


def test_special_token_ids_are_the_tokenizers(region):
    vocabulary = PreTrainedTokenizerFast.from_pretrained(REGION).get_vocab()
    config = config_of(region)
    assert config["mask_token_id"] == vocabulary["<|mdm_mask|>"]
    assert config["image_token_id"] == vocabulary["<IMG_CONTEXT>"]
    assert config["caption_token_ids"][5] == vocabulary["<|Mask_Cap_5|>"]
    assert config["roi_token_ids"][5] == vocabulary["<|reserved_token_5|>"]


def test_a_released_checkpoint_keeps_its_own_conventions(region):
    config = config_of(region)
    assert config["roi_convention"] == "released" and config["roi_stride"] == 32
    assert config["region_layout"] == "released"
    assert config["vision_config"]["num_hidden_layers"] == 2  # of three, the last is not run


def test_the_whole_tokenizer_is_kept(region):
    before = PreTrainedTokenizerFast.from_pretrained(REGION)
    after = PreTrainedTokenizerFast.from_pretrained(region)
    assert after.get_vocab() == before.get_vocab()
    assert after.all_special_tokens == before.all_special_tokens


def test_a_prompt_token_moved_elsewhere_in_the_vocabulary_is_followed(tmp_path):
    source = copy_source("released-base", tmp_path / "source")
    (source / "special_tokens_map.json").unlink()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        text = (source / name).read_text().replace("<|mdm_mask|>", "<|swapped|>")
        text = text.replace("<|eot_id|>", "<|mdm_mask|>").replace("<|swapped|>", "<|eot_id|>")
        (source / name).write_text(text)
    config = config_of(convert(source, tmp_path / "out"))
    assert (config["mask_token_id"], config["eot_token_id"]) == (441, 438)


def test_the_vocabulary_size_is_the_tensors(tmp_path):
    source = copy_source("released-region", tmp_path / "source")

    def pad(tensors):
        for part in ("model.embed_tokens", "lm_head"):
            name = f"language_model.{part}.weight"
            tensors[name] = torch.cat([tensors[name], torch.zeros(4, 64)])

    edit_tensors(source, pad)
    assert config_of(convert(source, tmp_path / "out"))["text_config"]["vocab_size"] == 472


def test_a_grouped_query_backbone_is_converted(tmp_path):
    source = copy_source("released-region", tmp_path / "source")
    config = config_of(source)
    config["language_model_config"]["num_key_value_heads"] = 2
    edit_json(source / "config.json", language_model_config=config["language_model_config"])

    def halve(tensors):
        for name in tensors:
            if name.endswith(("k_proj.weight", "v_proj.weight")) and "language" in name:
                tensors[name] = tensors[name][:32].clone()

    edit_tensors(source, halve)
    convert(source, tmp_path / "out", verify=True)


def test_a_source_without_what_is_dropped_anyway_is_converted(region, tmp_path):
    source = copy_source("released-region", tmp_path / "source")

    def drop_unused(tensors):
        for name in list(tensors):
            if "text_model" in name or "logit" in name or "layers.2." in name and "vision" in name:
                del tensors[name]

    edit_tensors(source, drop_unused)
    assert same(weights(convert(source, tmp_path / "out")), weights(region))


def test_sharded_and_torch_sources_give_the_same_weights(region, tmp_path):
    sharded = copy_source("released-region", tmp_path / "sharded")
    split_weights(sharded, 3)
    pickled = copy_source("released-region", tmp_path / "pickled")
    torch.save(load_file(pickled / "model.safetensors"), pickled / "pytorch_model.bin")
    (pickled / "model.safetensors").unlink()
    for source in (sharded, pickled):
        output = convert(source, tmp_path / f"{source.name}-out")
        assert same(weights(output), weights(region))


# LLaDA and a fresh Base


@pytest.mark.parametrize("original", [True, False])
def test_a_base_is_assembled_from_llada_and_siglip(tmp_path, original):
    llada = make_llada(tmp_path / "llada", original=original)
    siglip = make_siglip(tmp_path / "siglip", whole=True)
    output = convert(llada, tmp_path / "out", vision_source=siglip, verify=True)
    got = weights(output)
    expected = language_tensors()
    assert all(torch.equal(got[f"language_model.{name}"], t) for name, t in expected.items())
    assert config_of(output)["num_region_prompts"] == 0


@pytest.mark.parametrize("old_names", [True, False])
def test_the_vision_part_of_siglip_alone_will_do(tmp_path, old_names):
    llada = make_llada(tmp_path / "llada", original=False)
    whole = make_siglip(tmp_path / "whole", whole=True)
    part = make_siglip(tmp_path / "part", whole=False, old_names=old_names)
    a = convert(llada, tmp_path / "a", vision_source=whole)
    b = convert(llada, tmp_path / "b", vision_source=part)
    assert same(weights(a), weights(b))


def test_a_fresh_connector_is_the_same_at_every_conversion(tmp_path):
    llada = make_llada(tmp_path / "llada", original=True)
    siglip = make_siglip(tmp_path / "siglip", whole=True)
    a, b = (convert(llada, tmp_path / name, vision_source=siglip) for name in "ab")
    assert same(weights(a), weights(b))
    assert 0.015 < weights(a)["connector.linear_1.weight"].std() < 0.025


def test_missing_special_tokens_are_added_for_a_fresh_base(tmp_path):
    llada = make_llada(tmp_path / "llada", original=True)
    siglip = make_siglip(tmp_path / "siglip", whole=True)
    output = convert(llada, tmp_path / "out", vision_source=siglip)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(output)
    assert len(tokenizer("<img><IMG_CONTEXT></img><|Mask_Cap_15|>").input_ids) == 4
    assert config_of(output)["image_token_id"] == 442  # the first id LLaDA leaves free


def test_the_embedding_grows_where_added_tokens_do_not_fit(tmp_path):
    llada = make_llada(tmp_path / "llada", original=False, rows=445)
    siglip = make_siglip(tmp_path / "siglip", whole=True)
    output = convert(llada, tmp_path / "out", vision_source=siglip, verify=True)
    rows = weights(output)["language_model.model.embed_tokens.weight"]
    assert rows.shape == (442 + 3 + 16, 64)
    assert torch.equal(rows[:445], language_tensors()["model.embed_tokens.weight"][:445])


def test_the_language_model_decides_the_dtype_of_a_fresh_base(tmp_path):
    llada = make_llada(tmp_path / "llada", original=True, dtype=torch.bfloat16)
    siglip = make_siglip(tmp_path / "siglip", whole=True)
    output = convert(llada, tmp_path / "out", vision_source=siglip)
    assert {t.dtype for t in weights(output).values()} == {torch.bfloat16}
    assert config_of(output)["dtype"] == "bfloat16"


def test_names_and_shapes_of_the_real_8b_llada_are_the_models():
    folder = FIXTURES / "llada-8b-instruct-hf"
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    shapes = model_shapes(PerceptionDLMConfig())
    language = {name: s for name, s in shapes.items() if name.startswith("language_model.")}
    names = Tensors(folder, dict.fromkeys(index["weight_map"], ()))
    assert map_names(names, llama_rules("", tied=False)).keys() == language.keys()
    assert len(index["weight_map"]) == 291
    parameters = sum(torch.Size(shape).numel() for shape in language.values())
    assert 2 * parameters == index["metadata"]["total_size"]


def test_names_of_the_original_8b_llada_are_the_models():
    index = json.loads(
        (FIXTURES / "llada-8b-instruct-hf" / "model.safetensors.index.json").read_text()
    )
    names = Tensors(Path("llada"), {original_name(name): () for name in index["weight_map"]})
    origins = map_names(names, original_llada_rules(tied=False))
    assert {t: original_name(t.removeprefix("language_model.")) for t in origins} == {
        target: origin.name for target, origin in origins.items()
    }


# LLaDA-V


def test_llava_takes_the_published_siglip_where_none_is_named(tmp_path):
    with pytest.raises(ValueError, match="1 to 6 tiles of 384 pixels a side .as vision_source"):
        convert(VECTORS / "released-llava", tmp_path / "out")


def test_llava_templates_render_parts_text_and_a_default_system_turn(tmp_path):
    vision = VECTORS / "released-llava" / "vision" / "config.json"
    output = convert(VECTORS / "released-llava", tmp_path / "out", vision_source=vision)
    template = (output / "chat_template.jinja").read_text()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(output)
    parts = [{"type": "image"}, {"type": "text", "text": "What?"}]
    turns = [
        {"role": "system", "content": [{"type": "text", "text": "Be brief."}]},
        {"role": "user", "content": parts},
        {"role": "assistant", "content": "A cat."},
        {"role": "user", "content": "Sure?"},
    ]
    own = "<|startoftext|><|start_header_id|>system<|end_header_id|>\n\n"
    rendered = tokenizer.apply_chat_template(turns, chat_template=template, tokenize=False)
    assert rendered == (
        f"{own}Be brief.<|eot_id|><|start_header_id|>user<|end_header_id|>\n\n<image>\nWhat?"
        "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\nA cat.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nSure?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    )
    alone = tokenizer.apply_chat_template(turns[1:2], chat_template=template, tokenize=False)
    assert alone.startswith(f"{own}You are a helpful language and vision assistant.")


def test_llava_settings_that_only_it_has_are_in_the_config(tmp_path):
    vision = VECTORS / "released-llava" / "vision"
    output = convert(VECTORS / "released-llava", tmp_path / "out", vision_source=vision)
    config = config_of(output)
    assert config["anyres_max_tiles"] == 4 and config["spatial_merge_size"] == 1
    assert not config.get("generation_defaults") and not config.get("banned_token_ids")
    decoding = json.loads((output / "generation_config.json").read_text())
    assert decoding["stop_strings"] == ["<|eot_id|>"]
    assert config["mask_token_id"] not in decoding["suppress_tokens"]
    assert len(decoding["suppress_tokens"]) == 4


# This package's own layout


def test_a_converted_folder_converts_to_itself(region, tmp_path):
    again = convert(region, tmp_path / "again", verify=True)
    assert same(weights(again), weights(region))
    for name in ("config.json", "processor_config.json", "chat_template.jinja", "tokenizer.json"):
        assert (again / name).read_text() == (region / name).read_text(), name


def test_a_saved_processor_is_kept_with_its_settings(region, tmp_path):
    source = Path(shutil.copytree(region, tmp_path / "source"))
    path = source / "processor_config.json"
    edit_json(path, system_prompt="Look closely.")
    images = json.loads(path.read_text())["image_processor"]
    edit_json(path, image_processor={**images, "max_tiles": 3})
    saved = json.loads((convert(source, tmp_path / "out") / path.name).read_text())
    assert saved["system_prompt"] == "Look closely."
    assert saved["image_processor"]["max_tiles"] == 3


def test_a_training_checkpoint_takes_what_it_lacks_from_its_base(region, tmp_path):
    model = PerceptionDLMForConditionalGeneration.from_pretrained(region)
    model.region_prompts.weight.data.zero_()
    model.save_pretrained(tmp_path / "checkpoint-10")
    output = convert(tmp_path / "checkpoint-10", tmp_path / "out", base=region, verify=True)
    assert not weights(output)["region_prompts.weight"].any()


def test_tied_embeddings_are_written_once(region, tmp_path):
    config = PerceptionDLMConfig.from_pretrained(region)
    config.text_config.tie_word_embeddings = config.tie_word_embeddings = True
    model = PerceptionDLMForConditionalGeneration(config)
    model.save_pretrained(tmp_path / "tied")
    output = convert(tmp_path / "tied", tmp_path / "out", base=region, verify=True)
    assert "language_model.lm_head.weight" not in weights(output)


def test_weights_that_fsdp_saved_sharded_are_exported(region, tmp_path):
    from torch.distributed.checkpoint import save

    sharded = tmp_path / "checkpoint-10" / "pytorch_model_fsdp_0"
    save({"model": weights(region)}, checkpoint_id=sharded, no_dist=True)
    output = convert(tmp_path / "checkpoint-10", tmp_path / "out", base=region, verify=True)
    assert same(weights(output), weights(region))
    assert same(weights(convert(sharded, tmp_path / "direct", base=region)), weights(region))


def test_an_adapter_is_merged_into_its_base(region, tmp_path):
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)  # the adapter is drawn, and so is how exactly it merges
    model = PerceptionDLMForConditionalGeneration.from_pretrained(region)
    adapted = peft.get_peft_model(
        model,
        peft.LoraConfig(
            target_modules=r"language_model\..*\.(q_proj|v_proj)",
            modules_to_save=["region_prompts", "connector"],
            init_lora_weights=False,
        ),
    )
    model.region_prompts.weight.data.add_(1.0)
    adapted.save_pretrained(tmp_path / "adapter")
    ids = torch.arange(12)[None]
    with torch.no_grad():
        expected = adapted(input_ids=ids).logits
        output = convert(tmp_path / "adapter", tmp_path / "out", base=region)
        merged = PerceptionDLMForConditionalGeneration.from_pretrained(output)
        got = merged(input_ids=ids).logits
        before = PerceptionDLMForConditionalGeneration.from_pretrained(region)(input_ids=ids).logits
    assert torch.allclose(got, expected, atol=1e-5) and not torch.allclose(got, before, atol=1e-2)
    raised = merged.region_prompts.weight - weights(region)["region_prompts.weight"]
    assert torch.allclose(raised, torch.ones_like(raised))


# Writing


def test_the_dtype_asked_for_is_the_one_written(region, tmp_path):
    output = convert(REGION, tmp_path / "out", dtype="bfloat16", verify=True)
    expected = {name: tensor.bfloat16() for name, tensor in weights(region).items()}
    assert same(weights(output), expected)
    assert AutoConfig.from_pretrained(output, trust_remote_code=True).dtype == torch.bfloat16


def test_shards_stay_under_the_size_asked_for_and_load(region, tmp_path):
    output = convert(REGION, tmp_path / "out", max_shard_size="200KB", verify=True)
    files = sorted(output.glob("*.safetensors"))
    assert len(files) > 3
    assert all(sum(t.nbytes for t in load_file(f).values()) <= 200_000 for f in files)
    index = json.loads((output / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == weights(region).keys()
    for name, file in index["weight_map"].items():
        with safe_open(output / file, framework="pt") as shard:
            assert name in shard.keys()


def test_no_more_than_a_shard_is_in_memory_at_once(tmp_path, monkeypatch):
    living, peak = {}, 0
    load = checkpoint_files.SafetensorsFile.load

    def watched(self, name):
        nonlocal peak
        tensor = load(self, name)
        living[id(tensor)] = tensor.nbytes
        weakref.finalize(tensor, living.pop, id(tensor))
        peak = max(peak, sum(living.values()))
        return tensor

    monkeypatch.setattr(checkpoint_files.SafetensorsFile, "load", watched)
    convert(REGION, tmp_path / "out", max_shard_size="200KB")
    assert 0 < peak <= 200_000


@pytest.mark.parametrize(
    ("size", "expected"), [("5GB", 5 * 10**9), ("1.5 MiB", 3 * 2**19), (7, 7), ("300kb", 300_000)]
)
def test_sizes_are_read_as_people_write_them(size, expected):
    assert parse_size(size) == expected


def test_the_output_holds_the_models_modules_and_no_others(region):
    modules = {path.name for path in region.glob("*.py")}
    assert {"modeling_perceptiondlm.py", "processing_perceptiondlm.py"} <= modules
    assert len(modules) <= 23
    assert not any("convert" in name or "publish" in name for name in modules)
    for path in region.glob("*.py"):
        for line in path.read_text().splitlines():
            if line.startswith("from ."):
                assert line.split()[1][1:] + ".py" in modules, line


def test_the_config_names_every_auto_class(region):
    root = json.loads((Path(__file__).parents[1] / "config.json").read_text())
    assert config_of(region)["auto_map"] == root["auto_map"]
    assert config_of(region)["architectures"] == root["architectures"]


def test_weights_are_readable_by_whom_the_config_is(region):
    assert (region / "model.safetensors").stat().st_mode == (region / "config.json").stat().st_mode


def test_the_processor_of_the_output_fits_its_model(region):
    processor = PerceptionDLMProcessor.from_pretrained(region, trust_remote_code=True)
    assert processor.image_processor.image_size == config_of(region)["vision_config"]["image_size"]
    assert processor.mask_token_id == config_of(region)["mask_token_id"]


def test_tensors_in_memory_are_described_like_files():
    tensors = StateDict(Path("memory"), {"a": torch.ones(2, 3)})
    assert tensors.shape("a") == (2, 3) and torch.equal(tensors.load("a"), torch.ones(2, 3))
    with pytest.raises(ValueError, match="expected a tensor 'b' in memory, got none"):
        tensors.shape("b")


def test_an_index_is_not_needed_for_a_single_file(region):
    assert not (region / "model.safetensors.index.json").exists()


def test_the_decoding_defaults_of_our_own_layout_are_kept(tmp_path):
    source = ROOT / SHAPES
    folder = convert(source, tmp_path / "converted")
    before, after = (
        json.loads((place / "generation_config.json").read_text()) for place in (source, folder)
    )
    after.pop("transformers_version")
    assert after == before and after["caption_length"] == 11
