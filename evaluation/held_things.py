"""Draws held-out scenes of things to measure a checkpoint on, and scores what it said."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from ..scenes.language import Question
from ..scenes.thing_facts import ThingFacts
from ..scenes.thing_language import caption_of
from ..scenes.thing_questions import RegionQuestion, ask_about_region, ask_about_scene
from .thing_judge import JudgedThing, judge_captions, summarize

CLEAR_DIAMETER = 24  # pixels, from which on a thing is large enough to be named
CLEAR_HIDDEN = 0.5  # share of a thing's pixels that others may hide


@dataclass(frozen=True, eq=False)
class SeenThing:
    """A thing as a checkpoint is asked about it."""

    mask: np.ndarray  # (H, W) bool
    facts: ThingFacts
    caption: str  # one of many that are right
    diameter: float  # pixels
    hidden_share: float  # of its pixels on the image, by other things
    questions: list[RegionQuestion]  # one of each kind, in the order in which they are to be asked

    @property
    def is_clear(self) -> bool:
        """Tells whether it is large enough and free enough for its name to be asked in fairness."""
        return self.diameter >= CLEAR_DIAMETER and self.hidden_share <= CLEAR_HIDDEN


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


def render_things(seed: int, split: str, count: int | None = None) -> AskedThings:
    """Renders a scene of things; what is asked depends on the seed and the scene alone.

    `count` is how many things it has; None: as many as the seed draws.
    """
    from ..scenes.things import render_thing_scene  # needs what draws things

    scene = render_thing_scene(seed, split, count=count)
    rng, facts = np.random.default_rng(seed), [thing.facts for thing in scene.things]
    captions = [caption_of(rng, facts, k) for k in range(len(facts))]
    about_scene = ask_about_scene(rng, facts)
    objects = []
    for k, thing in enumerate(scene.things):
        questions = ask_about_region(rng, facts, k)
        order = rng.permutation(len(questions))
        objects.append(
            SeenThing(
                thing.mask,
                thing.facts,
                captions[k],
                thing.diameter,
                thing.hidden_share,
                [questions[i] for i in order],
            )
        )
    return AskedThings(scene.image, objects, about_scene)


def is_overlapping(things: Sequence[ThingFacts], k: int) -> bool:
    """Tells whether thing `k` lies on another or under it, hides another or is hidden itself.

    There a box tells no region apart from another.
    """
    own = things[k]
    others = (other for j, other in enumerate(things) if j != k)
    touches = any(k in (other.on, other.hidden_by) for other in others)
    return own.on is not None or own.hidden != "whole" or touches


def judge_things(
    scenes: Sequence[AskedThings], captions: Sequence[Sequence[str | None]]
) -> list[list[JudgedThing]]:
    """Judges the captions of scenes of things, as `judge_captions` does."""
    return judge_captions([scene.facts for scene in scenes], captions)


def score_things(scenes: Sequence[AskedThings], captions: Sequence[Sequence[str | None]]) -> dict:
    """Scores captions of scenes of things.

    Returns what `summarize` makes of all regions, and
        clear_name_accuracy: share of names right among `clear_regions`, those of things of at least
            `CLEAR_DIAMETER` of which others hide at most `CLEAR_HIDDEN`; None without such regions.
        overlapping, apart: what `summarize` makes of the regions that `is_overlapping`, and of the
            others.

    Raises ValueError for no region, and as `judge_captions`.
    """
    judged = list(itertools.chain.from_iterable(judge_things(scenes, captions)))
    if not judged:
        raise ValueError("expected at least one region, got none")
    is_clear = [thing.is_clear for scene in scenes for thing in scene.objects]
    overlaps = [
        is_overlapping(scene.facts, k) for scene in scenes for k in range(len(scene.objects))
    ]

    clear = summarize(list(itertools.compress(judged, is_clear)))
    return {
        **summarize(judged),
        "clear_name_accuracy": clear["name_accuracy"],
        "clear_regions": clear["regions"],
        "overlapping": summarize(list(itertools.compress(judged, overlaps))),
        "apart": summarize([one for one, over in zip(judged, overlaps, strict=True) if not over]),
    }
