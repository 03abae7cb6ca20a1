"""transformers' own mixins, run against this package's classes.

`make test-transformers` fetches them and runs this file. Tests that cannot pass are listed in
`docs/transformers-suite.md` with the reason; the run fails when one of them passes, or another
fails.
"""

# ruff: noqa: E402  (what is imported exists only once it is fetched)

import copy
import re
import unittest
from pathlib import Path

import pytest
import torch
import transformers_sources

pytestmark = pytest.mark.transformers_suite
if not transformers_sources.FOLDER.exists():
    pytest.skip("transformers' tests are not here: make test-transformers", allow_module_level=True)
pytest.importorskip("parameterized")

from conftest import TEXT, VECTORS, VISION
from perceptiondlm.common.special_tokens import IMAGE_TOKENS, token_ids
from perceptiondlm.configuration_perceptiondlm import PerceptionDLMConfig
from perceptiondlm.image_processing_perceptiondlm import PerceptionDLMImageProcessor
from perceptiondlm.modeling_perceptiondlm import PerceptionDLMForConditionalGeneration
from perceptiondlm.processing_perceptiondlm import PerceptionDLMProcessor
from PIL import Image
from transformers import PreTrainedTokenizerFast

modeling = transformers_sources.load("test_modeling_common")
imaging = transformers_sources.load("test_image_processing_common")
processing = transformers_sources.load("test_processing_common")

LIST = Path(__file__).resolve().parents[1] / "docs" / "transformers-suite.md"


def listed() -> set[tuple[str, str]]:
    """(class, test) of each line of the list; `*` stands for every class that has the test."""
    return set(re.findall(r"^\| `(\w+|\*)\.(test_\w+)` \|", LIST.read_text("utf-8"), re.M))


def tokenizer() -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast.from_pretrained(VECTORS / "released-region")


class Tester:
    """A tiny model and inputs for it, as `ModelTesterMixin` asks for them."""

    batch_size = 2
    is_training = True
    num_hidden_layers = TEXT["num_hidden_layers"]
    num_attention_heads = TEXT["num_attention_heads"]
    hidden_size = TEXT["hidden_size"]
    changes = {}
    with_images = with_regions = False

    def __init__(self, parent):
        self.parent = parent
        self.seq_length = self.prepare_config_and_inputs_for_common()[1]["input_ids"].shape[1]

    def get_config(self) -> PerceptionDLMConfig:
        return PerceptionDLMConfig(
            text_config=dict(TEXT),
            vision_config=dict(VISION),
            **token_ids(tokenizer(), IMAGE_TOKENS),
            **self.changes,
        )

    @property
    def text_config(self) -> dict:
        return dict(TEXT)

    @property
    def vision_config(self) -> dict:
        return dict(VISION)

    def prepare_config_and_inputs_for_common(self):
        config = self.get_config()
        processor = PerceptionDLMProcessor.from_config(config, tokenizer())
        images = [Image.radial_gradient("L").resize((61, 47)) for _ in range(self.batch_size)]
        mask = Image.new("L", (61, 47))
        mask.paste(255, (5, 5, 30, 30))
        if self.with_regions:
            inputs = processor(images, masks=[[mask]] * self.batch_size, caption_length=4)
            inputs.pop("region_orders")
        elif self.with_images:
            inputs = processor([[image] for image in images], prompts=["What?"] * self.batch_size)
        else:
            inputs = processor(text=["Hello there"] * self.batch_size)
        return config, dict(inputs)


class RegionTester(Tester):
    with_regions = with_images = True


class AnyresTester(Tester):
    changes = {"image_layout": "anyres", "num_region_prompts": 0, "spatial_merge_size": 1}
    with_images = True


class TextTester(Tester):
    changes = {"num_region_prompts": 0}


class ModelCase(modeling.ModelTesterMixin):
    all_model_classes = (PerceptionDLMForConditionalGeneration,)
    # `generate` is this package's own, by diffusion: caches, beams and scores are not its
    all_generative_model_classes = ()
    _is_composite = True
    has_attentions = False
    kind = Tester

    def setUp(self):
        self.model_tester = self.kind(self)

    def _prepare_for_class(self, inputs_dict, model_class, return_labels=False):
        inputs = copy.deepcopy(inputs_dict)
        if return_labels:
            labels = torch.full_like(inputs["input_ids"], -100)
            labels[:, -3:] = inputs["input_ids"][:, -3:]
            inputs["labels"] = labels
            inputs["timesteps"] = torch.ones(len(labels))  # so that a loss can be had again
            inputs["noise"] = torch.zeros(labels.shape)
        return inputs


class RegionModel(ModelCase, unittest.TestCase):
    kind = RegionTester


class AnyresModel(ModelCase, unittest.TestCase):
    kind = AnyresTester


class TextModel(ModelCase, unittest.TestCase):
    kind = TextTester


class ImagesTester(imaging.ImageProcessingTester):
    """Images, and an image processor that tiles them."""

    def _get_image_processing_classes(self):
        return {"pil": PerceptionDLMImageProcessor}

    def prepare_image_processor_dict(self):
        return {"image_size": 32, "patch_size": 4, "max_tiles": 1}

    def expected_output_image_shape(self, images):
        return 3, 32, 32


class ImageProcessor(imaging.ImageProcessingTestMixin, unittest.TestCase):
    image_processor_tester_class = ImagesTester


class Processor(processing.ProcessorTesterMixin, unittest.TestCase):
    processor_class = PerceptionDLMProcessor
    # the images' tokens and the text's, which are never cut
    images_text_kwargs_max_length = 200
    images_text_kwargs_override_max_length = 180
    images_unstructured_max_length = 190
    chat_template_max_length = 300

    @classmethod
    def _setup_image_processor(cls):
        return PerceptionDLMImageProcessor(image_size=32, patch_size=4, max_tiles=1)

    @classmethod
    def _setup_tokenizer(cls):
        return tokenizer()

    def get_component(self, attribute, use_tiny_ckpt=True, **kwargs):
        """By class: the auto classes ask whether to run the code that the folder names."""
        kinds = {
            "image_processor": PerceptionDLMImageProcessor,
            "tokenizer": PreTrainedTokenizerFast,
        }
        return kinds[attribute].from_pretrained(self.tmpdirname, **kwargs)


CASES = (RegionModel, AnyresModel, TextModel, ImageProcessor, Processor)


def expect_the_listed_to_fail():
    for case in CASES:
        for place, name in listed():
            if place in ("*", case.__name__) and hasattr(case, name):
                setattr(case, name, unittest.expectedFailure(getattr(case, name)))


def test_every_listed_test_is_there():
    names = {case.__name__: set(dir(case)) for case in CASES}
    gone = [
        (place, name)
        for place, name in listed()
        if not any(name in own for key, own in names.items() if place in ("*", key))
    ]
    assert gone == []


expect_the_listed_to_fail()
