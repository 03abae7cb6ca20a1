"""Declares the kinds of scenes that a checkpoint is measured on: how they are drawn and judged.

Every tool takes a `SceneKind` and asks nothing else about what scenes hold.
"""

import argparse
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..scenes.language import normalize
from ..scenes.shapes import MAX_OBJECTS, Scene, render_scene
from ..scenes.thing_arrangement import MAX_COUNT
from . import synthetic_judge, thing_judge
from .held_things import judge_things, render_things, score_things
from .thing_measures import ThingMeasures

SPLIT = "heldout"  # never trained on
COSTS = ("forwards_per_pass", "tokens_per_forward", "tokens_per_forward_effective")


@dataclass(frozen=True)
class SceneKind:
    """How scenes of one kind are drawn, and what is right to say of them.

    A scene has `image`, `objects` with `mask` and a true `caption` each, and `questions` about the
    whole image with their answers.
    """

    name: str  # as `--scene-kind` has it
    judge: str  # to be changed whenever what counts as right changes
    max_regions: int  # of a scene
    render: Callable  # (seed, split) to a scene
    render_crowded: Callable  # (scenes, regions) to that many held-out scenes with such a crowd
    score: Callable  # (scenes, captions of each) to accuracies by name
    mark: Callable  # (scene, its captions) to whether each is right, by what is looked at
    swept: tuple[str, ...]  # measurements in a row of the sweep
    more: type[ThingMeasures] | None = None  # what else `evaluate synthetic` measures


def _crowded_shapes(count: int, regions: int) -> list[Scene]:
    """Renders the first held-out scenes that have as many objects as a scene can."""
    scenes = (render_scene(seed, SPLIT) for seed in itertools.count())
    crowded = (scene for scene in scenes if len(scene.objects) == MAX_OBJECTS)
    return list(itertools.islice(crowded, count))


def _crowded_things(count: int, regions: int) -> list:
    """Renders held-out scenes of so many things."""
    return [render_things(seed, SPLIT, count=regions) for seed in range(count)]


def _mark_shapes(scene: Scene, texts: Sequence[str]) -> dict[str, list[bool]]:
    """Tells which captions are the one that is right."""
    truth = [thing.caption for thing in scene.objects]
    pairs = zip(texts, truth, strict=True)
    return {"captions": [normalize(text) == normalize(true) for text, true in pairs]}


def _mark_things(scene, texts: Sequence[str]) -> dict[str, list[bool]]:
    """Tells which captions are right in everything, and which name their thing."""
    (judged,) = judge_things([scene], [texts])
    return {
        "captions": [one.is_right for one in judged],
        "names": [one.name for one in judged],
    }


SHAPES = SceneKind(
    name="shapes",
    judge=synthetic_judge.JUDGE_VERSION,
    max_regions=MAX_OBJECTS,
    render=render_scene,
    render_crowded=_crowded_shapes,
    score=synthetic_judge.score_captions,
    mark=_mark_shapes,
    swept=(
        *COSTS,
        *("attribute_accuracy", "exact_caption_rate", "interference_rate"),
        *("question_accuracy", "seconds"),
    ),
)
THINGS = SceneKind(
    name="things",
    judge=thing_judge.JUDGE_VERSION,
    max_regions=MAX_COUNT,
    render=render_things,
    render_crowded=_crowded_things,
    score=score_things,
    mark=_mark_things,
    swept=(
        *COSTS,
        *("name_accuracy", "relation_accuracy", "grammatical", "mixture_rate"),
        *("attribute_accuracy", "exact_caption_rate", "question_accuracy", "seconds"),
    ),
    more=ThingMeasures,
)
KINDS = {kind.name: kind for kind in (SHAPES, THINGS)}


def add_kind_argument(parser: argparse.ArgumentParser):
    """Adds `--scene-kind`."""
    parser.add_argument(
        "--scene-kind", choices=tuple(KINDS), default=SHAPES.name, help="what the scenes hold"
    )
