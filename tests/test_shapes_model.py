"""What the fixed model of shapes says of its scenes, loaded from the root with remote code.

The captions and answers were compared with the images by eye, or with what the scene is drawn of.
"""

import pytest
from perceptiondlm.scenes.shapes import render_scene
from PIL import Image
from shapes import ROOT, SCENE, SCENE_MASKS, SHAPES, shapes_captioner
from transformers import AutoModel

CAPTIONS = [
    "a large dotted blue star at the top left",
    "a large dotted black circle at the bottom right",
]


@pytest.fixture(scope="module")
def model():
    """Loads it as the README does; the processor is found beside it."""
    return AutoModel.from_pretrained(ROOT, subfolder=SHAPES, trust_remote_code=True, dtype="auto")


@pytest.fixture(scope="module")
def pictured():
    return Image.open(SCENE), [Image.open(path) for path in SCENE_MASKS]


def test_it_captions_both_regions_at_once_in_as_many_tokens_as_it_prefers(model, pictured):
    out = model.diffusion_generate(*pictured)
    assert out.texts == [CAPTIONS]
    # 11 tokens a caption, as its generation_config.json says, of two regions
    assert (out.num_forwards, out.tokens_per_forward) == (11, 2.0)


def test_it_counts_in_as_many_tokens_as_it_prefers(model, pictured):
    out = model.diffusion_generate(pictured[0], prompts="How many objects are there?")
    assert out.texts == [["three"]] and out.num_forwards == 2


def test_it_chooses_sizes_in_a_template_and_the_region_of_a_caption(model, pictured):
    seen = model.see(*pictured)
    out = model.diffusion_generate(seen, template="a {size:large|small} {1-3}")
    assert [fields["size"] for fields in out.fields[0]] == ["large", "large"]
    (scores,) = model.diffusion_score(seen, texts=CAPTIONS[1], method="one_pass")
    assert scores[1] > scores[0]


def test_it_is_right_about_a_scene_that_it_has_not_seen():
    scene = render_scene(55, "heldout")  # the one of the first notebook
    captioner = shapes_captioner()
    masks = [thing.mask for thing in scene.objects]
    assert captioner(scene.image, masks).captions == [thing.caption for thing in scene.objects]
    asked = captioner.ask(scene.image, "What colour is the object at the center?")
    assert asked.answers == ["green"]
