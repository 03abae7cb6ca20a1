"""Tensor parallelism by transformers' own plans, on two CPU processes."""

import os
import socket

import pytest
import torch
import torch.multiprocessing
from perceptiondlm.modeling_perceptiondlm import PerceptionDLMForConditionalGeneration

SETTINGS = [
    {},
    {"tie_word_embeddings": True},
    {"region_layout": "independent", "text": {"tie_word_embeddings": True}},
]


@pytest.mark.parametrize("changes", SETTINGS)
def test_the_plan_splits_the_decoder_its_embeddings_and_head(make_config, changes):
    with torch.device("meta"):
        model = PerceptionDLMForConditionalGeneration(make_config(**changes))
    text, layer = "language_model.model", "language_model.model.layers.*"
    columns = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"]
    columns += ["mlp.gate_proj", "mlp.up_proj"]
    plan = dict(model.tp_plan)
    assert plan.pop("language_model.lm_head").startswith("colwise")  # its output is gathered
    assert plan.pop(f"{text}.embed_tokens") == "embedding_rowwise"
    assert plan == {
        **{f"{layer}.{name}": "colwise" for name in columns},
        **{f"{layer}.{name}": "rowwise" for name in ("self_attn.o_proj", "mlp.down_proj")},
    }
    assert model.supports_tp_plan


def test_no_pipeline_plan_is_declared(make_config):
    with torch.device("meta"):
        model = PerceptionDLMForConditionalGeneration(make_config())
    for part in (model, model.language_model, model.language_model.model):
        assert not part.supports_pp_plan and not part.pp_plan


@pytest.mark.sharded
@pytest.mark.parametrize("changes", SETTINGS)
def test_two_processes_compute_and_learn_what_one_does(
    make_config, make, draw_image, blobs, changes, tmp_path
):
    model, processor = make(**changes)
    model.save_pretrained(tmp_path)
    asked = {"masks": blobs(61, 47, count=2), "captions": ["a red circle", "a person"]}
    training = processor(draw_image(61, 47), **asked)
    draws = {"timesteps": torch.tensor([0.7]), "noise": torch.rand(training["labels"].shape)}
    asked = processor(draw_image(61, 47), masks=asked["masks"], caption_length=4)
    inputs = dict(asked), {**training, **draws}
    expected = measured(model, *inputs)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(
        measure_apart, (port, str(tmp_path), inputs, tmp_path / "found"), nprocs=2
    )
    for rank in (0, 1):
        found = torch.load(tmp_path / f"found-{rank}")
        assert found.pop("ids") == expected["ids"]
        for name, values in found.items():
            scale = expected[name].abs().max()
            assert (values - expected[name]).abs().max() < 1e-5 * scale, name


def measured(model, inputs: dict, training: dict) -> dict:
    """Ids, logits, loss and a gradient of a model."""
    caches = (None, 2, 0)
    options = [{"steps": 3, "prompt_refresh_interval": cache, "cfg_scale": 0.5} for cache in caches]
    ids = [model.diffusion_generate(inputs=dict(inputs), **own).token_ids for own in options]
    logits = model(**inputs).logits.detach()
    model.zero_grad()
    loss = model(**training).loss
    loss.backward()
    gradient = model.region_prompts.weight.grad.clone()
    model.zero_grad()
    return {"ids": ids, "logits": logits, "loss": loss.detach(), "gradient": gradient}


def measure_apart(rank: int, port: int, folder: str, inputs: tuple, found):
    """In one of two processes: the same of the model split over both, saved."""
    places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({k: str(v) for k, v in (places | address).items()})
    model = PerceptionDLMForConditionalGeneration.from_pretrained(folder, tp_plan="auto").eval()
    torch.save(measured(model, *inputs), f"{found}-{rank}")
    torch.distributed.destroy_process_group()
