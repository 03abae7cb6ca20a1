"""Quantized weights: which layers, at every door, on load, saved, trained under an adapter."""

import argparse
import importlib
import importlib.util
import re

import pytest
import torch
from perceptiondlm.apps.captioning.model_arguments import add_model_arguments, load_captioner
from perceptiondlm.apps.cli import main
from perceptiondlm.common.extras import MissingExtra
from perceptiondlm.common.fingerprints import stored_tensors, weights_fingerprint
from perceptiondlm.common.loading import load_model
from perceptiondlm.common.quantization import KINDS, quantization_config, weights_bytes
from perceptiondlm.configuration_perceptiondlm import PerceptionDLMConfig
from perceptiondlm.conversion.convert import convert
from perceptiondlm.evaluation.checkpoint import add_checkpoint_arguments, load_checkpoint
from perceptiondlm.modeling_perceptiondlm import PerceptionDLMForConditionalGeneration
from perceptiondlm.training.recipe import build_recipe
from perceptiondlm.training.run import train
from PIL import Image
from shapes import ARGUMENTS, ROOT, SCENE, SCENE_MASKS, SHAPES
from training_runs import TINY, losses_of, recipe_values, small_recipe
from transformers import AutoModel

needs_torchao = pytest.mark.skipif(
    importlib.util.find_spec("torchao") is None, reason="torchao is not installed"
)
needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed"
)
INT8, INT4 = (pytest.param(kind, marks=needs_torchao) for kind in ("int8", "int4"))
NF4 = pytest.param("nf4", marks=needs_bitsandbytes)
DECODER = re.compile(
    r"language_model\.model\.layers\.\d\.(self_attn\.[qkvo]|mlp\.(gate|up|down))_proj\.weight"
)
# Of a weight matrix, as a share of its size: half a step of 8 bits, or of 4 bits over 64 weights.
ERRORS = {"int8": 0.01, "int4": 0.12, "nf4": 0.12}


def trained(kind: str | None, dtype="auto"):
    """The model of shapes, on the CPU, and its processor."""
    return load_model(ROOT, SHAPES, dtype, "cpu", quantize=kind)


def int8_config():
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    return TorchAoConfig(Int8WeightOnlyConfig())


def quantized_names(model) -> set[str]:
    plain = (torch.Tensor, torch.nn.Parameter)
    return {name for name, p in model.named_parameters() if type(p) not in plain}


def captions_of(model, processor) -> list:
    image, masks = Image.open(SCENE), [Image.open(path) for path in SCENE_MASKS]
    return model.diffusion_generate(image, masks, processor=processor).texts


@pytest.fixture(scope="module")
def plain():
    return trained(None)


# On load.


@pytest.mark.parametrize("kind", [INT8, INT4, NF4])
def test_the_linear_layers_of_the_decoder_alone_are_quantized(kind, plain):
    model, _ = trained(kind)
    names = {name for name, _ in plain[0].named_parameters()}
    assert quantized_names(model) == {name for name in names if DECODER.fullmatch(name)}
    assert len(quantized_names(model)) == 4 * 7

    own = dict(model.named_parameters())
    for name, expected in plain[0].named_parameters():
        if not DECODER.fullmatch(name):
            assert torch.equal(own[name], expected)


@pytest.mark.parametrize("kind", [INT8, INT4, NF4])
def test_a_quantized_layer_computes_with_nearly_its_own_weights(kind, plain):
    """A layer's matrix is what it makes of the unit vectors."""
    model, _ = trained(kind)
    name = "language_model.model.layers.2.mlp.down_proj"
    layer, expected = model.get_submodule(name), plain[0].get_submodule(name).weight
    with torch.no_grad():
        got = layer(torch.eye(layer.in_features)).T
    error = (got - expected).norm() / expected.norm()
    assert 0 < error < ERRORS[kind]


@needs_torchao
def test_int8_weights_are_the_nearest_of_127_steps_of_their_row(plain):
    model, _ = trained("int8")
    name = "language_model.model.layers.0.self_attn.q_proj"
    weight = plain[0].get_submodule(name).weight
    step = weight.abs().amax(1, keepdim=True) / 127.5
    got = model.get_submodule(name).weight
    assert torch.allclose(got.scale, step, rtol=1e-2)
    assert ((got.qdata * got.scale) - weight).abs().le(0.51 * got.scale).float().mean() > 0.999


@pytest.mark.parametrize("kind", [INT8, INT4, NF4])
def test_a_trained_model_says_the_same_with_quantized_weights(kind, plain):
    assert captions_of(*trained(kind)) == captions_of(*plain)


@needs_torchao
def test_int4_and_int8_run_in_bfloat16_too():
    for kind in ("int8", "int4"):
        model, processor = trained(kind, "bfloat16")
        assert model.dtype == torch.bfloat16
        assert "blue star" in captions_of(model, processor)[0][0]


@needs_torchao
def test_auto_model_takes_a_quantization_config_with_remote_code():
    options = {"subfolder": SHAPES, "trust_remote_code": True}
    model = AutoModel.from_pretrained(ROOT, **options, quantization_config=int8_config())
    assert all(DECODER.fullmatch(name) for name in quantized_names(model))
    assert len(quantized_names(model)) == 28


@needs_torchao
def test_the_callers_own_exceptions_are_kept_and_his_config_is_not_changed():
    given = int8_config()
    given.modules_to_not_convert = [r".*\.down_proj"]
    model = PerceptionDLMForConditionalGeneration.from_pretrained(
        ROOT, subfolder=SHAPES, quantization_config=given
    )
    names = quantized_names(model)
    assert len(names) == 4 * 6 and not any("down_proj" in name for name in names)
    assert given.modules_to_not_convert == [r".*\.down_proj"]


@needs_torchao
def test_a_quantization_config_may_be_plain_fields():
    model = PerceptionDLMForConditionalGeneration.from_pretrained(
        ROOT, subfolder=SHAPES, quantization_config=int8_config().to_dict()
    )
    assert len(quantized_names(model)) == 28


@needs_torchao
def test_faster_products_of_plain_layers_leave_quantized_ones_alone():
    model, processor = trained("int8")
    captions_of(model, processor)
    layers = model.language_model.model.layers
    kinds = {type(m).__name__ for m in layers.modules() if isinstance(m, torch.nn.Linear)}
    assert kinds == {"Linear"}
    assert type(model.language_model.lm_head).__name__ == "OneDNNLinear"


# What cannot be.


def test_fp8_is_refused_where_the_hardware_has_none():
    config = PerceptionDLMConfig.from_pretrained(ROOT)
    cpu = torch.device("cpu")
    if importlib.util.find_spec("torchao"):
        with pytest.raises(ValueError, match="computes in fp8 .* got cpu; int8 runs everywhere"):
            quantization_config("fp8", config, torch.bfloat16, cpu)


@needs_torchao
def test_fp8_and_int4_on_a_gpu_need_bfloat16(monkeypatch):
    config = PerceptionDLMConfig.from_pretrained(ROOT)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    for kind in ("fp8", "int4"):
        with pytest.raises(ValueError, match="expected dtype bfloat16"):
            quantization_config(kind, config, torch.float32, torch.device("cuda"))
        assert quantization_config(kind, config, torch.bfloat16, torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    with pytest.raises(ValueError, match="Ada, Hopper or newer"):
        quantization_config("fp8", config, torch.bfloat16, torch.device("cuda"))


def test_an_unknown_kind_names_those_there_are():
    with pytest.raises(ValueError, match="expected quantize of int8, int4, fp8, nf4, got 'int3'"):
        load_model(ROOT, SHAPES, quantize="int3")


def test_layers_whose_width_does_not_divide_into_groups_are_refused(converted):
    folder = converted("released-region")
    with pytest.raises(ValueError, match=r"multiple of 64 for quantize 'int4', got \d+"):
        load_model(folder, quantize="int4")


def test_without_torchao_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "torchao.quantization", None)
    with pytest.raises(MissingExtra, match=r'pip install "perceptiondlm\[quantize\]"'):
        load_model(ROOT, SHAPES, quantize="int8")


@needs_torchao
def test_quantized_weights_on_a_disk_are_refused():
    options = {"subfolder": SHAPES, "quantization_config": int8_config()}
    with pytest.raises(ValueError, match="expected no 'disk' in device_map"):
        PerceptionDLMForConditionalGeneration.from_pretrained(
            ROOT, **options, device_map={"": "cpu", "connector": "disk"}
        )


@needs_torchao
def test_a_device_map_that_puts_each_part_on_the_cpu_is_followed(plain):
    parts = {name: "cpu" for name, _ in plain[0].named_children()} | {"image_newline": "cpu"}
    model = PerceptionDLMForConditionalGeneration.from_pretrained(
        ROOT, subfolder=SHAPES, quantization_config=int8_config(), device_map=parts
    )
    assert len(quantized_names(model)) == 28


# Saved.


@pytest.mark.parametrize("kind", [INT8, NF4])
def test_a_quantized_model_is_saved_and_loads_as_it_was(kind, tmp_path):
    """Saved after its use: bitsandbytes packs weights then, where the processor has AVX512-BF16."""
    model, processor = trained(kind)
    captions = captions_of(model, processor)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    again, own = load_model(tmp_path, device="cpu")
    assert quantized_names(again) == quantized_names(model)
    assert weights_fingerprint(again) == weights_fingerprint(model)
    assert captions_of(again, own) == captions == captions_of(model, processor)

    with pytest.raises(ValueError, match="not quantized for quantize 'int8', got .* it loads"):
        load_model(tmp_path, quantize="int8")
    with pytest.raises(ValueError, match="expected weights that are not quantized in"):
        convert(tmp_path, tmp_path / "converted")
    assert not (tmp_path / "converted").exists()


@needs_torchao
def test_int4_weights_packed_for_a_cpu_are_not_saved(tmp_path):
    model, _ = trained("int4")
    with pytest.raises(ValueError, match="expected weights that can be saved, got int4"):
        model.save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()


@needs_torchao
def test_fingerprints_tell_kinds_apart_and_repeat(plain):
    prints = [weights_fingerprint(trained(kind)[0]) for kind in (None, "int8", "int8", "int4")]
    assert prints[0] == weights_fingerprint(plain[0])
    assert prints[1] == prints[2] and len(set(prints)) == 3


# Memory.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", [None, INT8, INT4, NF4])
def test_the_computed_memory_is_what_the_loaded_weights_take(kind, dtype):
    model, _ = trained(kind, dtype)
    stored = [tensor for p in model.parameters() for tensor in stored_tensors(p)]
    taken = sum(tensor.numel() * tensor.element_size() for tensor in stored)
    assert weights_bytes(model.config, dtype, kind) == taken


def test_the_page_gives_the_memory_at_8b_as_it_is_computed():
    page = (ROOT / "docs" / "quantization.md").read_text()
    config = PerceptionDLMConfig.from_pretrained(ROOT)
    for kind in (None, *KINDS):
        size = f"{weights_bytes(config, torch.bfloat16, kind) / 1e9:.1f} GB"
        row = next(line for line in page.splitlines() if line.startswith(f"| `{kind}`"))
        assert row.split("|")[3].strip() == size


# Every door.


@needs_torchao
def test_the_arguments_of_captioning_and_of_evaluation_quantize():
    for add, load in (
        (add_model_arguments, lambda args: load_captioner(args).model),
        (add_checkpoint_arguments, lambda args: load_checkpoint(args)[0]),
    ):
        parser = argparse.ArgumentParser()
        add(parser)
        given = [*ARGUMENTS, "--device", "cpu"]
        args = parser.parse_args([*given, "--quantize", "int8"])
        assert len(quantized_names(load(args))) == 28
        assert not quantized_names(load(parser.parse_args(given)))


@pytest.mark.parametrize(
    "command",
    [
        "caption",
        "caption-dataset",
        "serve",
        "web",
        *(f"evaluate {step}" for step in ("predict", "synthetic", "sweep", "latency")),
    ],
)
def test_every_command_that_loads_a_model_offers_to_quantize_it(command, capsys):
    with pytest.raises(SystemExit):
        main([*command.split(), "--help"])
    assert "--quantize {int8,int4,fp8,nf4}" in capsys.readouterr().out


@needs_torchao
def test_the_command_line_captions_with_int8_weights(capsys):
    options = [*ARGUMENTS, "--quantize", "int8", "--device", "cpu", "--quiet"]
    assert main(["caption", str(SCENE), "--masks", str(SCENE_MASKS[0]), *options]) == 0
    assert "a large dotted blue star at the top left" in capsys.readouterr().out


@needs_torchao
def test_a_data_set_is_captioned_with_quantized_weights_and_its_record_says_so():
    dataset = pytest.importorskip("perceptiondlm.pipelines.dataset")
    stage = importlib.import_module("perceptiondlm.pipelines.captioning_stage")
    options = stage.CaptionOptions(str(ROOT), SHAPES, device="cpu", quantize="int8")
    assert len(quantized_names(stage.CaptionImages(options).model)) == 28
    whole = dataset.DatasetOptions(output="nowhere", caption=options)
    assert dataset.identity_of([], whole, False)["quantize"] == "int8"


def test_the_command_line_refuses_fp8_on_a_cpu_in_one_line(capsys):
    pytest.importorskip("torchao")
    options = [*ARGUMENTS, "--box", "1,1,30,30", "--quantize", "fp8", "--device", "cpu"]
    assert main(["caption", str(SCENE), *options]) == 2
    assert "expected a GPU that computes in fp8" in capsys.readouterr().err


# Training.


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Folder of a small trained model, of widths that every kind can take."""
    folder = tmp_path_factory.mktemp("base")
    wide = TINY | {"text_config": TINY["text_config"] | {"hidden_size": 64}}
    train(small_recipe(folder, model={"config": wide}, trainer={"max_steps": 2}))
    return folder


def qlora_values(base, folder, kind: str) -> dict:
    return recipe_values(
        folder,
        model={"checkpoint": str(base), "config": {}, "tokenizer": None, "quantize": kind},
        lora={"r": 4, "alpha": 16},
        data={"region_share": 1.0},
        masking={"t_low": 1.0},
        trainer={"max_steps": 12, "save_strategy": "steps", "save_steps": 6},
    )


@pytest.mark.filterwarnings("ignore:Merge lora module to 4-bit")
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")
@pytest.mark.parametrize(("kind", "error"), [(*INT8.values, 0.002), (*NF4.values, 0.02)])
def test_an_adapter_is_trained_on_quantized_weights_and_merges(base, tmp_path, kind, error):
    pytest.importorskip("torchao" if kind == "int8" else "bitsandbytes")
    trainer = train(build_recipe(qlora_values(base, tmp_path / "run", kind)))
    losses = losses_of(trainer)
    assert sum(losses[-3:]) < sum(losses[:3]) - 0.2
    learning = [n for n, p in trainer.model.named_parameters() if p.requires_grad]
    assert not any(DECODER.search(name) for name in learning)
    assert (tmp_path / "run" / "adapter_model.safetensors").exists()

    samples = trainer.data_collator([trainer.train_dataset[i] for i in range(4)])
    inputs = {k: v for k, v in samples.items() if k not in ("labels", "timesteps", "noise")}

    def difference(one, other):
        with torch.no_grad():
            one, other = (model.eval()(**inputs).logits for model in (one, other))
        return (one - other).norm() / other.norm()

    # merged into the original weights, by the converter, and into the quantized ones
    convert(tmp_path / "run", tmp_path / "merged", base=base)
    merged = PerceptionDLMForConditionalGeneration.from_pretrained(tmp_path / "merged")
    assert not quantized_names(merged)
    assert difference(merged, trainer.model) < error
    untrained = PerceptionDLMForConditionalGeneration.from_pretrained(base)
    assert difference(untrained, trainer.model) > 0.5
    requantized = PerceptionDLMForConditionalGeneration.from_pretrained(tmp_path / "merged")
    assert difference(trainer.model.merge_and_unload(), requantized) < 2 * error


def test_quantized_weights_do_not_learn_themselves(base, tmp_path):
    values = qlora_values(base, tmp_path, "int8")
    del values["lora"]
    with pytest.raises(ValueError, match="expected a model.checkpoint and a lora section"):
        build_recipe(values)


@pytest.mark.parametrize("kind", ["int4", "fp8"])
def test_kinds_without_gradients_are_refused_for_training(base, tmp_path, kind):
    with pytest.raises(ValueError, match=f"expected model.quantize of int8 or nf4.* got '{kind}'"):
        build_recipe(qlora_values(base, tmp_path, kind))
