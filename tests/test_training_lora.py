"""LoRA: few parameters, one adapter folder, three ways to load it, one merged model."""

import json
import warnings

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from perceptiondlm.training.lora import add_adapter
from perceptiondlm.training.recipe import build_recipe
from perceptiondlm.training.recipe_sections import LoraRecipe
from perceptiondlm.training.run import arguments_of, build_trainer, train
from training_runs import TINY, losses_of, recipe_values, small_recipe
from transformers import AutoModel, AutoProcessor


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Folder of a small trained model."""
    folder = tmp_path_factory.mktemp("base")
    train(small_recipe(folder, trainer={"max_steps": 2}))
    return folder


@pytest.fixture(scope="module")
def tuned(base, tmp_path_factory):
    """A LoRA run on it, and its adapter's folder."""
    folder = tmp_path_factory.mktemp("adapter")
    return train(lora_recipe(base, folder)), folder


def lora_recipe(base, folder, lora=None, **trainer):
    return small_recipe(
        folder,
        model={"checkpoint": str(base), "config": {}, "tokenizer": None},
        lora={"r": 4, "alpha": 16, **(lora or {})},
        data={"region_share": 1.0},
        masking={"t_low": 1.0},
        trainer={"max_steps": 12, **trainer},
    )


@pytest.fixture(scope="module")
def batch(tuned):
    trainer, _ = tuned
    samples = [trainer.train_dataset[i] for i in range(4)]
    return {
        k: v
        for k, v in trainer.data_collator(samples).items()
        if k not in ("labels", "timesteps", "noise")
    }


def logits_of(model, batch) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(**batch).logits


def test_an_adapter_of_a_flagship_decoder_has_under_5_percent_of_its_parameters(make_config):
    from perceptiondlm.modeling_perceptiondlm import PerceptionDLMForConditionalGeneration

    shape = {
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "vocab_size": 126464,
    }
    vision = {
        "hidden_size": 1152,
        "intermediate_size": 4304,
        "num_hidden_layers": 26,
        "num_attention_heads": 16,
        "image_size": 512,
        "patch_size": 16,
    }
    with torch.device("meta"):
        model = PerceptionDLMForConditionalGeneration(make_config(text=shape, vision=vision))
        model = add_adapter(model, LoraRecipe())
    learning = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in model.parameters())
    assert 0.001 < learning / total < 0.05


def test_only_the_decoder_is_adapted_and_the_small_modules_learn_whole(tuned):
    trainer, _ = tuned
    learning = {n for n, p in trainer.model.named_parameters() if p.requires_grad}
    adapted = {n for n in learning if "lora_" in n}
    assert adapted and all("language_model.model.layers" in n for n in adapted)
    assert {n.split(".modules_to_save")[0].split(".")[-1] for n in learning - adapted} == {
        "connector",
        "region_prompts",
    }
    kinds = {n.split(".lora_")[0].rsplit(".", 1)[1] for n in adapted}
    assert kinds == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def test_the_adapter_learns_and_changes_the_outputs(base, tuned, batch):
    trainer, _ = tuned
    plain = AutoModel.from_pretrained(base, trust_remote_code=True)
    assert not torch.allclose(logits_of(plain, batch), logits_of(trainer.model, batch), atol=1e-2)
    samples = trainer.data_collator([trainer.train_dataset[i] for i in range(16)])
    with torch.no_grad():
        before = plain.eval()(**samples, loss_weighting="none").loss
        after = trainer.model.eval()(**samples, loss_weighting="none").loss
    assert after < before - 0.02


def test_the_adapter_folder_loads_through_auto_model(tuned, batch):
    trainer, folder = tuned
    assert not (folder / "model.safetensors").exists()
    model = AutoModel.from_pretrained(folder, trust_remote_code=True)
    assert torch.allclose(logits_of(model, batch), logits_of(trainer.model, batch), atol=1e-6)


def test_the_adapter_loads_through_peft_and_merges(base, tuned, batch, tmp_path):
    trainer, folder = tuned
    plain = AutoModel.from_pretrained(base, trust_remote_code=True)
    adapted = PeftModel.from_pretrained(plain, folder)
    expected = logits_of(trainer.model, batch)
    assert torch.allclose(logits_of(adapted, batch), expected, atol=1e-6)
    merged = adapted.merge_and_unload()
    merged.save_pretrained(tmp_path)
    assert torch.allclose(logits_of(merged, batch), expected, atol=1e-5)
    reloaded = AutoModel.from_pretrained(tmp_path, trust_remote_code=True)
    assert torch.allclose(logits_of(reloaded, batch), expected, atol=1e-5)


def test_the_adapter_folder_generates_with_its_own_processor(tuned, draw_image, blobs):
    trainer, folder = tuned
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    model = AutoModel.from_pretrained(folder, trust_remote_code=True)
    image, masks = draw_image(40, 60), blobs(40, 60, 2)
    options = {"processor": processor, "steps": 3}
    one = model.diffusion_generate(image, masks, **options)
    other = trainer.model.eval().base_model.model.diffusion_generate(image, masks, **options)
    assert one.token_ids == other.token_ids


def test_a_resumed_lora_run_equals_an_uninterrupted_one(base, tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 9}
    whole = train(lora_recipe(base, tmp_path / "a", **saving))
    resumed = train(
        lora_recipe(base, tmp_path / "b", **saving), resume=str(tmp_path / "a" / "checkpoint-9")
    )
    assert losses_of(resumed) == losses_of(whole)


def test_an_adapter_starts_the_same_from_the_same_seed(base, tmp_path):
    def start(seed):
        recipe = lora_recipe(base, tmp_path, seed=seed)
        torch.rand(seed + 1)  # whatever was drawn before
        return build_trainer(recipe, arguments_of(recipe)).model.state_dict()

    one, again, other = start(0), start(0), start(1)
    assert all(torch.equal(one[name], again[name]) for name in one)
    assert not all(torch.equal(one[name], other[name]) for name in one)


def test_an_adapter_trains_with_checkpointing_and_without_a_deprecation(base, tmp_path):
    options = {"max_steps": 2, "activation_checkpointing": True}
    plain = losses_of(train(lora_recipe(base, tmp_path / "a", max_steps=2)))
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        trainer = train(lora_recipe(base, tmp_path / "b", **options))
    assert losses_of(trainer) == plain


def test_a_changed_config_is_refused_since_the_adapter_would_not_hold_it(tmp_path):
    values = recipe_values(tmp_path, model={"checkpoint": "base", "config": TINY}, lora={"r": 4})
    with pytest.raises(ValueError, match="no model.config with lora"):
        build_recipe(values)


def test_options_choose_the_rank_targets_and_whole_modules(base, tmp_path):
    options = {
        "r": 2,
        "target_modules": ["q_proj"],
        "modules_to_save": ["lm_head"],
        "dropout": 0.5,
        "alpha": 8,
    }
    recipe = lora_recipe(base, tmp_path, lora=options)
    model = build_trainer(recipe, arguments_of(recipe)).model
    learning = {n: p for n, p in model.named_parameters() if p.requires_grad}
    ranks = {p.shape[0] for n, p in learning.items() if "lora_A" in n}
    assert ranks == {2}
    assert all("q_proj" in n or "lm_head" in n for n in learning)
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (saved["lora_dropout"], saved["lora_alpha"]) == (0.5, 8)
    assert saved["base_model_name_or_path"] == str(base)


# Adapters of the region prompts.


@pytest.fixture
def prompted(base):
    """The small model and a batch with regions and labels."""
    recipe = small_recipe(base, data={"region_share": 1.0})
    trainer = build_trainer(recipe, arguments_of(recipe))
    samples = [trainer.train_dataset[i] for i in range(2)]
    model = AutoModel.from_pretrained(base, trust_remote_code=True)
    return model, trainer.data_collator(samples)


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["region_prompts"]},
        {"target_modules": ["region_prompts"], "use_dora": True},
        {"target_modules": ["region_prompts"], "use_rslora": True},
        {"target_modules": ["q_proj"], "modules_to_save": ["region_prompts"]},
        {"target_modules": ["q_proj"], "trainable_token_indices": {"region_prompts": [0, 1]}},
    ],
    ids=["lora", "dora", "rslora", "whole", "rows"],
)
def test_an_adapter_of_the_region_prompts_learns_and_is_kept(prompted, base, options, tmp_path):
    model, batch = prompted
    inputs = {k: v for k, v in batch.items() if k not in ("labels", "timesteps", "noise")}
    before = logits_of(model, inputs)
    adapted = get_peft_model(model, LoraConfig(r=4, **options))
    own = {n: p for n, p in adapted.named_parameters() if "region_prompts" in n and p.requires_grad}
    optimizer = torch.optim.SGD(own.values(), lr=30.0)
    for _ in range(2):  # one of LoRA's two factors begins as zero
        adapted(**batch).loss.backward()
        optimizer.step()
    assert own and all(bool(p.grad.any()) for p in own.values())

    after = logits_of(adapted, inputs)
    assert (after - before).abs().max() > 1e-3
    adapted.save_pretrained(tmp_path / "adapter")
    plain = AutoModel.from_pretrained(base, trust_remote_code=True)
    again = PeftModel.from_pretrained(plain, tmp_path / "adapter")
    assert torch.allclose(logits_of(again, inputs), after, atol=1e-5)
    merged = again.merge_and_unload()
    assert torch.allclose(logits_of(merged, inputs), after, atol=1e-5)
    merged.save_pretrained(tmp_path / "merged")
    reloaded = AutoModel.from_pretrained(tmp_path / "merged", trust_remote_code=True)
    assert torch.allclose(logits_of(reloaded, inputs), after, atol=1e-5)
