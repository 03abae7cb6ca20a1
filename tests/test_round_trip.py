"""Saved, then loaded in a fresh process that cannot import the source tree: the same outputs."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from perceptiondlm.processing_perceptiondlm import PerceptionDLMProcessor
from PIL import Image

ROOT = Path(__file__).parent.parent
GROUPED = {"text": {"num_key_value_heads": 2}}

# Run in the fresh process. The installed package is blocked, so that all code comes from folders.
SCRIPT = """
import json, sys, torch
from pathlib import Path

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "perceptiondlm":
            raise ImportError("blocked")
sys.meta_path.insert(0, Blocked())

from PIL import Image
from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoProcessor
from transformers import AutoModelForImageTextToText

home, root = Path(sys.argv[1]), sys.argv[2]
image = Image.open(home / "image.png")
masks = [Image.open(path) for path in sorted(home.glob("mask_*.png"))]
remote = {"trust_remote_code": True}

def captions(model, processor):
    given = {} if processor is None else {"processor": processor}
    out = model.diffusion_generate(image, masks, caption_length=4, steps=4, **given)
    return {"ids": out.token_ids, "texts": out.texts, "dtype": str(model.dtype)}

def summary(folder, automodel=AutoModel, find_processor=False, **options):
    where = {k: v for k, v in options.items() if k == "subfolder"}
    model = automodel.from_pretrained(home / folder, **remote, **options).eval()
    processor = AutoProcessor.from_pretrained(home / folder, **remote, **where)
    result = captions(model, None if find_processor else processor)
    with torch.no_grad():
        inputs = processor(image, masks=masks, caption_length=4)
        result["logits"] = model(**inputs).logits[0, -1].float().tolist()
    result["class"] = type(model).__name__
    return result, model, processor

results = {}
results["whole"], model, processor = summary("whole")
model.save_pretrained(home / "again"), processor.save_pretrained(home / "again")
results["again"], *_ = summary("again", AutoModelForImageTextToText, find_processor=True)
results["converted"], *_ = summary("converted", AutoModelForImageTextToText)
results["bf16"], *_ = summary("bf16", dtype="auto")
results["subfolder"], *_ = summary("nested", find_processor=True, subfolder="tiny")
config = AutoConfig.from_pretrained(home / "whole", **remote)
results["config"] = config.to_diff_dict()
results["image_processor"] = {}
for folder, options in {"whole": {}, "nested": {"subfolder": "tiny"}}.items():
    try:
        made = AutoImageProcessor.from_pretrained(home / folder, **remote, **options)
    except ImportError as error:  # of older transformers, for any image processor
        assert "Torchvision" in str(error), error
        continue
    results["image_processor"][folder] = made(image, masks)["region_patches"].sum().item()
results["sources"] = [m.__file__ for m in sys.modules.values() if getattr(m, "__file__", None)]
print("RESULT" + json.dumps(results))
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory, make, converted, draw_image, blobs):
    """Folders as users make them: whole, in bfloat16, converted, with weights in a subfolder."""
    home = tmp_path_factory.mktemp("home")
    draw_image(61, 47).save(home / "image.png")
    for i, mask in enumerate(blobs(61, 47, count=3)):
        Image.fromarray(mask).save(home / f"mask_{i}.png")
    model, processor = make(**GROUPED)
    for folder in ("whole", "nested/tiny"):
        model.save_pretrained(home / folder)
        processor.save_pretrained(home / folder)
    for module in (home / "nested/tiny").glob("*.py"):
        shutil.move(module, home / "nested" / module.name)
    half = type(model).from_pretrained(home / "whole", dtype=torch.bfloat16)
    half.save_pretrained(home / "bf16")
    processor.save_pretrained(home / "bf16")
    shutil.copytree(converted("released-region"), home / "converted")
    return home


@pytest.fixture(scope="module")
def fresh(home):
    """What the fresh process found."""
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(home), str(ROOT)],
        cwd=home,
        capture_output=True,
        text=True,
        timeout=300,
        env=_environment(home / "modules"),
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.split("RESULT")[1])


def _environment(modules: Path) -> dict:
    kept = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    return kept | {"HF_MODULES_CACHE": str(modules), "HF_HUB_OFFLINE": "1"}


@pytest.fixture(scope="module")
def here(home, make, load):
    """The same images and masks, captioned in this process."""

    def caption(folder):
        if folder == "converted":
            model, processor = load("released-region")
        elif folder == "bf16":
            model, processor = make(**GROUPED)
            model = type(model).from_pretrained(home / "bf16", dtype="auto").eval()
        else:
            model, processor = make(**GROUPED)
        image, masks = scene(home)
        out = model.diffusion_generate(image, masks, processor=processor, caption_length=4, steps=4)
        with torch.no_grad():
            inputs = processor(image, masks=masks, caption_length=4)
            logits = model(**inputs).logits[0, -1].float()
        return out, logits

    return caption


def scene(home):
    masks = [Image.open(path) for path in sorted(home.glob("mask_*.png"))]
    return Image.open(home / "image.png"), masks


@pytest.mark.parametrize("folder", ["whole", "again", "subfolder", "converted", "bf16"])
def test_the_same_outputs_come_from_a_fresh_process(fresh, here, folder):
    out, logits = here(folder)
    assert fresh[folder]["ids"] == out.token_ids
    assert fresh[folder]["texts"] == out.texts
    assert torch.tensor(fresh[folder]["logits"]).equal(logits)
    assert fresh[folder]["class"] == "PerceptionDLMForConditionalGeneration"
    assert fresh[folder]["dtype"] == ("torch.bfloat16" if folder == "bf16" else "torch.float32")


def test_no_code_came_from_the_source_tree(fresh):
    own = [Path(path) for path in fresh["sources"] if "perceptiondlm" in Path(path).name]
    assert own and not any(path.parent == ROOT for path in own)


def test_config_and_image_processor_load_by_themselves(fresh, home, make):
    model, processor = make(**GROUPED)
    assert fresh["config"]["text_config"]["num_key_value_heads"] == 2
    assert fresh["config"]["roi_token_ids"] == model.config.roi_token_ids
    if not fresh["image_processor"]:
        pytest.skip("this transformers wants torchvision for AutoImageProcessor")
    patches = processor.image_processor(*scene(home))["region_patches"]
    assert fresh["image_processor"] == {"whole": int(patches.sum()), "nested": int(patches.sum())}


def test_a_saved_folder_holds_every_module_it_imports(home):
    """transformers copies relative imports from flat siblings alone."""
    modules = {path.stem for path in (home / "whole").glob("*.py")}
    for path in (home / "whole").glob("*.py"):
        for line in path.read_text().splitlines():
            if line.startswith("from ."):
                assert line.split()[1].lstrip(".") in modules


def test_a_saved_processor_keeps_every_setting(make, tmp_path):
    _, processor = make(roi_output_size=2, region_layout="independent", roi_convention="aligned")
    processor.save_pretrained(tmp_path)
    loaded = PerceptionDLMProcessor.from_pretrained(tmp_path, trust_remote_code=True)
    for ours, theirs in ((processor, loaded), (processor.image_processor, loaded.image_processor)):
        kept = [{k: v for k, v in p.to_dict().items() if k != "auto_map"} for p in (ours, theirs)]
        assert kept[0] == kept[1]
    assert loaded.chat_template == processor.chat_template
    assert loaded.tokenizer.get_vocab() == processor.tokenizer.get_vocab()
