"""What transformers expects of every model, image processor and processor.

Adapted from the lists of its own common tests (`test_modeling_common.py`,
`test_image_processing_common.py`, `test_processing_common.py`).

Apply here: saving and loading (whole, sharded, half precision, device maps, disk offload,
mismatched shapes, missing weights), initialization (seeds, meta, every parameter), determinism,
training (gradients, checkpointing, frozen embeddings), tuple and dict outputs, hidden states,
embeddings (get, set, resize, tie), attention implementations, RoPE scaling, the modules a device
map may not split, settings and their precedence. Elsewhere: batching equivalence and loading
without the source tree (`test_modeling.py`, `test_round_trip.py`), every part on a disk or on
another device (`test_offload.py`), tensor parallelism (`test_tensor_parallel.py`), eager against
sdpa and flex (`test_attention.py`), forms of images (`test_image_processing.py`), chat templates
(`test_processing.py`).

Do not apply: `inputs_embeds` (visual tokens are spliced by place, so the model takes ids alone),
`generate` and its caches (denoising is `diffusion_generate`), attention weights as an output (no
user has asked for them, and only one implementation could give them), causal losses and label
shifting (predictions stand at their own position), head pruning and feed-forward chunking (removed
or unused in transformers), expert and pipeline parallel plans (none are declared), `.bin` files,
torchvision backends (images are PIL's), audio and video, numpy outputs (`return_tensors` is "pt",
anything else is refused). Flash attention and quantization need a GPU that these tests do not have;
that flash attention is refused where the structure forbids it is in `test_attention.py`.
"""

import copy
import inspect
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import pytest_ignore_collect
from perceptiondlm.image_processing_perceptiondlm import PerceptionDLMImageProcessor
from perceptiondlm.modeling_perceptiondlm import PerceptionDLMForConditionalGeneration
from perceptiondlm.processing_perceptiondlm import PerceptionDLMProcessor
from safetensors.torch import load_file, save_file


@pytest.fixture
def model(make):
    """A model of the test's own."""
    return copy.deepcopy(make()[0])


@pytest.fixture
def inputs(make, draw_image, blobs):
    _, processor = make()
    return processor(draw_image(61, 47), masks=blobs(61, 47, count=2), caption_length=3)


@pytest.fixture
def training_inputs(make, draw_image, blobs):
    _, processor = make()
    inputs = processor(
        draw_image(61, 47), masks=blobs(61, 47, count=2), captions=["a red circle", "a person"]
    )
    draws = {"timesteps": torch.tensor([0.6]), "noise": torch.rand(inputs["labels"].shape)}
    return {**inputs, **draws}


@pytest.fixture
def saved(model, tmp_path):
    model.save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


def load(folder, **options):
    return PerceptionDLMForConditionalGeneration.from_pretrained(folder, **options).eval()


@torch.no_grad()
def logits_of(model, inputs):
    return model(**inputs).logits


# Saving and loading.


def test_a_saved_model_gives_the_same_logits(model, inputs, saved):
    assert torch.equal(logits_of(load(saved), inputs), logits_of(model, inputs))


def test_a_model_saved_in_shards_gives_the_same_logits(model, inputs, tmp_path):
    model.save_pretrained(tmp_path, max_shard_size="40KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    assert torch.equal(logits_of(load(tmp_path), inputs), logits_of(model, inputs))


def test_no_key_is_missing_or_unexpected_after_saving(saved):
    _, info = PerceptionDLMForConditionalGeneration.from_pretrained(saved, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))


def test_pickling_and_copying_keep_the_logits(model, inputs, tmp_path):
    torch.save(model, tmp_path / "model.pt")
    loaded = torch.load(tmp_path / "model.pt", weights_only=False)
    assert torch.equal(logits_of(loaded, inputs), logits_of(model, inputs))
    assert torch.equal(logits_of(copy.deepcopy(model), inputs), logits_of(model, inputs))


@pytest.mark.parametrize("device_map", ["cpu", "auto", {"": "cpu"}])
def test_a_device_map_gives_the_same_logits(model, inputs, saved, device_map):
    assert torch.equal(
        logits_of(load(saved, device_map=device_map), inputs), logits_of(model, inputs)
    )


def test_layers_offloaded_to_disk_give_the_same_logits(model, inputs, saved, tmp_path):
    parts = (
        "vision_tower",
        "connector",
        "region_prompts",
        "language_model.model.embed_tokens",
        "language_model.model.norm",
        "language_model.model.rotary_emb",
        "language_model.lm_head",
        "language_model.model.layers.0",
    )
    device_map = dict.fromkeys(parts, "cpu") | {"language_model.model.layers.1": "disk"}
    loaded = load(saved, device_map=device_map, offload_folder=tmp_path / "offload")
    assert torch.equal(logits_of(loaded, inputs), logits_of(model, inputs))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_dtype_is_kept_by_every_weight_and_works(inputs, saved, dtype):
    loaded = load(saved, dtype=dtype)
    assert {p.dtype for p in loaded.parameters()} == {dtype}
    logits = logits_of(loaded, inputs)
    assert logits.dtype == dtype and bool(logits.isfinite().all())


def test_the_saved_dtype_is_found_again(model, tmp_path):
    model.to(torch.bfloat16).save_pretrained(tmp_path)
    assert load(tmp_path, dtype="auto").dtype == torch.bfloat16


def test_half_precision_stays_close(model, inputs, saved):
    expected = logits_of(model, inputs)
    got = logits_of(load(saved, dtype=torch.bfloat16), inputs).float()
    assert (got - expected).abs().mean() < 0.05 * expected.abs().max()


def test_other_shapes_are_refused_unless_they_may_be_ignored(saved, make_config):
    config = make_config(text={"vocab_size": 500})
    with pytest.raises(ValueError, match="2 of another shape"):
        load(saved, config=config)
    loaded = load(saved, config=config, ignore_mismatched_sizes=True)
    assert loaded.get_input_embeddings().weight.shape[0] == 500
    assert all(bool(p.isfinite().all()) for p in loaded.parameters())


# Initialisation.


def test_a_seed_makes_the_same_weights(make_config):
    states = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        states.append(PerceptionDLMForConditionalGeneration(make_config()).state_dict())
    same = [torch.equal(a, b) for a, b in zip(states[0].values(), states[1].values(), strict=True)]
    assert all(same)
    assert not torch.equal(states[0]["region_prompts.weight"], states[2]["region_prompts.weight"])


@torch.no_grad()
def initialised(name: str, weight: torch.Tensor, spread: float) -> bool:
    """Norms are ones, biases zeros, the rest has some spread and none of it is huge."""
    if "norm" in name and name.endswith("weight"):
        return bool((weight == 1).all())
    if name.endswith("bias"):
        return bool((weight == 0).all())
    return bool(weight.isfinite().all()) and 0 < float(weight.std()) < spread


@pytest.mark.parametrize("changes", [{}, {"image_layout": "anyres", "num_region_prompts": 0}])
def test_every_weight_that_a_checkpoint_lacks_is_initialised(make_config, tmp_path, changes):
    """Models are built on meta when loaded, so a forgotten weight would be raw memory."""
    model = PerceptionDLMForConditionalGeneration(make_config(**changes))
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    kept = "language_model.model.layers.0.mlp.up_proj.weight"
    save_file({kept: weights[kept]}, tmp_path / "model.safetensors", {"format": "pt"})
    loaded = load(tmp_path, config=make_config(**changes, roi_stride=31))  # not the saved one
    assert [n for n, p in loaded.named_parameters() if not initialised(n, p, spread=2.0)] == []
    assert torch.equal(loaded.get_parameter(kept), weights[kept])
    buffers = dict(model.named_buffers())
    assert all(torch.equal(b, buffers[n]) for n, b in loaded.named_buffers())


def test_a_fresh_model_has_the_same_kinds_of_weights(make_config):
    model = PerceptionDLMForConditionalGeneration(make_config())
    assert [n for n, p in model.named_parameters() if not initialised(n, p, spread=2.0)] == []


def test_a_model_can_be_built_on_meta(make_config):
    with torch.device("meta"):
        model = PerceptionDLMForConditionalGeneration(make_config())
    assert {p.device.type for p in model.parameters()} == {"meta"}


def test_every_tensor_is_a_parameter_or_a_buffer(model):
    for module in model.modules():
        stray = [k for k, v in vars(module).items() if isinstance(v, torch.Tensor)]
        assert stray == []


# Forward and training.


def test_the_same_input_gives_the_same_output(model, inputs):
    assert torch.equal(logits_of(model, inputs), logits_of(model, inputs))


def test_tuple_and_dict_outputs_hold_the_same(model, inputs, training_inputs):
    with torch.no_grad():
        named = model(**inputs, output_hidden_states=True)
        plain = model(**inputs, output_hidden_states=True, return_dict=False)
        assert torch.equal(plain[0], named.logits)
        assert all(map(torch.equal, plain[1], named.hidden_states))
        loss = model(**training_inputs, return_dict=False)
    assert len(loss) == 1 and loss[0].shape == ()


def test_hidden_states_are_the_embeddings_and_every_layers_output(model, inputs):
    with torch.no_grad():
        out = model(**inputs, output_hidden_states=True)
    layers = model.config.text_config.num_hidden_layers
    assert len(out.hidden_states) == layers + 1
    assert torch.allclose(
        model.language_model.lm_head(out.hidden_states[-1]), out.logits, atol=1e-5
    )
    assert model(**inputs).hidden_states is None


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_neither_loss_nor_gradients(
    model, training_inputs, reentrant
):
    model.train()
    plain = model(**training_inputs).loss
    plain.backward()
    expected = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    assert model.is_gradient_checkpointing
    model.enable_input_require_grads()
    checkpointed = model(**training_inputs).loss
    checkpointed.backward()
    assert torch.equal(checkpointed, plain)
    for name, parameter in model.named_parameters():
        assert torch.allclose(parameter.grad, expected[name], rtol=1e-4, atol=1e-6), name
    model.gradient_checkpointing_disable()
    assert not model.is_gradient_checkpointing


def test_gradient_checkpointing_recomputes_layers(model, training_inputs):
    calls = []
    for layer in model.language_model.model.layers:
        layer.mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    model.train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model(**training_inputs).loss.backward()
    assert len(calls) == 2 * model.config.text_config.num_hidden_layers


def test_embeddings_can_ask_for_gradients_while_frozen(model, inputs):
    model.requires_grad_(False)
    model.enable_input_require_grads()
    assert model(**inputs).logits.requires_grad
    model.disable_input_require_grads()
    assert not model(**inputs).logits.requires_grad


def test_an_optimiser_step_lowers_the_loss(model, training_inputs):
    optimiser = torch.optim.SGD(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(3):
        loss = model(**training_inputs).loss
        losses.append(float(loss.detach()))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert losses[2] < losses[0]


def test_attention_dropout_acts_in_training_alone(make, inputs):
    model = copy.deepcopy(make()[0])
    model.config.text_config.attention_dropout = 0.5
    assert torch.equal(logits_of(model, inputs), logits_of(model, inputs))
    model.train()
    assert not torch.equal(logits_of(model, inputs), logits_of(model, inputs))


# Embeddings.


def test_embeddings_can_be_read_and_replaced(model, inputs):
    before = logits_of(model, inputs)
    fresh = torch.nn.Embedding(*model.get_input_embeddings().weight.shape)
    model.set_input_embeddings(fresh)
    assert model.get_input_embeddings() is fresh is model.language_model.model.embed_tokens
    assert not torch.equal(logits_of(model, inputs), before)
    head = torch.nn.Linear(32, 7, bias=False)
    model.set_output_embeddings(head)
    assert model.get_output_embeddings() is head
    assert logits_of(model, inputs).shape[-1] == 7


@pytest.mark.parametrize("tied", [False, True])
def test_the_vocabulary_can_grow_and_shrink(make_config, inputs, tmp_path, tied):
    model = PerceptionDLMForConditionalGeneration(make_config(tie_word_embeddings=tied)).eval()
    before, embeddings = logits_of(model, inputs), model.get_input_embeddings().weight.clone()
    for size in (500, 468):
        model.resize_token_embeddings(size)
        assert model.config.text_config.vocab_size == size
        assert model.get_input_embeddings().weight.shape[0] == size
        assert model.get_output_embeddings().weight.shape[0] == size
        assert torch.equal(model.get_input_embeddings().weight[:468], embeddings)
        assert torch.allclose(logits_of(model, inputs)[..., :468], before, atol=1e-5)
    model.save_pretrained(tmp_path)
    assert torch.allclose(logits_of(load(tmp_path), inputs), before, atol=1e-5)


def test_a_resized_vocabulary_is_padded_to_a_multiple(model):
    model.resize_token_embeddings(470, pad_to_multiple_of=64)
    assert model.get_input_embeddings().weight.shape[0] == 512


@pytest.mark.parametrize("where", ["config", "text"])
def test_tied_weights_are_one_tensor_saved_once(make_config, tmp_path, where):
    tie = {"tie_word_embeddings": True}
    config = make_config(**(tie if where == "config" else {"text": tie}))
    model = PerceptionDLMForConditionalGeneration(config)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    model.save_pretrained(tmp_path)
    assert "language_model.lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    loaded, info = PerceptionDLMForConditionalGeneration.from_pretrained(
        tmp_path, output_loading_info=True
    )
    assert not info["missing_keys"]
    assert loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight


def test_untied_weights_are_two(model):
    assert model.get_output_embeddings().weight is not model.get_input_embeddings().weight


# Settings.


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_an_attention_implementation_reaches_both_parts(model, inputs, saved, implementation):
    loaded = load(saved, attn_implementation=implementation)
    assert loaded.language_model.config._attn_implementation == implementation
    assert loaded.vision_tower.config._attn_implementation == implementation
    expected = logits_of(model, inputs)
    assert torch.allclose(
        logits_of(loaded, inputs), expected, atol=1e-4 * float(expected.abs().max())
    )


def test_parts_can_differ_in_attention_implementation(saved):
    loaded = load(saved, attn_implementation={"vision_config": "eager", "text_config": "sdpa"})
    assert loaded.language_model.config._attn_implementation == "sdpa"
    assert loaded.vision_tower.config._attn_implementation == "eager"


def test_the_parts_share_the_configs_of_the_whole(model):
    assert model.vision_tower.config is model.config.vision_config
    assert model.language_model.config is model.config.text_config


def test_linear_rope_scaling_divides_positions(make_config, make, inputs):
    model, _ = make()
    scaled = make_config(
        text={"rope_parameters": {"rope_type": "linear", "rope_theta": 500000.0, "factor": 2.0}}
    )
    other = PerceptionDLMForConditionalGeneration(scaled).eval()
    other.load_state_dict(model.state_dict())
    doubled = {**inputs, "position_ids": inputs["position_ids"] * 2}
    assert torch.allclose(logits_of(other, doubled), logits_of(model, inputs), atol=1e-4)
    assert not torch.allclose(logits_of(other, inputs), logits_of(model, inputs), atol=1e-2)


def test_a_device_map_splits_no_layer(model):
    from accelerate import infer_auto_device_map

    size = sum(p.numel() * p.element_size() for p in model.parameters())
    for share in (0.2, 0.35, 0.5, 0.65, 0.8):
        placed = infer_auto_device_map(
            model,
            max_memory={0: int(size * share), "cpu": size * 2},
            no_split_module_classes=model._no_split_modules,
        )
        names = [name for name in placed if ".layers." in name]
        assert all(len(name.split(".layers.")[1].split(".")) == 1 for name in names)
        assert not any(name.startswith("vision_tower.embeddings.") for name in placed)


def test_arguments_to_keep_apart_are_arguments_of_the_layers(model):
    layer = type(model.language_model.model.layers[0])
    assert set(model._skip_keys_device_placement) <= set(
        inspect.signature(layer.forward).parameters
    )


def test_the_main_input_is_the_first_argument(model):
    assert next(iter(inspect.signature(model.forward).parameters)) == model.main_input_name


# Image processor and processor.


@pytest.fixture
def processor(make):
    return make()[1]


def settings_of(part) -> dict:
    return {k: v for k, v in part.to_dict().items() if k != "auto_map"}


def test_the_image_processor_survives_json_and_saving(processor, tmp_path):
    ours = processor.image_processor
    assert json.loads(ours.to_json_string())["image_size"] == ours.image_size
    ours.to_json_file(tmp_path / "a.json")
    assert settings_of(PerceptionDLMImageProcessor.from_json_file(tmp_path / "a.json")) == (
        settings_of(ours)
    )
    ours.save_pretrained(tmp_path)
    assert settings_of(PerceptionDLMImageProcessor.from_pretrained(tmp_path)) == settings_of(ours)


def test_arguments_go_before_what_was_saved(processor, tmp_path):
    processor.save_pretrained(tmp_path)
    images = PerceptionDLMImageProcessor.from_pretrained(tmp_path, max_tiles=2)
    assert images.max_tiles == 2 and images.image_size == processor.image_processor.image_size
    whole = PerceptionDLMProcessor.from_pretrained(
        tmp_path, trust_remote_code=True, region_instruction="Name it."
    )
    assert whole.region_instruction == "Name it."
    assert whole.system_prompt == processor.system_prompt


def test_a_calls_arguments_go_before_the_settings_and_do_not_stay(processor, draw_image):
    images = processor.image_processor
    assert images(draw_image(200, 60), max_tiles=1)["image_grids"].tolist() == [[1, 1]]
    assert images(draw_image(200, 60))["image_grids"].tolist() == [[3, 1]]


def test_changing_one_image_processor_changes_no_other():
    first, second = PerceptionDLMImageProcessor(), PerceptionDLMImageProcessor()
    first.max_tiles = 99
    assert second.max_tiles == PerceptionDLMImageProcessor().max_tiles == 6


def test_an_image_processor_needs_no_settings(draw_image):
    assert PerceptionDLMImageProcessor()(draw_image(20, 20))["pixel_values"].shape == (
        1,
        3,
        512,
        512,
    )


def test_an_unknown_argument_of_a_call_is_refused(processor, draw_image):
    with pytest.raises(TypeError, match="max_tile"):
        processor.image_processor(draw_image(20, 20), max_tile=3)
    with pytest.raises(ValueError, match="expected return_tensors 'pt', got 'np'"):
        processor.image_processor(draw_image(20, 20), return_tensors="np")


def test_the_processor_says_what_it_makes(processor, inputs):
    assert set(inputs) == set(processor.model_input_names)
    accepted = set(inspect.signature(PerceptionDLMForConditionalGeneration.forward).parameters)
    assert set(processor.model_input_names) <= accepted


def test_every_setting_of_the_processor_is_an_attribute(processor):
    for name in inspect.signature(PerceptionDLMProcessor.__init__).parameters:
        assert name == "self" or hasattr(processor, name)


def test_inputs_can_be_moved_and_cast(inputs):
    moved = inputs.to("cpu", torch.bfloat16)
    assert moved["pixel_values"].dtype == torch.bfloat16
    assert moved["input_ids"].dtype == torch.int64 and moved["region_patches"].dtype == torch.bool


def test_the_chat_template_is_saved_with_the_processor(processor, tmp_path):
    changed = copy.copy(processor)
    changed.chat_template = "{{ messages[0]['content'] }}"
    changed.save_pretrained(tmp_path)
    loaded = PerceptionDLMProcessor.from_pretrained(tmp_path, trust_remote_code=True)
    assert loaded.apply_chat_template([{"role": "user", "content": "Hi"}]) == "Hi"


def test_decoding_is_the_tokenizers(processor):
    ids = processor.tokenizer("a red circle")["input_ids"]
    assert processor.decode(ids) == processor.tokenizer.decode(ids)
    assert processor.batch_decode([ids, ids]) == processor.tokenizer.batch_decode([ids, ids])


@pytest.mark.parametrize(("asked", "is_left_out"), [("", True), ("transformers_suite", None)])
def test_transformers_own_tests_are_collected_only_when_asked_for(asked, is_left_out):
    config = SimpleNamespace(option=SimpleNamespace(markexpr=asked))
    suite = Path(__file__).parent / "test_transformers_suite.py"
    assert pytest_ignore_collect(suite, config) is is_left_out
    assert pytest_ignore_collect(Path(__file__), config) is None
