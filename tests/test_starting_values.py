"""Starting values: layers that add nothing, and vision layers that look at neighboring patches."""

import copy

import pytest
import torch
from perceptiondlm.training.build import build_model
from perceptiondlm.training.run import train
from perceptiondlm.training.starting_values import start_locally
from training_runs import TINY, small_recipe

SIDE = 8  # patches


def model_of(tmp_path, local_layers: int, heads: int = 4, **options):
    config = copy.deepcopy(TINY)
    config["vision_config"] |= {
        "hidden_size": 64,
        "num_attention_heads": heads,
        "num_hidden_layers": 3,
        "image_size": 64,
    }
    options |= {"config": config, "local_layers": local_layers}
    return build_model(small_recipe(tmp_path, model=options))[0]


@torch.no_grad()
def most_attended(model, index: int) -> torch.Tensor:
    """(heads, patches): the patch that each patch of a noisy image attends to most, in a layer
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
def test_each_head_of_a_local_layer_looks_at_one_neighbor(tmp_path, layer, looks):
    attended = most_attended(model_of(tmp_path, 3), layer)[:, 3 * SIDE + 4]
    assert [divmod(int(patch), SIDE) for patch in attended] == looks


def test_layers_beyond_the_local_ones_start_at_random(tmp_path):
    attended = most_attended(model_of(tmp_path, 1), 1)[:, 3 * SIDE + 4]
    assert [divmod(int(patch), SIDE) for patch in attended] != LOOKS[1]


def test_colors_and_region_prompts_leave_the_position_alone(tmp_path):
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


@torch.no_grad()
def test_without_residuals_every_local_layer_of_the_tower_looks_at_its_neighbors(tmp_path):
    options = {"zero_residuals": True, "attn_implementation": "eager"}
    tower = model_of(tmp_path, 3, **options).vision_tower
    seen = []
    for layer in tower.encoder.layers:
        layer.self_attn.register_forward_hook(lambda module, args, output: seen.append(output[1]))
    tower(torch.rand(1, 3, 64, 64) * 2 - 1)
    for attention, looks in zip(seen, LOOKS, strict=True):  # (1, heads, patches, patches)
        attended = attention[0, :, 3 * SIDE + 4].max(-1)
        assert [divmod(int(patch), SIDE) for patch in attended.indices] == looks
        assert attended.values.min() > 0.3  # evenly it would be 0.016


@torch.no_grad()
def test_layers_without_residuals_hand_on_their_input(tmp_path):
    model = build_model(small_recipe(tmp_path, model={"zero_residuals": True}))[0]
    tower, side = model.vision_tower, model.config.vision_config.image_size
    image = torch.rand(1, 3, side, side)
    assert torch.equal(tower(image), tower.embeddings(image))
    words = torch.arange(100, 105)[None]
    states = model(words, output_hidden_states=True).hidden_states
    assert torch.equal(states[-2], states[0])  # the last one is normalized
    assert torch.equal(states[0], model.get_input_embeddings()(words))


def test_layers_without_residuals_learn_to_add_some(tmp_path):
    recipe = small_recipe(tmp_path, model={"zero_residuals": True})
    layer = train(recipe).model.language_model.model.layers[0]
    assert layer.mlp.down_proj.weight.any() and layer.self_attn.o_proj.weight.any()


@pytest.mark.parametrize("name, value", [("local_layers", 1), ("zero_residuals", True)])
def test_starting_values_beside_a_checkpoint_are_refused(tmp_path, name, value):
    with pytest.raises(ValueError, match=f"model.{name} only without model.checkpoint"):
        small_recipe(tmp_path, model={"checkpoint": "some/model", name: value})
