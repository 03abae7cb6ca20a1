"""The forward pass and the loss, against a plain implementation in float64."""

import pytest
import reference
import torch
from perceptiondlm.modeling_perceptiondlm import PerceptionDLMForConditionalGeneration
from perceptiondlm.modeling_vision import merge_patches, replay_regions, roi_align, tile_map

GROUPED = {"num_key_value_heads": 2}
# size, regions, soft masks, what differs from the tiny default
CASES = [
    ((40, 40), 2, False, {}),
    ((61, 47), 6, True, {}),
    ((100, 30), 3, False, {"text": GROUPED}),
    ((30, 170), 4, False, {"seed": 1, "roi_stride": 5}),
    ((90, 61), 1, True, {"seed": 2, "roi_output_size": 3, "spatial_merge_size": 4}),
    ((100, 30), 3, False, {"roi_convention": "aligned"}),
    ((61, 47), 2, False, {"roi_convention": "aligned", "roi_output_size": 2}),
    ((40, 40), 1, False, {"roi_convention": "aligned", "text": GROUPED}),
]
INDEPENDENT = {"region_layout": "independent"}


def deviation(got, expected) -> float:
    assert got.shape == expected.shape
    return float((got - expected).abs().max() / expected.abs().max())


class Setting:
    """A tiny model beside the plain implementation of it, on one image with masks."""

    def __init__(self, make, draw_image, blobs, case, **more):
        size, count, soft, changes = case
        self.model, self.processor = make(**changes, **more)
        self.image, self.masks = draw_image(*size), blobs(*size, count=count, soft=soft)
        self.plain = reference.Regions(reference.Network(self.model), self.image, self.masks)
        self.tokenizer = self.processor.tokenizer

    def inputs(self, **options):
        return self.processor(self.image, masks=self.masks, **options)


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_features_and_replayed_regions_equal_the_plain_ones(make, draw_image, blobs, case):
    setting = Setting(make, draw_image, blobs, case)
    inputs = setting.inputs(caption_length=2)
    features = setting.model.encode_images(inputs["pixel_values"], inputs["region_patches"])
    grids = [tuple(inputs["image_grids"][0].tolist())]
    replayed = replay_regions(
        features, grids, inputs["boxes"], inputs["box_images"], setting.model.config
    )
    assert deviation(features, setting.plain.visual) < 1e-5
    assert deviation(replayed, torch.stack(setting.plain.replays)) < 1e-5


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_logits_equal_the_plain_ones_in_the_released_layout(make, draw_image, blobs, case):
    setting = Setting(make, draw_image, blobs, case)
    inputs = setting.inputs(caption_length=5)
    mask = setting.model.config.mask_token_id
    sequence = setting.plain.sequence(setting.tokenizer, [[mask] * 5] * len(setting.masks))
    assert inputs["input_ids"][0].tolist() == sequence.ids
    assert inputs["position_ids"][0].tolist() == sequence.positions
    logits = setting.model(**inputs).logits[0]
    assert deviation(logits, setting.plain.logits(sequence)) < 1e-5


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_logits_equal_each_branch_alone_in_the_independent_layout(make, draw_image, blobs, case):
    setting = Setting(make, draw_image, blobs, case, **INDEPENDENT)
    inputs = setting.inputs(caption_length=5)
    logits, regions = setting.model(**inputs).logits[0], inputs["region_ids"][0]
    trunk = regions == -1
    for k in range(len(setting.masks)):
        branch = setting.plain.branch(
            setting.tokenizer, k, [setting.model.config.mask_token_id] * 5
        )
        alone = setting.plain.logits(branch, replays=[setting.plain.replays[k]])
        own = trunk | (regions == k)
        assert inputs["input_ids"][0][own].tolist() == branch.ids
        assert inputs["position_ids"][0][own].tolist() == branch.positions
        assert deviation(logits[own], alone) < 1e-5


@torch.no_grad()
def test_the_full_layout_sees_everything(make, draw_image, blobs):
    setting = Setting(make, draw_image, blobs, CASES[2], region_layout="full")
    mask = setting.model.config.mask_token_id
    sequence = setting.plain.sequence(setting.tokenizer, [[mask] * 3] * len(setting.masks))
    sequence.allowed[:] = True
    logits = setting.model(**setting.inputs(caption_length=3)).logits[0]
    assert deviation(logits, setting.plain.logits(sequence)) < 1e-5


ANYRES = {"image_layout": "anyres", "num_region_prompts": 0, "spatial_merge_size": 1}
ANYRES |= {"vision": {"patch_size": 8}}


@pytest.mark.parametrize("size", [(61, 47), (100, 30), (7, 200), (180, 170), (32, 32)])
@torch.no_grad()
def test_anyres_tokens_equal_the_plain_ones(make, draw_image, size):
    model, processor = make(**ANYRES, anyres_max_tiles=2)
    inputs = processor.image_processor(draw_image(*size))
    got = model.image_tokens(
        model.encode_images(inputs["pixel_values"]),
        [tuple(grid) for grid in inputs["image_grids"].tolist()],
        inputs["image_sizes"].tolist(),
    )
    (expected,) = reference.visual_tokens(reference.Network(model), [draw_image(*size)])
    assert deviation(got, expected) < 1e-5


@torch.no_grad()
def test_without_replay_a_prompt_has_no_roi_tokens(make, draw_image, blobs):
    model, processor = make(roi_output_size=0)
    inputs = processor(draw_image(61, 47), masks=blobs(61, 47, count=2), caption_length=3)
    assert not torch.isin(inputs["input_ids"], torch.tensor(model.config.roi_token_ids)).any()
    assert bool(model(**inputs).logits.isfinite().all())


@pytest.mark.parametrize("layout", ["released", "independent"])
@torch.no_grad()
def test_a_padded_batch_gives_each_samples_own_logits(make, draw_image, blobs, layout):
    model, processor = make(region_layout=layout)
    sizes, counts = [(61, 47), (40, 40), (30, 170)], [3, 1, 6]
    images = [draw_image(*size, seed=i) for i, size in enumerate(sizes)]
    masks = [blobs(*size, count=n) for size, n in zip(sizes, counts, strict=True)]
    batch = processor(images, masks=masks, caption_length=4)
    logits = model(**batch).logits
    assert (batch["attention_mask"] == 0).any()
    for row, image, own in zip(range(3), images, masks, strict=True):
        alone = processor(image, masks=own, caption_length=4)
        real = batch["attention_mask"][row].bool()
        assert torch.equal(batch["input_ids"][row][real], alone["input_ids"][0])
        assert torch.equal(batch["position_ids"][row][real], alone["position_ids"][0])
        assert deviation(logits[row][real], model(**alone).logits[0]) < 1e-5


@torch.no_grad()
def test_logits_to_keep_are_those_of_the_whole(make, draw_image, blobs):
    model, processor = make()
    inputs = processor(draw_image(40, 40), masks=blobs(40, 40, count=2), caption_length=4)
    whole = model(**inputs).logits
    assert torch.allclose(model(**inputs, logits_to_keep=7).logits, whole[:, -7:], atol=1e-5)
    some = torch.tensor([3, 30, 5])
    assert torch.allclose(model(**inputs, logits_to_keep=some).logits, whole[:, some], atol=1e-5)


@torch.no_grad()
def test_without_structure_positions_count_what_is_not_padding(make):
    model, processor = make(num_region_prompts=0)
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    padded = torch.tensor([[1, 1, 5, 6, 7, 8, 9]])
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1]])
    alone = model(input_ids=ids).logits
    assert torch.allclose(model(padded, attention_mask=mask).logits[:, 2:], alone, atol=1e-4)


# The loss.


@pytest.mark.parametrize("t", [0.0, 0.3, 1.0])
@torch.no_grad()
def test_the_loss_equals_the_plain_one(make, draw_image, blobs, t):
    setting = Setting(make, draw_image, blobs, CASES[2])
    captions = ["a red circle", "x", "the small green square sits left"]
    inputs = setting.inputs(captions=captions)
    texts = [
        setting.tokenizer(captions[k], add_special_tokens=False)["input_ids"]
        for k in setting.plain.order
    ]
    sequence = setting.plain.sequence(setting.tokenizer, texts)
    assert inputs["input_ids"][0].tolist() == sequence.ids
    first = sequence.answers[0][0] - 1
    labels = [-100] * first + sequence.ids[first:]
    assert inputs["labels"][0].tolist() == labels
    noise = torch.rand(1, len(labels), generator=torch.Generator().manual_seed(1))
    loss = setting.model(**inputs, timesteps=torch.tensor([t]), noise=noise).loss
    expected = reference.diffusion_loss(
        lambda ids: setting.plain.logits(sequence, ids),
        sequence.ids,
        labels,
        t,
        noise[0].tolist(),
        setting.model.config.mask_token_id,
    )
    assert float(loss) == pytest.approx(expected, rel=1e-5)


@torch.no_grad()
def test_the_loss_of_a_batch_is_the_mean_of_its_samples(make, draw_image, blobs):
    model, processor = make()
    images, masks = [draw_image(61, 47), draw_image(40, 90)], [blobs(61, 47, 2), blobs(40, 90, 1)]
    captions = [["a red circle", "a person"], ["an orange ring"]]
    batch = processor(images, masks=masks, captions=captions)
    t, noise = torch.tensor([0.4, 0.8]), torch.rand(batch["labels"].shape)
    losses = []
    for row in range(2):
        alone = processor(images[row], masks=masks[row], captions=captions[row])
        real = batch["attention_mask"][row].bool()
        own = {"timesteps": t[row : row + 1], "noise": noise[row : row + 1, real]}
        losses.append(float(model(**alone, **own).loss))
    together = float(model(**batch, timesteps=t, noise=noise).loss)
    assert together == pytest.approx(sum(losses) / 2, rel=1e-5)


@torch.no_grad()
def test_unweighted_loss_is_the_mean_cross_entropy_of_what_is_masked(make, draw_image, blobs):
    model, processor = make()
    inputs = processor(draw_image(40, 40), masks=blobs(40, 40, 1), captions=["an orange ring"])
    labels = inputs["labels"]
    everything = {"timesteps": torch.tensor([1.0]), "noise": torch.zeros(labels.shape)}
    loss = model(**inputs, **everything, loss_weighting="none").loss
    blank = dict(inputs)
    del blank["labels"]
    blank["input_ids"] = inputs["input_ids"].masked_fill(labels >= 0, model.config.mask_token_id)
    picked = model(**blank).logits[labels >= 0].log_softmax(-1)
    expected = -picked.gather(1, labels[labels >= 0][:, None]).mean()
    assert float(loss) == pytest.approx(float(expected), rel=1e-5)


def test_nothing_masked_is_a_loss_of_zero_with_gradients(make, draw_image, blobs):
    model, processor = make()
    inputs = processor(draw_image(40, 40), masks=blobs(40, 40, 1), captions=["a ring"])
    quiet = {"timesteps": torch.tensor([0.0]), "noise": torch.ones(inputs["labels"].shape)}
    loss = model(**inputs, **quiet).loss
    loss.backward()
    model.zero_grad()
    assert loss.item() == 0.0


@torch.no_grad()
def test_draws_are_torchs_and_so_repeat_with_a_seed(make, draw_image, blobs):
    model, processor = make()
    inputs = processor(draw_image(40, 40), masks=blobs(40, 40, 2), captions=["a ring", "a dog"])

    def loss(seed):
        torch.manual_seed(seed)
        return float(model(**inputs).loss)

    assert loss(0) == loss(0)
    assert len({loss(seed) for seed in range(5)}) > 1


def test_every_weight_that_takes_part_gets_a_gradient(make, draw_image, blobs):
    model, processor = make(seed=3)
    size = (61, 47)
    inputs = processor(
        draw_image(*size), masks=blobs(*size, count=6), captions=["a", "b", "c", "d", "e", "f"]
    )
    draws = {"timesteps": torch.tensor([0.7]), "noise": torch.rand(inputs["labels"].shape)}
    model(**inputs, **draws).loss.backward()
    without = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    model.zero_grad()
    assert without == []


# Pieces.


def test_roi_align_of_several_images_equals_the_plain_loops_on_each_map():
    generator = torch.Generator().manual_seed(0)
    grids = [(1, 1), (3, 2), (2, 2)]
    counts = [w * h for w, h in grids]
    tiles = torch.randn(sum(counts), 16, 3, generator=generator)  # 4x4 cells each
    starts = [0, 1, 7]
    images = [1, 0, 2, 1, 2] * 8  # of the boxes, in no order
    boxes = torch.rand(40, 4, generator=generator) * 16 - 3
    got = roi_align(
        tiles,
        torch.tensor([starts[i] for i in images]),
        torch.tensor([grids[i] for i in images]),
        boxes,
        (3, 2),
    )
    for i, corners, bins in zip(images, boxes.tolist(), got, strict=True):
        cells = tile_map(tiles[starts[i] : starts[i] + counts[i]], grids[i])
        expected = reference.roi_align(cells.double(), corners, 3, 2)
        assert torch.allclose(bins.flatten(0, 1).double(), expected, atol=1e-5)


def test_merged_patches_stand_row_by_row():
    features = torch.arange(16).view(1, 16, 1)  # a 4x4 grid of numbered patches
    assert merge_patches(features, 2)[0].tolist() == [
        [0, 1, 4, 5],
        [2, 3, 6, 7],
        [8, 9, 12, 13],
        [10, 11, 14, 15],
    ]


def test_tiles_are_laid_out_row_by_row():
    tiles = torch.arange(24).view(6, 4, 1)  # six tiles of 2x2 cells, three columns
    assert tile_map(tiles, (3, 2))[..., 0].tolist() == [
        [0, 1, 4, 5, 8, 9],
        [2, 3, 6, 7, 10, 11],
        [12, 13, 16, 17, 20, 21],
        [14, 15, 18, 19, 22, 23],
    ]


@torch.no_grad()
def test_placeholders_are_found_in_the_prompt_alone(make, draw_image, blobs):
    """A caption that is being decoded may hold any id, placeholders too."""
    model, processor = make()
    inputs = processor(draw_image(40, 40), masks=blobs(40, 40, 1), caption_length=4)
    caption = torch.where(inputs["role_ids"][0] == 2)[0][1:5]
    inputs["input_ids"][0, caption[0]] = model.config.image_token_id
    inputs["input_ids"][0, caption[1]] = model.config.roi_token_ids[0]
    inputs["input_ids"][0, caption[2]] = model.config.caption_token_ids[0]
    assert bool(model(**inputs).logits.isfinite().all())


@pytest.mark.parametrize("name", ["image", "RoI"])
def test_placeholders_that_do_not_match_their_tokens_are_refused(make, draw_image, blobs, name):
    model, processor = make()
    inputs = processor(draw_image(40, 40), masks=blobs(40, 40, 1), caption_length=4)
    ids = inputs["input_ids"]
    token = model.config.image_token_id if name == "image" else model.config.roi_token_ids[0]
    count = int((ids == token).sum())
    ids[ids == token] = torch.tensor([token] * (count - 1) + [5])
    with pytest.raises(
        ValueError, match=f"expected {count} {name} placeholders .* got {count - 1}"
    ):
        model(**inputs)


def test_an_image_placeholder_without_an_image_is_refused(make):
    model, _ = make(num_region_prompts=0)
    ids = torch.tensor([[3, model.config.image_token_id]])
    with pytest.raises(ValueError, match="expected 0 image placeholders"):
        model(input_ids=ids)


def test_masks_for_a_model_without_region_prompts_are_refused(make, make_config, draw_image, blobs):
    _, processor = make()
    model = PerceptionDLMForConditionalGeneration(make_config(num_region_prompts=0))
    inputs = processor(draw_image(40, 40), masks=blobs(40, 40, 1), caption_length=4)
    with pytest.raises(ValueError, match="expected a model with region prompts"):
        model(**inputs)


def test_tiles_that_do_not_match_their_grids_are_refused(make, draw_image):
    model, processor = make()
    inputs = processor(draw_image(100, 30), prompts="What?")
    inputs["image_grids"] = torch.tensor([[1, 1]])
    with pytest.raises(ValueError, match="expected 1 tiles for grids"):
        model(**inputs)
