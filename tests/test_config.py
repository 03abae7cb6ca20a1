"""What a configuration holds, refuses and keeps."""

import copy
import json
from pathlib import Path

import pytest
import torch
from perceptiondlm.configuration_perceptiondlm import PerceptionDLMConfig, PerceptionDLMTextConfig
from perceptiondlm.generation_generate import default_generation_config
from perceptiondlm.modeling_perceptiondlm import PerceptionDLMForConditionalGeneration
from transformers import AutoConfig

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def flagship():
    config = AutoConfig.from_pretrained(ROOT, trust_remote_code=True)
    with torch.device("meta"):
        return PerceptionDLMForConditionalGeneration(
            PerceptionDLMConfig.from_dict(config.to_dict())
        )


def test_the_flagship_has_lladas_parameters_and_tensors(flagship):
    index = ROOT / "tests" / "fixtures" / "llada-8b-instruct-hf" / "model.safetensors.index.json"
    names = json.loads(index.read_text())["weight_map"]
    language = flagship.language_model.state_dict()
    assert set(language) == set(names)
    assert len(language) == 291
    assert sum(p.numel() for p in flagship.language_model.parameters()) == 8_015_581_184


def test_the_flagship_has_the_released_vision_and_region_shapes(flagship):
    shapes = {name: tuple(p.shape) for name, p in flagship.named_parameters()}
    assert shapes["region_prompts.weight"] == (6, 1152)
    assert shapes["connector.linear_1.weight"] == (4096, 4 * 1152)
    assert shapes["vision_tower.embeddings.position_embedding.weight"] == (1024, 1152)
    layers = {name.split(".")[3] for name in shapes if name.startswith("vision_tower.encoder")}
    assert len(layers) == 26
    assert shapes["vision_tower.encoder.layers.25.mlp.fc1.weight"] == (4304, 1152)


def test_the_text_model_agrees_with_the_renamed_lladas_config(flagship):
    path = ROOT / "tests" / "fixtures" / "llada-8b-instruct-hf" / "config.json"
    theirs, ours = json.loads(path.read_text()), flagship.config.text_config
    shared = (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "rms_norm_eps",
        "hidden_act",
    )
    assert {k: getattr(ours, k) for k in shared} == {k: theirs[k] for k in shared}
    assert ours.rope_parameters["rope_theta"] == theirs["rope_theta"]


def test_the_root_config_is_the_default_config():
    saved = PerceptionDLMConfig.from_pretrained(ROOT).to_diff_dict()
    fresh = PerceptionDLMConfig().to_diff_dict()
    for key in ("architectures", "auto_map", "dtype", "transformers_version", "_name_or_path"):
        saved.pop(key, None), fresh.pop(key, None)
    assert saved == fresh


def test_the_root_config_maps_every_auto_class_to_a_class_that_is_there():
    auto_map = json.loads((ROOT / "config.json").read_text())["auto_map"]
    assert set(auto_map) == {
        "AutoConfig",
        "AutoModel",
        "AutoModelForImageTextToText",
        "AutoProcessor",
        "AutoImageProcessor",
    }
    for reference in auto_map.values():
        module, name = reference.split(".")
        assert f"class {name}(" in (ROOT / f"{module}.py").read_text()


def test_a_config_survives_saving(make_config, tmp_path):
    config = make_config(
        region_layout="independent",
        roi_convention="aligned",
        num_region_prompts=3,
        generation_defaults={"steps": 4},
        text={"num_key_value_heads": 2, "rope_theta": 777.0},
    )
    config.save_pretrained(tmp_path)
    assert PerceptionDLMConfig.from_pretrained(tmp_path).to_dict() == config.to_dict()


def test_a_deep_copy_shares_nothing(make_config):
    config = make_config()
    twin = copy.deepcopy(config)
    twin.text_config.hidden_size = 8
    twin.roi_token_ids.append(-1)
    assert config.text_config.hidden_size == 32 and config.roi_token_ids[-1] != -1


def test_two_default_configs_share_no_lists():
    PerceptionDLMConfig().roi_token_ids.append(-1)
    assert -1 not in PerceptionDLMConfig().roi_token_ids


def test_suppressed_tokens_default_to_those_of_the_released_sampler(make_config):
    config = make_config()
    headers = {config.start_header_token_id, config.end_header_token_id}
    ends = {config.bos_token_id, config.eos_token_id}
    assert set(default_generation_config(config).suppress_tokens) == headers | ends | {
        config.mask_token_id
    }


@pytest.mark.parametrize("theta", [None, 12345.0])
def test_rope_theta_defaults_to_lladas_and_can_be_given(theta):
    given = {} if theta is None else {"rope_theta": theta}
    config = PerceptionDLMTextConfig(**given)
    assert config.rope_parameters["rope_theta"] == (theta or 500000.0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"region_layout": "tree"}, "region_layout to be one of released, independent, full"),
        ({"roi_convention": "other"}, "roi_convention to be one of released, aligned"),
        ({"image_layout": "other"}, "image_layout to be one of tiled, anyres"),
        ({"num_region_prompts": 17}, "num_region_prompts of at most 16"),
        ({"spatial_merge_size": 3}, "divisible by spatial_merge_size 3"),
        ({"image_layout": "anyres"}, "num_region_prompts 0 with image_layout 'anyres'"),
    ],
)
def test_a_config_that_no_model_fits_is_refused(make_config, changes, message):
    with pytest.raises(ValueError, match=message):
        make_config(**changes)
