"""The recorded vectors: what the released implementation computed, from the same weights."""

import json

import numpy as np
import pytest
import torch
from perceptiondlm.image_processing_perceptiondlm import choose_grid
from perceptiondlm.modeling_attention import allowed_attention
from perceptiondlm.modeling_vision import replay_regions, roi_align
from PIL import Image
from safetensors.torch import load_file

REGIONS = [("", "region_0"), ("", "region_1"), ("", "region_2")]
WIDE = [("wide", "region_0"), ("wide", "region_1")]
CHATS = ["chat_0", "chat_1", "chat_2"]
LLAVAS = ["llava_0", "llava_1", "llava_2"]
TRAINING = [("", "train_0"), ("", "train_1"), ("wide", "train_0")]


class Case:
    """A recorded case: its manifest entry, its tensors, and our inputs for it."""

    def __init__(self, vectors, load, folder, name, checkpoint):
        self.folder = vectors / folder
        manifest = json.loads((self.folder / "manifest.json").read_text())
        cases = [case for key in manifest if key.endswith("_cases") for case in manifest[key]]
        self.entry = {case["name"]: case for case in cases}
        self.case = self.entry[name]
        self.recorded = load_file(self.folder / f"{name}.safetensors")
        self.model, self.processor = load(f"{folder}/{checkpoint}".lstrip("/"))
        self.image = self.folder / f"{self.case.get('region_case', name)}.png"

    def masks(self):
        entry = self.entry[self.case.get("region_case", self.case["name"])]
        return [self.folder / mask for mask in entry["masks"]], entry["area_order"]


@pytest.fixture
def region(vectors, load, request):
    case = Case(vectors, load, *request.param, "released-region")
    masks, _ = case.masks()
    case.inputs = case.processor(case.image, masks=masks, caption_length=case.case["gen_length"])
    return case


@pytest.fixture
def chat(vectors, load, request):
    case = Case(vectors, load, "", request.param, "released-base")
    case.options = dict(case.case["generation"])
    length = case.options.pop("gen_length")
    case.options["max_new_tokens"] = length
    case.inputs = case.processor(case.image, prompts=case.case["prompt"], max_new_tokens=length)
    return case


@pytest.fixture
def llava(vectors, load, request):
    case = Case(vectors, load, "", request.param, "released-llava")
    case.options = dict(case.case["generation"])
    length = case.options.pop("gen_length")
    case.options["max_new_tokens"] = length
    case.inputs = case.processor(case.image, prompts=case.case["prompt"], max_new_tokens=length)
    return case


def deviation(got: torch.Tensor, recorded: torch.Tensor) -> float:
    """Largest difference over the largest magnitude."""
    assert got.shape == recorded.shape
    return float((got - recorded).abs().max() / recorded.abs().max())


def grids(inputs):
    return [tuple(grid) for grid in inputs["image_grids"].tolist()]


def mask_columns(case):
    return case.inputs["input_ids"][0] == case.model.config.mask_token_id


@pytest.mark.parametrize("region", REGIONS, indirect=True)
def test_region_pixels_are_the_recorded_ones(region):
    assert torch.equal(region.inputs["pixel_values"], region.recorded["pixel_values"])


@pytest.mark.parametrize("region", REGIONS + WIDE, indirect=True)
def test_region_ids_are_the_recorded_ones(region):
    assert torch.equal(region.inputs["input_ids"], region.recorded["expanded_input_ids"])


@pytest.mark.parametrize("region", REGIONS + WIDE, indirect=True)
def test_region_patches_are_the_recorded_ones(region):
    regions = region.recorded["active_patches"].shape[1]
    patches = region.inputs["region_patches"]
    assert torch.equal(patches[:, :regions], region.recorded["active_patches"].bool())
    assert not patches[:, regions:].any()


@pytest.mark.parametrize("region", REGIONS + WIDE, indirect=True)
def test_region_boxes_are_the_recorded_ones(region):
    assert torch.equal(region.inputs["boxes"], region.recorded["bboxes"].float())


@pytest.mark.parametrize("region", REGIONS, indirect=True)
def test_region_attention_is_the_recorded_one(region):
    names = ("region_ids", "role_ids", "attention_mask")
    allowed = allowed_attention("released", *(region.inputs[name] for name in names))
    assert torch.equal(allowed[:, None], region.recorded["attention_allowed"].bool())


@pytest.mark.parametrize("region", REGIONS + WIDE, indirect=True)
@torch.no_grad()
def test_region_features_are_the_recorded_ones(region):
    inputs = region.inputs
    features = region.model.encode_images(inputs["pixel_values"], inputs["region_patches"])
    replayed = replay_regions(
        features, grids(inputs), inputs["boxes"], inputs["box_images"], region.model.config
    )
    assert deviation(features, region.recorded["vision_embeds"]) < 1e-4
    assert deviation(replayed, region.recorded["roi_embeds"]) < 1e-4


@pytest.mark.parametrize("region", REGIONS + WIDE, indirect=True)
@torch.no_grad()
def test_region_logits_are_the_recorded_ones(region):
    logits = region.model(**region.inputs).logits[0][mask_columns(region)]
    assert deviation(logits, region.recorded["first_step_logits"]) < 1e-4


@pytest.mark.parametrize("region", REGIONS + WIDE, indirect=True)
def test_captions_are_the_recorded_ones(region):
    masks, order = region.masks()
    out = region.model.diffusion_generate(
        region.image,
        masks,
        processor=region.processor,
        steps=region.case["steps"],
        caption_length=region.case["gen_length"],
    )
    assert [out.token_ids[0][k] for k in order] == region.case["caption_ids_in_area_order"]
    ids = region.inputs["input_ids"].clone()
    ids[0, mask_columns(region)] = torch.tensor([out.token_ids[0][k] for k in order]).flatten()
    assert torch.equal(ids, region.recorded["generated_ids"])


@pytest.mark.parametrize("chat", CHATS, indirect=True)
def test_chat_inputs_are_the_recorded_ones(chat):
    length = chat.options["max_new_tokens"]
    assert torch.equal(chat.inputs["pixel_values"], chat.recorded["pixel_values"])
    assert torch.equal(chat.inputs["input_ids"][:, :-length], chat.recorded["input_ids"])
    assert bool((chat.inputs["input_ids"][:, -length:] == chat.model.config.mask_token_id).all())


@pytest.mark.parametrize("chat", CHATS, indirect=True)
@torch.no_grad()
def test_chat_features_and_logits_are_the_recorded_ones(chat):
    features = chat.model.encode_images(chat.inputs["pixel_values"])
    logits = chat.model(**chat.inputs, logits_to_keep=chat.options["max_new_tokens"]).logits
    assert deviation(features, chat.recorded["vision_embeds"]) < 1e-4
    assert deviation(logits, chat.recorded["first_step_logits"]) < 1e-4


@pytest.mark.parametrize("chat", CHATS, indirect=True)
def test_answers_are_the_recorded_ones(chat):
    out = chat.model.diffusion_generate(
        chat.image, prompts=chat.case["prompt"], processor=chat.processor, **chat.options
    )
    assert out.token_ids[0] == chat.recorded["generated_ids"].tolist()
    assert out.texts[0][0] == chat.case["text"]


@pytest.mark.parametrize("case", TRAINING)
@torch.no_grad()
def test_the_training_loss_is_the_recorded_one(vectors, load, monkeypatch, case):
    case = Case(vectors, load, *case, "released-region")
    masks, order = case.masks()
    captions = [None] * len(order)
    for place, k in enumerate(order):
        captions[k] = case.case["captions"][place]
    inputs = case.processor(case.image, masks=masks, captions=captions)
    monkeypatch.setattr(case.model.config, "roi_stride", 28)
    draws = {"timesteps": case.recorded["t"], "noise": case.recorded["u"]}
    loss = case.model(**inputs, **draws).loss
    assert float(loss) == pytest.approx(float(case.recorded["loss"]), rel=1e-5)
    unmasked = inputs["labels"][inputs["labels"] != -100]
    assert torch.equal(unmasked, case.recorded["labels"][case.recorded["labels"] != -100])


@pytest.mark.parametrize("llava", LLAVAS, indirect=True)
def test_llava_pixels_are_the_recorded_ones(llava):
    pixels = llava.inputs["pixel_values"][:, :, ::16, ::16]
    assert torch.equal(pixels, llava.recorded["pixel_values_stride16"])


@pytest.mark.parametrize("llava", LLAVAS, indirect=True)
def test_llava_ids_are_the_recorded_ones(llava):
    ids = llava.inputs["input_ids"][0].tolist()
    image = llava.model.config.image_token_id
    first = ids.index(image)
    tokens = ids.count(image)
    assert tokens == llava.case["image_tokens"]
    prompt = ids[:first] + [-200] + ids[first + tokens : -llava.options["max_new_tokens"]]
    assert prompt == llava.recorded["input_ids"][0].tolist()


@pytest.mark.parametrize("llava", LLAVAS, indirect=True)
@torch.no_grad()
def test_llava_features_and_logits_are_the_recorded_ones(llava):
    features = llava.model.encode_images(llava.inputs["pixel_values"])
    sizes = llava.inputs["image_sizes"].tolist()
    tokens = llava.model.image_tokens(features, grids(llava.inputs), sizes)
    logits = llava.model(**llava.inputs, logits_to_keep=llava.options["max_new_tokens"]).logits
    assert deviation(tokens, llava.recorded["image_embeds"]) < 1e-4
    # the converted vocabulary has a row more, for the image's placeholder
    assert deviation(logits[..., :512], llava.recorded["first_step_logits"]) < 1e-4


@pytest.mark.parametrize("llava", LLAVAS, indirect=True)
def test_llava_answers_are_the_recorded_ones(llava):
    out = llava.model.diffusion_generate(
        llava.image,
        prompts=llava.case["prompt"],
        processor=llava.processor,
        stop_strings=llava.case["stop"],
        **llava.options,
    )
    assert out.token_ids[0] == llava.recorded["generated_ids"].tolist()


def one_map(recorded):
    """The recorded map as tiles of one cell, with each box's first tile and grid."""
    features, count = recorded["features"][0], len(recorded["boxes"])
    h, w = features.shape[1:]
    tiles = features.permute(1, 2, 0).reshape(h * w, 1, -1)
    return tiles, torch.zeros(count, dtype=torch.long), torch.tensor([[w, h]]).expand(count, 2)


@pytest.mark.parametrize("size", ["4x4", "3x3", "2x5"])
def test_roi_align_is_torchvisions(vectors, size):
    recorded = load_file(vectors / "roi_align.safetensors")
    bins = tuple(map(int, size.split("x")))
    got = roi_align(*one_map(recorded), recorded["boxes"], bins)
    assert deviation(got.permute(0, 3, 1, 2), recorded[f"output_{size}"]) < 1e-5


def test_roi_align_of_scaled_boxes_is_torchvisions(vectors):
    recorded = load_file(vectors / "roi_align.safetensors")
    got = roi_align(*one_map(recorded), recorded["boxes"] * 4 / 32, (4, 4))
    assert deviation(got.permute(0, 3, 1, 2), recorded["output_4x4_scale_32"]) < 1e-5


def test_every_recorded_size_gets_the_recorded_grid(vectors):
    recorded = json.loads((vectors / "tiling_grids.json").read_text())
    rows = np.array(recorded["rows"])
    got = [
        choose_grid((w, h), recorded["image_size"], recorded["max_tiles"]) for w, h in rows[:, :2]
    ]
    assert len(rows) == 585
    assert np.array_equal(got, rows[:, 2:])


def test_a_recorded_mask_has_soft_edges(vectors):
    """Else the rule that a mask is its non-zero pixels would go untested."""
    masks = [np.asarray(Image.open(path)) for path in sorted(vectors.glob("region_*_mask_*.png"))]
    assert any(np.setdiff1d(mask, [0, 255]).size for mask in masks)
