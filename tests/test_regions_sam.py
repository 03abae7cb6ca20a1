"""Regions by transformers' SAM, SAM 2 and SAM 3, with tiny models of random weights."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from perceptiondlm.regions.filters import stability_of, without_overlaps
from perceptiondlm.regions.sam import Frame
from perceptiondlm.regions.segmenters import find_regions, load_segmenter
from PIL import Image
from tiny_sams import save_tiny
from torch.nn.functional import interpolate
from transformers import SamProcessor

IMAGE = Path(__file__).parent / "fixtures" / "vectors" / "region_0.png"
PROMPTED = ("sam", "sam2", "sam2_video", "sam3_tracker", "sam3_video")
POINTS = [(20.0, 30.0), (120.5, 100.0)]
BOXES = [(10.0, 20.0, 90.0, 110.0)]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Gives a function that saves a tiny segmenter of a kind, once; returns its folder and it."""
    made = {}

    def save(kind: str):
        if kind not in made:
            folder = tmp_path_factory.mktemp(kind)
            made[kind] = folder, save_tiny(kind, folder)
        return made[kind]

    return save


@pytest.fixture(scope="module")
def image():
    return Image.open(IMAGE).convert("RGB")  # 150x140


def mask_by_hand(model, image, *, shown, side, prompts, size):
    """The likeliest mask by transformers' model itself, from pixels to pixels in one pass."""
    pixels = np.zeros((side, side, 3), np.float32)
    values = np.asarray(image.resize(shown, Image.Resampling.BILINEAR)) / 255
    pixels[: shown[1], : shown[0]] = (values - [0.4, 0.5, 0.6]) / [0.2, 0.25, 0.3]
    with torch.no_grad():
        out = model(
            pixel_values=torch.from_numpy(pixels).permute(2, 0, 1)[None],
            multimask_output="input_points" in prompts,
            **prompts,
        )
    logits = out.pred_masks[0, 0, out.iou_scores[0, 0].argmax()][None, None]
    framed = interpolate(logits, (side, side), mode="bilinear")[..., : shown[1], : shown[0]]
    logits = framed if shown != (side, side) else logits
    return (interpolate(logits, size[::-1], mode="bilinear")[0, 0] > 0).numpy()


@pytest.mark.parametrize("kind", PROMPTED)
def test_each_point_and_box_gets_the_models_likeliest_mask(saved, image, kind):
    folder, model = saved(kind)
    segmenter = load_segmenter(folder, device="cpu")
    regions = segmenter(image, points=POINTS, boxes=BOXES)
    assert [r.origin for r in regions] == ["point 20,30", "point 120.5,100", "box 10,20,90,110"]

    side = 64 if kind in ("sam", "sam2", "sam2_video") else 56
    shown = (64, 60) if kind == "sam" else (side, side)  # 140 / 150 * 64 = 59.7
    scale = torch.tensor([shown[0] / 150, shown[1] / 140])
    each = [{"input_points": (torch.tensor([[[p]]]) * scale)} for p in POINTS]
    each += [{"input_boxes": torch.tensor([BOXES]) * scale.repeat(2)}]
    assert any(0 < r.area < r.mask.size for r in regions)
    for region, prompts in zip(regions, each, strict=True):
        expected = mask_by_hand(
            segmenter.prompted, image, shown=shown, side=side, prompts=prompts, size=image.size
        )
        assert region.mask.dtype == bool and (region.mask == expected).mean() > 0.999


@pytest.mark.parametrize("size", [(150, 140), (40, 300), (64, 64)])
def test_the_frame_of_sam_is_transformers_own_processors(size, draw_image):
    kind = pytest.importorskip("transformers.models.sam.image_processing_pil_sam")
    theirs = SamProcessor(
        kind.SamImageProcessorPil(
            size={"longest_edge": 64},
            pad_size={"height": 64, "width": 64},
            mask_size={"longest_edge": 16},
            mask_pad_size={"height": 16, "width": 16},
        )
    )
    image = draw_image(*size)
    inputs = theirs(image, input_points=[[[30.5, 20.0]]], return_tensors="pt")
    settings = theirs.image_processor
    frame = Frame((64, 64), tuple(settings.image_mean), tuple(settings.image_std), True)

    view = frame.view(image)
    assert torch.allclose(view.pixels, inputs["pixel_values"].float(), atol=1e-5)
    assert torch.allclose(view.scaled([(30.5, 20.0)]), inputs["input_points"].float().flatten(0, 2))
    logits = torch.randn(1, 1, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    sizes = inputs["original_sizes"], inputs["reshaped_input_sizes"]
    (expected,) = settings.post_process_masks(logits, *sizes)
    assert (view.mask(logits[0, 0, 0]) == expected[0, 0].numpy()).all()


@pytest.mark.parametrize(
    ("kind", "prefixes"),
    [
        ("sam", {"": ""}),
        ("sam2_video", {"": ""}),
        (
            "sam3_video",
            {
                "vision_encoder.backbone.": "detector_model.vision_encoder.backbone.",
                "vision_encoder.neck.": "tracker_neck.",
                "": "tracker_model.",
            },
        ),
    ],
)
def test_every_weight_is_the_checkpoints(saved, kind, prefixes):
    folder, model = saved(kind)
    weights = model.state_dict()
    for name, loaded in load_segmenter(folder, device="cpu").prompted.state_dict().items():
        prefix = next(each for each in prefixes if name.startswith(each))
        assert torch.equal(loaded, weights[prefixes[prefix] + name.removeprefix(prefix)]), name


def test_weights_that_are_not_there_are_not_made_up(saved, tmp_path):
    from safetensors.torch import load_file, save_file

    folder, _ = saved("sam")
    weights = load_file(folder / "model.safetensors")
    weights.pop("mask_decoder.iou_token.weight")
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    for name in ("config.json", "preprocessor_config.json"):
        (tmp_path / name).write_text((folder / name).read_text())
    with pytest.raises(ValueError, match="1 weights missing of SamModel, .*iou_token"):
        load_segmenter(tmp_path)


@pytest.mark.parametrize("kind", ["sam", "sam2", "sam3_tracker"])
def test_everything_gives_masks_that_pass_the_filters(saved, image, kind):
    segmenter = load_segmenter(saved(kind)[0], device="cpu")
    segmenter.grid, segmenter.min_score, segmenter.min_stability = 6, -10, 0.0
    regions = segmenter(image)
    assert regions
    assert sorted((r.score for r in regions), reverse=True) == [r.score for r in regions]
    for one, other in itertools.combinations(regions, 2):
        overlap = (one.mask & other.mask).sum() / (one.mask | other.mask).sum()
        assert overlap <= 0.75  # 0.7 at the model's own scale
    segmenter.min_score = 10
    assert segmenter(image) == []
    with pytest.raises(ValueError, match="found no region"):
        find_regions(image, segmenter, everything=True)


@pytest.mark.parametrize("kind", ["sam3", "sam3_video"])
def test_text_gives_every_query_that_is_likely_enough(saved, image, kind):
    folder, _ = saved(kind)
    segmenter = load_segmenter(folder, device="cpu")
    segmenter.min_text_score = 0.0
    regions = segmenter(image, text=["a mug", "spoon"])
    assert {r.label for r in regions} == {"a mug", "spoon"}
    assert {r.origin for r in regions} == {"text 'a mug'", "text 'spoon'"}
    mugs = [r for r in regions if r.label == "a mug"]

    words = segmenter.tokenizer("a mug", padding="max_length", max_length=32, return_tensors="pt")
    pixels = np.asarray(image.resize((56, 56), Image.Resampling.BILINEAR)) / 255
    pixels = ((pixels - [0.4, 0.5, 0.6]) / [0.2, 0.25, 0.3]).astype(np.float32)
    with torch.no_grad():
        out = segmenter.by_text(
            pixel_values=torch.from_numpy(pixels).permute(2, 0, 1)[None],
            input_ids=words["input_ids"],
            attention_mask=words["attention_mask"],
        )
    scores = (out.pred_logits.sigmoid() * out.presence_logits.sigmoid())[0]
    masks = interpolate(out.pred_masks, (140, 150), mode="bilinear")[0] > 0
    expected = [(round(float(scores[i]), 4), int(masks[i].sum())) for i in range(5)]
    got = [(r.score, r.area) for r in mugs]
    assert sorted(got) == sorted(pair for pair in expected if pair[1])

    segmenter.min_text_score = 1.0
    with pytest.raises(ValueError, match="expected 'a mug' in the image, found no region"):
        find_regions(image, segmenter, text="a mug")
    with pytest.raises(ValueError, match="at most 32 tokens, got"):
        segmenter(image, text="mug " * 40)


def test_what_weights_do_not_take_is_refused_with_what_does(saved, image):
    with pytest.raises(
        ValueError, match="a segmenter that reads text, say facebook/sam3, got text 'mug'"
    ):
        load_segmenter(saved("sam")[0])(image, text="mug")
    words_only = load_segmenter(saved("sam3")[0])
    for prompts in ({"points": [(1, 1)]}, {"boxes": [(1, 1, 9, 9)]}, {}):
        with pytest.raises(ValueError, match="expected text for these weights"):
            words_only(image, **prompts)


def test_what_is_no_segmenter_is_named(tmp_path, vectors):
    with pytest.raises(FileNotFoundError, match="no such file or folder"):
        load_segmenter("/nowhere")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(ValueError, match="checkpoint of SAM, SAM 2 or SAM 3 in .*'bert'"):
        load_segmenter(tmp_path)
    (tmp_path / "list.json").write_text("[1]")
    with pytest.raises(ValueError, match="checkpoint of SAM, SAM 2 or SAM 3 in .*list.json"):
        load_segmenter(tmp_path / "list.json")


def test_a_checkpoints_own_code_is_not_run(tmp_path):
    (tmp_path / "evil.py").write_text("raise SystemExit('ran')")
    config = {"model_type": "evil", "auto_map": {"AutoConfig": "evil.Config"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="checkpoint of SAM"):
        load_segmenter(tmp_path)


def test_of_overlapping_masks_the_best_is_kept():
    masks = np.zeros((4, 10, 10), bool)
    masks[0, :5], masks[1, :5, 1:], masks[2, 5:], masks[3, :, :5] = True, True, True, True
    # 0 and 1 share 45 of 50, 0 and 3 share 25 of 75
    assert without_overlaps(masks, np.array([0.5, 0.9, 0.1, 0.6])) == [1, 3, 2]
    assert without_overlaps(masks, np.array([0.9, 0.5, 0.1, 0.6])) == [0, 3, 2]
    assert without_overlaps(masks[:0], np.array([])) == []


def test_a_mask_with_a_sharp_edge_is_stable():
    logits = np.full((3, 4, 4), -5.0)
    logits[0, :2] = 5.0
    logits[1, :2], logits[1, 0] = 0.5, 5.0  # half of it is near the threshold
    assert stability_of(logits).tolist() == [1.0, 0.5, 0.0]
