"""Makes checkpoints in other layouts from the fixtures, and replays the reference vectors.

Run as a script with folders, it replays the vectors in a process that cannot import this package
and prints what came out as JSON.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

FIXTURES = Path(__file__).parent / "fixtures"
VECTORS = FIXTURES / "vectors"

# Names of LLaDA's own code, by Llama's; written by hand, not with the converter's rules.
ORIGINAL_NAMES = {
    "model.embed_tokens.": "model.transformer.wte.",
    "model.norm.": "model.transformer.ln_f.",
    "lm_head.": "model.transformer.ff_out.",
    "model.layers.": "model.transformer.blocks.",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ff_norm",
    "self_attn.o_proj": "attn_out",
    "self_attn.": "",
    "mlp.gate_proj": "ff_proj",
    "mlp.up_proj": "up_proj",
    "mlp.down_proj": "ff_out",
}


def copy_source(name: str, target: Path) -> Path:
    """Copies a checkpoint of the fixtures, to be spoiled."""
    return Path(shutil.copytree(VECTORS / name, target))


def edit_json(path: Path, **changes):
    """Sets keys of a JSON object, or removes those given as None."""
    content = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({k: v for k, v in content.items() if v is not None}))


def edit_tensors(folder: Path, change):
    """Rewrites model.safetensors with `change` applied to its dict of tensors."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def split_weights(folder: Path, count: int = 2):
    """Turns model.safetensors into shards and an index."""
    tensors = load_file(folder / "model.safetensors")
    weight_map = {}
    for i in range(count):
        names = list(tensors)[i::count]
        file = f"model-{i + 1:05d}-of-{count:05d}.safetensors"
        save_file({name: tensors[name] for name in names}, folder / file)
        weight_map |= dict.fromkeys(names, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / "model.safetensors").unlink()


def language_tensors(dtype=torch.float32) -> dict[str, torch.Tensor]:
    """Returns the fixture Base's language model under Llama's names."""
    prefix = "language_model."
    tensors = load_file(VECTORS / "released-base" / "model.safetensors")
    return {k[len(prefix) :]: v.to(dtype) for k, v in tensors.items() if k.startswith(prefix)}


def make_llada(target: Path, *, original: bool, dtype=torch.float32, rows: int = 512) -> Path:
    """Makes a LLaDA checkpoint, under its own names or Llama's, that knows nothing of images."""
    target.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(VECTORS / "released-llava" / name, target / name)
    tensors = language_tensors(dtype)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = tensors[name][:rows].clone()
    config = json.loads((VECTORS / "released-base" / "config.json").read_text())
    config = {**config["language_model_config"], "vocab_size": rows}
    if original:
        tensors = {original_name(name): tensor for name, tensor in tensors.items()}
        config = original_config(config)
    save_file(tensors, target / "model.safetensors")
    (target / "config.json").write_text(json.dumps(config))
    return target


def original_name(name: str) -> str:
    """Returns a Llama name as LLaDA's own code has it."""
    for llama, original in ORIGINAL_NAMES.items():
        name = name.replace(llama, original)
    return name


def original_config(config: dict) -> dict:
    """Writes a Llama config in the fields of LLaDA's own code, as GSAI-ML/LLaDA-8B-Instruct has."""
    return {
        "model_type": "llada",
        "activation_type": "silu",
        "block_type": "llama",
        "layer_norm_type": "rms",
        "rope": True,
        "include_bias": False,
        "include_qkv_bias": False,
        "d_model": config["hidden_size"],
        "n_heads": config["num_attention_heads"],
        "n_kv_heads": config["num_key_value_heads"],
        "n_layers": config["num_hidden_layers"],
        "mlp_hidden_size": config["intermediate_size"],
        "mlp_ratio": 4,
        "max_sequence_length": 4096,
        "rms_norm_eps": config["rms_norm_eps"],
        "rope_theta": config["rope_theta"],
        "vocab_size": config["vocab_size"],
        "embedding_size": config["vocab_size"],
        "weight_tying": False,
    }


def make_siglip(target: Path, *, whole: bool, old_names: bool = False) -> Path:
    """Makes a SigLIP folder: the whole model, or its vision part under its new or old names."""
    target.mkdir()
    prefix = "vision_model." if whole or old_names else "vision_model.vision_model."
    tensors = load_file(VECTORS / "released-base" / "model.safetensors")
    wanted = "vision_model." if whole else "vision_model.vision_model."
    chosen = {k[len(prefix) :]: v for k, v in tensors.items() if k.startswith(wanted)}
    save_file(chosen, target / "model.safetensors")
    config = json.loads((VECTORS / "released-base" / "config.json").read_text())
    config = config["vision_model_config"]
    (target / "config.json").write_text(json.dumps(config if whole else config["vision_config"]))
    return target


# Replaying the vectors


def replay_in_fresh_process(folders: dict[str, Path], cwd: Path) -> dict:
    """Replays the cases of converted folders where this package cannot be imported."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    environment |= {"HF_MODULES_CACHE": str(cwd / "modules"), "HF_HUB_OFFLINE": "1"}
    arguments = [f"{kind}={folder}" for kind, folder in folders.items()]
    done = subprocess.run(
        [sys.executable, str(Path(__file__).resolve()), *arguments],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def deviation(got: torch.Tensor, expected: torch.Tensor) -> float:
    """Returns the largest difference, relative to the largest magnitude."""
    return float((got - expected).abs().max() / expected.abs().max())


def replay_region(model, processor, vectors: Path, case: dict) -> dict:
    """Replays one region case: inputs, features, first-step logits, captions."""
    v = load_file(vectors / f"{case['name']}.safetensors")
    image, masks = vectors / f"{case['name']}.png", [vectors / m for m in case["masks"]]
    inputs = processor(image, masks=masks, caption_length=case["gen_length"])
    masked = inputs["input_ids"][0] == model.config.mask_token_id
    out = model.diffusion_generate(
        image, masks, caption_length=case["gen_length"], steps=case["steps"]
    )
    features = model.encode_images(inputs["pixel_values"], inputs["region_patches"])
    captions = [out.token_ids[0][k] for k in case["area_order"]]
    return {
        "ids_equal": inputs["input_ids"].tolist() == v["expanded_input_ids"].tolist(),
        "features": deviation(features, v["vision_embeds"]),
        "logits": deviation(model(**inputs).logits[0][masked], v["first_step_logits"]),
        "generated_equal": captions == case["caption_ids_in_area_order"],
    }


def replay_chat(model, processor, vectors: Path, case: dict) -> dict:
    """Replays one question of Base or LLaDA-V: inputs, first-step logits, answer."""
    v = load_file(vectors / f"{case['name']}.safetensors")
    image, options = vectors / f"{case['name']}.png", dict(case["generation"])
    length = options.pop("gen_length")
    inputs = processor(image, prompts=case["prompt"], max_new_tokens=length)
    options |= {"max_new_tokens": length}
    out = model.diffusion_generate(image, prompts=case["prompt"], **options)
    prompt = inputs["input_ids"][0, :-length].tolist()
    pixels, expected = inputs["pixel_values"], v.get("pixel_values")
    if expected is None:
        pixels, expected = pixels[..., ::16, ::16], v["pixel_values_stride16"]
        first, count = prompt.index(model.config.image_token_id), case["image_tokens"]
        prompt[first : first + count] = [-200]
    return {
        "pixels_equal": torch.equal(pixels, expected),
        "ids_equal": [prompt] == v["input_ids"].tolist(),
        "features": deviation(visual_tokens(model, inputs), embeds_of(v)),
        "logits": deviation(model(**inputs).logits[:, -length:], v["first_step_logits"]),
        "generated_equal": out.token_ids[0][0] == v["generated_ids"][0].tolist(),
    }


def visual_tokens(model, inputs) -> torch.Tensor:
    """Returns what takes the place of the image, (tokens, D)."""
    grids = [tuple(grid) for grid in inputs["image_grids"].tolist()]
    features = model.encode_images(inputs["pixel_values"])
    return model.image_tokens(features, grids, inputs["image_sizes"].tolist())


def embeds_of(vectors: dict[str, torch.Tensor]) -> torch.Tensor:
    """Returns the recorded visual tokens, (tokens, D)."""
    name = "image_embeds" if "image_embeds" in vectors else "vision_embeds"
    return vectors[name].flatten(0, -2)


CASES = {
    "region": (VECTORS, "region_cases", replay_region),
    "wide": (VECTORS / "wide", "region_cases", replay_region),
    "base": (VECTORS, "chat_cases", replay_chat),
    "llava": (VECTORS, "llava_cases", replay_chat),
}


def case_names(kind: str) -> list[str]:
    """Returns the names of the recorded cases of a kind of checkpoint."""
    vectors, key, _ = CASES[kind]
    return [case["name"] for case in json.loads((vectors / "manifest.json").read_text())[key]]


@torch.no_grad()
def replay(kind: str, folder: str) -> dict:
    """Replays every recorded case of a kind through the Auto classes."""
    from transformers import AutoModel, AutoProcessor

    model = AutoModel.from_pretrained(folder, trust_remote_code=True, dtype="auto").eval()
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    vectors, key, replay_case = CASES[kind]
    cases = json.loads((vectors / "manifest.json").read_text())[key]
    return {case["name"]: replay_case(model, processor, vectors, case) for case in cases}


if __name__ == "__main__":
    sys.modules["perceptiondlm"] = None  # importing it fails from here on
    pairs = [argument.split("=", 1) for argument in sys.argv[1:]]
    print(json.dumps({kind: replay(kind, folder) for kind, folder in pairs}))
