"""Vision layers that start out looking at neighbouring patches."""

import copy

import pytest
import torch
from perceptiondlm.training.build import build_model
from perceptiondlm.training.local_attention import start_locally
from training_runs import TINY, small_recipe

SIDE = 8  # patches


def model_of(tmp_path, local_layers: int, heads: int = 4):
    config = copy.deepcopy(TINY)
    config["vision_config"] |= {
        "hidden_size": 64, "num_attention_heads": heads, "num_hidden_layers": 3, "image_size": 64,
    }
    recipe = small_recipe(tmp_path, model={"config": config, "local_layers": local_layers})
    return build_model(recipe)[0]


@torch.no_grad()
def most_attended(model, index: int) -> torch.Tensor:
    """(heads, patches): the patch that each patch of a noisy picture attends to most, in a layer
    given the embeddings."""
    tower = model.vision_tower
    hidden = tower.embeddings(torch.rand(1, 3, 64, 64) * 2 - 1)
    layer = tower.encoder.layers[index]
    states = layer.layer_norm1(hidden)[0]
    heads = layer.self_attn.num_heads
    query = layer.self_attn.q_proj(states).unflatten(1, (heads, -1)).transpose(0, 1)
    key = layer.self_attn.k_proj(states).unflatten(1, (heads, -1)).transpose(0, 1)
    return (query @ key.mT).argmax(-1)


# where (row, column) patch (3, 4) looks, by hand: below, right, above, left; then the diagonals
# and two steps away
LOOKS = [
    [(4, 4), (3, 5), (2, 4), (3, 3)],
    [(4, 5), (2, 5), (4, 3), (2, 3)],
    [(5, 4), (3, 6), (1, 4), (3, 2)],
]


@pytest.mark.parametrize("layer, looks", list(enumerate(LOOKS)))
def test_each_head_of_a_local_layer_looks_at_one_neighbour(tmp_path, layer, looks):
    attended = most_attended(model_of(tmp_path, 3), layer)[:, 3 * SIDE + 4]
    assert [divmod(int(patch), SIDE) for patch in attended] == looks


def test_layers_beyond_the_local_ones_start_at_random(tmp_path):
    attended = most_attended(model_of(tmp_path, 1), 1)[:, 3 * SIDE + 4]
    assert [divmod(int(patch), SIDE) for patch in attended] != LOOKS[1]


def test_colours_and_region_prompts_leave_the_position_alone(tmp_path):
    model = model_of(tmp_path, 1)
    tower, width = model.vision_tower, 64 // 4
    one, other = (tower.embeddings(torch.rand(1, 3, 64, 64)) for _ in range(2))
    assert torch.equal(one[..., :width], other[..., :width])
    assert not torch.equal(one[..., width:], other[..., width:])
    assert not model.region_prompts.weight[:, :width].any()
    assert model.region_prompts.weight[:, width:].any()


@pytest.mark.parametrize("layers, heads", [(-1, 4), (4, 4), (1, 1), (1, 32)])
def test_a_tower_that_cannot_start_locally_is_refused(tmp_path, layers, heads):
    with pytest.raises(ValueError, match="local vision layers of several heads"):
        start_locally(model_of(tmp_path, 0, heads), layers)


def test_starting_values_beside_a_checkpoint_are_refused(tmp_path):
    with pytest.raises(ValueError, match="model.local_layers only without model.checkpoint"):
        small_recipe(tmp_path, model={"checkpoint": "some/model", "local_layers": 1})
