"""Draws held-out scenes of things to measure a checkpoint on, and scores what it said."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image
from tqdm import tqdm

from ..scenes.language import Question
from ..scenes.thing_facts import ThingFacts
from ..scenes.thing_language import caption_of
from ..scenes.thing_questions import ask_about_scene
from .thing_judge import score_thing_captions

UNSEEN_STYLE = "unseen_style"


@dataclass(frozen=True, eq=False)
class SeenThing:
    """A thing as `describe_scenes` takes it."""

    mask: np.ndarray  # (H, W) bool
    facts: ThingFacts
    caption: str  # one of many that are right


@dataclass(frozen=True, eq=False)
class AskedThings:
    """A scene of things with questions about the whole, in the form of a scene of shapes."""

    image: Image.Image
    objects: list[SeenThing]
    questions: list[Question]

    @property
    def facts(self) -> list[ThingFacts]:
        """Returns what is true of its things."""
        return [thing.facts for thing in self.objects]


def held_out_things(
    first_seed: int, count: int, split: str = "heldout", *, progress: bool = True
) -> list[AskedThings]:
    """Renders scenes of things of `count` seeds from `first_seed` on, and draws their questions."""
    if count < 1:
        raise ValueError(f"expected scenes of 1 or more, got {count}")
    seeds = range(first_seed, first_seed + count)
    return [_asked(seed, split) for seed in tqdm(seeds, desc="render", disable=not progress)]


def _asked(seed: int, split: str) -> AskedThings:
    """Renders a scene; what is asked depends on the seed alone."""
    from ..scenes.things import render_thing_scene  # needs what draws things

    scene, rng = render_thing_scene(seed, split), np.random.default_rng(seed)
    facts = [thing.facts for thing in scene.things]
    objects = [
        SeenThing(thing.mask, thing.facts, caption_of(rng, facts, k))
        for k, thing in enumerate(scene.things)
    ]
    return AskedThings(scene.image, objects, ask_about_scene(rng, facts))


def score_things(scenes: Sequence[AskedThings], captions: Sequence[Sequence[str | None]]) -> dict:
    """Scores captions of scenes of things, as `score_thing_captions` does."""
    return score_thing_captions([scene.facts for scene in scenes], captions)
