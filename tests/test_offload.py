"""Weights on a disk, on several devices, or gone between calls: a dispatched model is the same.

The oracle is the model as it was before it was dispatched.
"""

import copy
import functools

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from perceptiondlm.modeling_perceptiondlm import PerceptionDLMForConditionalGeneration
from simulated_devices import FIRST, SECOND, THIRD, SimulatedDevices

pytestmark = pytest.mark.filterwarnings("ignore:The following device_map keys")
ANYRES = {"image_layout": "anyres", "num_region_prompts": 0, "spatial_merge_size": 1}
SETTINGS = {
    "released": {},
    "independent": {"region_layout": "independent"},
    "full": {"region_layout": "full"},
    "tied": {"region_layout": "independent", "tie_word_embeddings": True},
    "anyres": ANYRES,
}
TEXT = "language_model.model"
PARTS = [
    "",
    "vision_tower",
    "vision_tower.encoder.layers.0",
    "connector",
    "region_prompts",
    "image_newline",
    "language_model",
    f"{TEXT}.embed_tokens",
    f"{TEXT}.layers.0",
    f"{TEXT}.layers.1",
    f"{TEXT}.layers.1.self_attn.q_proj",
    f"{TEXT}.norm",
    f"{TEXT}.rotary_emb",
    "language_model.lm_head",
]


@pytest.fixture(scope="module")
def results(make, draw_image, blobs):
    """A function: all that a model of a setting makes of an image, as plain numbers."""
    image, masks = draw_image(61, 47), blobs(61, 47, count=2)

    def run(model, setting: str, likelihood: bool = False) -> dict:
        _, processor = make(**SETTINGS[setting])
        asked = {"images": image, "prompts": "what?", "max_new_tokens": 4}
        if setting != "anyres":
            asked = {"images": image, "masks": masks, "caption_length": 3}
        found = {}
        for cache, guidance in ((None, 0.0), (4, 1.0), (0, 0.0)):
            options = {"prompt_refresh_interval": cache, "cfg_scale": guidance, "steps": 2}
            out = model.diffusion_generate(**asked, **options, processor=processor)
            found[cache, guidance] = out.token_ids

        inputs = processor(**{k: v for k, v in asked.items()})
        with torch.no_grad():
            found["logits"] = model(**inputs).logits.flatten()[::7].tolist()
            labels = inputs["input_ids"].masked_fill(inputs["role_ids"] < 2, -100)
            draws = {"timesteps": torch.tensor([0.9]), "noise": torch.zeros(labels.shape)}
            found["loss"] = model(**inputs, labels=labels, **draws).loss.tolist()
            if likelihood:
                asked = {k: asked[k] for k in ("images", "masks", "prompts") if k in asked}
                options = {"samples": 3, "length": 0, "processor": processor}
                scores = model.diffusion_score(**asked, texts="a red cat", **options)
                found["likelihood"] = scores[0]
        return found

    return run


def cover(model, part: str, place: str, rest: str) -> dict[str, str]:
    """A device map with one part at `place` and every other weight at `rest`."""
    names = [n for n in model.state_dict() if part and not f"{n}.".startswith(f"{part}.")]
    return {part: place} | {n.rpartition(".")[0] or n: rest for n in names}


PAIRS = [
    (setting, part)
    for setting in SETTINGS
    for part in PARTS
    if part != ("region_prompts" if setting == "anyres" else "image_newline")
]


@pytest.fixture(scope="module")
def saved(make, tmp_path_factory):
    """Folder of a setting's saved model."""
    root = tmp_path_factory.mktemp("saved")

    def save(setting: str):
        if not (root / setting).exists():
            make(**SETTINGS[setting])[0].save_pretrained(root / setting)
        return root / setting

    return save


@pytest.fixture(scope="module")
def expected(make, results):
    """What a setting's model gives where nothing is dispatched."""
    return functools.cache(lambda setting: results(make(**SETTINGS[setting])[0], setting))


@pytest.mark.parametrize(("setting", "part"), PAIRS)
def test_a_part_on_disk_changes_nothing(make, saved, results, expected, setting, part, tmp_path):
    model, _ = make(**SETTINGS[setting])
    loaded = PerceptionDLMForConditionalGeneration.from_pretrained(
        saved(setting),
        device_map=cover(model, part, "disk", "cpu"),
        offload_folder=tmp_path,
    )
    assert results(loaded.eval(), setting) == expected(setting)


@pytest.mark.parametrize("setting", SETTINGS)
def test_a_part_in_memory_and_the_rest_on_disk_changes_nothing(
    make, saved, results, expected, setting, tmp_path
):
    model, _ = make(**SETTINGS[setting])
    loaded = PerceptionDLMForConditionalGeneration.from_pretrained(
        saved(setting),
        device_map=cover(model, f"{TEXT}.layers.0", "cpu", "disk"),
        offload_folder=tmp_path,
    )
    assert results(loaded.eval(), setting) == expected(setting)


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("share", [0.3, 0.5, 0.8])
def test_a_model_that_does_not_fit_in_memory_gives_the_same(
    make, saved, results, expected, setting, share, tmp_path
):
    """`device_map="auto"` with memory for a share of the weights."""
    size = sum(p.numel() * p.element_size() for p in make(**SETTINGS[setting])[0].parameters())
    loaded = PerceptionDLMForConditionalGeneration.from_pretrained(
        saved(setting),
        device_map="auto",
        max_memory={"cpu": int(share * size)},
        offload_folder=tmp_path,
    )
    assert "disk" in loaded.hf_device_map.values()
    assert results(loaded.eval(), setting) == expected(setting)


@pytest.mark.parametrize("setting", SETTINGS)
def test_a_whole_model_offloaded_by_accelerate_gives_the_same(
    make, results, expected, setting, tmp_path
):
    model = copy.deepcopy(make(**SETTINGS[setting])[0])
    on_disk = disk_offload(copy.deepcopy(model), tmp_path, execution_device="cpu")
    in_memory = cpu_offload(model, execution_device="cpu")
    assert results(on_disk, setting) == results(in_memory, setting) == expected(setting)
    assert {p.device.type for p in in_memory.parameters()} == {"meta"}
    assert in_memory.device == on_disk.device == torch.device("cpu")


@pytest.mark.parametrize("setting", SETTINGS)
def test_no_parameter_is_read_outside_its_modules_forward(make, results, expected, setting):
    model = copy.deepcopy(make(**SETTINGS[setting])[0])
    values = {p: p.detach().clone() for p in model.parameters()}
    for module in model.modules():
        hide_between_calls(module, values)
    assert results(model, setting) == expected(setting)
    assert all(bool(p.isnan().all()) for p in model.parameters())


def hide_between_calls(module: torch.nn.Module, values: dict):
    """Makes a module's own weights NaN but for its forward passes, in which they have `values`."""
    own = list(module.parameters(recurse=False))
    depth = [0]

    def show(*_):
        depth[0] += 1
        for parameter in own:
            parameter.data.copy_(values[parameter])

    def hide(*_):
        depth[0] -= 1
        for parameter in own if not depth[0] else ():
            parameter.data.fill_(torch.nan)

    module.register_forward_pre_hook(show)
    module.register_forward_hook(hide)
    for parameter in own:
        parameter.data.fill_(torch.nan)


# Several devices.
DEVICES = {
    "text apart": {
        "vision_tower": FIRST,
        "connector": FIRST,
        "region_prompts": FIRST,
        "image_newline": FIRST,
        "language_model": SECOND,
    },
    "everything apart": {
        "vision_tower": SECOND,
        "connector": THIRD,
        "region_prompts": FIRST,
        "image_newline": FIRST,
        f"{TEXT}.embed_tokens": SECOND,
        f"{TEXT}.layers.0": FIRST,
        f"{TEXT}.layers.1": THIRD,
        f"{TEXT}.norm": FIRST,
        "language_model.lm_head": SECOND,
    },
    "vision split": {
        "vision_tower.embeddings": FIRST,
        "vision_tower.encoder.layers.0": SECOND,
        "vision_tower.encoder.layers.1": THIRD,
        "connector": FIRST,
        "region_prompts": THIRD,
        "image_newline": SECOND,
        "language_model": FIRST,
    },
    "half in memory": {
        "vision_tower": FIRST,
        "connector": "cpu",
        "region_prompts": "cpu",
        "image_newline": FIRST,
        f"{TEXT}.embed_tokens": "cpu",
        f"{TEXT}.layers.0": SECOND,
        f"{TEXT}.layers.1": "cpu",
        f"{TEXT}.norm": FIRST,
        "language_model.lm_head": "cpu",
    },
}


@pytest.mark.parametrize("devices", DEVICES)
@pytest.mark.parametrize("setting", SETTINGS)
def test_parts_on_several_devices_change_nothing(make, results, setting, devices):
    model = copy.deepcopy(make(**SETTINGS[setting])[0])
    expected = results(model, setting, likelihood=True)
    device_map = {k: v for k, v in DEVICES[devices].items() if has_part(model, k)}
    with SimulatedDevices():
        model = dispatch_model(model, device_map)
        assert model.device.type == "lazy"
        found = results(model, setting, likelihood=True)
    for name, values in expected.items():  # the simulation computes some sums in another order
        numbers = isinstance(name, str)
        assert found[name] == (pytest.approx(values, rel=1e-4, abs=1e-4) if numbers else values)


def has_part(model, part: str) -> bool:
    return part in dict(model.named_modules()) or part in model.state_dict()


def test_the_simulation_refuses_to_mix_devices():
    with SimulatedDevices():
        one, other = torch.ones(2, device=FIRST), torch.ones(2, device=SECOND)
        assert (one + other.to(FIRST)).tolist() == [2, 2]
        for stranger in (other, torch.ones(2)):
            with pytest.raises(RuntimeError, match="expected tensors of one device"):
                one + stranger


@pytest.mark.parametrize("setting", ["released", "independent", "full"])
@pytest.mark.parametrize("images", [1, 3])
def test_a_layer_streams_once_a_step_however_many_rows_there_are(
    make, draw_image, blobs, tmp_path, setting, images
):
    """Rows with other numbers of regions share the step; a tree's prompt takes two passes more."""
    model, processor = make(**SETTINGS[setting])
    model = disk_offload(copy.deepcopy(model), tmp_path, execution_device="cpu")
    layer = model.language_model.model.layers[0].self_attn.q_proj
    weights = layer._hf_hook.weights_map
    read = []
    layer._hf_hook.weights_map = _Watched(weights, read)

    asked = [draw_image(61, 47, seed=k) for k in range(images)]
    masks = [blobs(61, 47, count=1 + k, seed=k) for k in range(images)]
    out = model.diffusion_generate(
        asked, masks, processor=processor, caption_length=6, steps=5, batch_size=images
    )
    assert out.num_forwards == 5 * images  # counted for each image
    assert read.count("weight") == 5 + (2 if setting == "independent" else 0)


class _Watched(dict):
    """Passes weights on, and notes the names of those that are read."""

    def __init__(self, weights, read: list[str]):
        super().__init__()
        self.weights, self.read = weights, read

    def __getitem__(self, name: str):
        self.read.append(name)
        return self.weights[name]
