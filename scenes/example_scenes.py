"""Gives scenes to show a model on, with what is right to say of them; drawing needs no extra.

    shapes   drawn when they are asked for, of any seed
    things   those of `thing_examples`, which are kept as files

The demo, the web page and the documents' figures show scenes of `EMBEDDED_KIND`.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from .language import VOCABULARY, Question
from .language import caption_of as caption_of_shape
from .shapes import render_scene
from .thing_examples import NAMES, open_thing_example
from .thing_facts import ThingFacts
from .thing_grammar import PLACES, SIZES
from .thing_language import caption_of
from .thing_questions import QUESTIONS, RegionQuestion, ask_about_scene, region_question

EMBEDDED_KIND = "things"  # of `EXAMPLE_KINDS`: what the embedded checkpoint in `tiny/` knows


@dataclass(frozen=True, eq=False)
class ExampleObject:
    """A region of a scene, and what is right to say of it."""

    mask: np.ndarray  # (H, W) bool
    caption: str  # one that is right
    fields: dict[str, str]  # of the scene's template
    question: RegionQuestion | None  # about it alone; None where the kind of scene has none


@dataclass(frozen=True, eq=False)
class ExampleScene:
    """An image, its regions, questions about the whole, and a template for captions."""

    image: Image.Image  # RGB
    objects: list[ExampleObject]  # from back to front
    questions: list[Question]
    template: str


@dataclass(frozen=True)
class ExampleKind:
    """One kind of scenes.

    Attributes:
        open: takes a seed; raises ValueError for one of which there is no scene.
        shown: seeds of scenes to choose from, the first of which stands for all.
        answer_length: tokens of the answer to a question about a region.
    """

    open: Callable[[int], ExampleScene]
    shown: tuple[int, ...]
    answer_length: int | None = None


# Shapes.

# The sentence of `language.caption_of`, with a field for each attribute.
SHAPE_TEMPLATE = caption_of_shape(
    {name: f"{{{name}:{'|'.join(values)}}}" for name, values in VOCABULARY.items()}
)
SHAPE_FIELDS = re.findall(r"{(\w+):", SHAPE_TEMPLATE)  # in the sentence's order


def _open_shapes(seed: int) -> ExampleScene:
    scene, objects = render_scene(seed, "heldout"), []
    for thing in scene.objects:
        fields = {name: thing.attributes[name] for name in SHAPE_FIELDS}
        objects.append(ExampleObject(thing.mask, thing.caption, fields, None))
    return ExampleScene(scene.image, objects, scene.questions, SHAPE_TEMPLATE)


# Things.

# Each place as captions word it first.
THING_TEMPLATE = (
    f"The image shows a {{size:{'|'.join(SIZES)}}} {{name:1-3}}"
    f" {{place:{'|'.join(words[0] for words in PLACES.values())}}}."
)
# Kinds of questions: the first region is asked the first that can be asked, the next goes on.
ASKED = ("what", "in_front_of", "larger", "hidden", "alive", "edible", "side", "vehicle")
assert set(ASKED) == set(QUESTIONS)


def _open_things(seed: int) -> ExampleScene:
    scene, rng = open_thing_example(seed), np.random.default_rng(seed)
    facts = [thing.facts for thing in scene.things]
    objects = []
    for k, thing in enumerate(scene.things):
        own = thing.facts
        fields = {"size": own.size, "name": own.concept, "place": PLACES[own.position][0]}
        question = _question(rng, facts, k)
        objects.append(ExampleObject(thing.mask, caption_of(rng, facts, k), fields, question))
    return ExampleScene(scene.image, objects, ask_about_scene(rng, facts), THING_TEMPLATE)


def _question(rng: np.random.Generator, things: Sequence[ThingFacts], k: int) -> RegionQuestion:
    """Draws the question about thing `k`; each is of another kind, as far as kinds go."""
    kinds = ASKED[k % len(ASKED) :] + ASKED[: k % len(ASKED)]
    drawn = (region_question(rng, things, k, kind) for kind in kinds)
    return next(question for question in drawn if question is not None)


EXAMPLE_KINDS = {
    "shapes": ExampleKind(_open_shapes, shown=(7, 11, 23, 42)),
    "things": ExampleKind(_open_things, shown=tuple(NAMES), answer_length=18),
}


def open_example(kind: str = EMBEDDED_KIND, seed: int | None = None) -> ExampleScene:
    """Opens a held-out scene; the first that is shown without a seed.

    Raises ValueError for another kind than those of `EXAMPLE_KINDS`, or a seed without a scene.
    """
    if kind not in EXAMPLE_KINDS:
        raise ValueError(f"expected a kind of scenes out of {tuple(EXAMPLE_KINDS)}, got {kind!r}")
    chosen = EXAMPLE_KINDS[kind]
    return chosen.open(chosen.shown[0] if seed is None else seed)
