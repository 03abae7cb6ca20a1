"""Measures on scenes of things what captions alone do not show.

labels              "Name each region.", on the scenes that were captioned
region_questions    a question of its own for each region, on the same scenes
unseen_style        captions of scenes in a drawing style that was never trained on
unseen_background   captions of scenes on photographs that were never trained on
counts              names in captions of scenes with 1 to 24 things
"""

import argparse
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from tqdm import tqdm

from ..scenes.thing_language import LABEL_INSTRUCTION
from ..scenes.thing_questions import RegionQuestion
from .asking import AskedRegions, Asker
from .held_things import AskedThings, is_overlapping, render_things, score_things
from .thing_judge import label_is_right, score_labels, score_region_answers, share

UNSEEN = ("unseen_style", "unseen_background")  # splits of `scenes.things`
PARTS = ("labels", "region_questions", *UNSEEN, "counts")
COUNTS = (1, 2, 4, 8, 16, 24)  # things of a scene


def _positive(text: str) -> int:
    """Reads a whole number of 1 or more."""
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of 1 or more, got {text!r}")
    return value


def _parts(text: str) -> tuple[str, ...]:
    """Reads names of `PARTS`, comma-separated."""
    parts = tuple(part.strip() for part in text.split(","))
    if unknown := [part for part in parts if part not in PARTS]:
        known = ", ".join(PARTS)
        raise argparse.ArgumentTypeError(f"expected parts out of {known}, got {unknown}")
    return parts


def _option(default, read, text: str):
    return dataclasses.field(default=default, metadata={"read": read, "text": text})


@dataclass(frozen=True)
class ThingMeasures:
    """Says how much is measured besides captions; each field is an option of the command."""

    label_length: int = _option(8, _positive, "tokens of a region's label")
    answer_length: int = _option(18, _positive, "tokens of the answer to a region's question")
    unseen_scenes: int | None = _option(
        None, _positive, "scenes of each unseen split (default: as --scenes)"
    )
    count_scenes: int = _option(20, _positive, "scenes with each number of things")
    skip: tuple[str, ...] = _option((), _parts, f"leave out some of {','.join(PARTS)}")

    @classmethod
    def add_arguments(cls, parser: argparse.ArgumentParser):
        """Adds an option for each field; none is given by default."""
        group = parser.add_argument_group("scenes of things alone")
        for field in dataclasses.fields(cls):
            text = field.metadata["text"]
            if isinstance(field.default, int):
                text += f" (default: {field.default})"
            name = f"--{field.name.replace('_', '-')}"
            group.add_argument(name, type=field.metadata["read"], help=text)

    @classmethod
    def given(cls, args: argparse.Namespace) -> dict:
        """Returns the options that were given."""
        names = [field.name for field in dataclasses.fields(cls)]
        return {name: getattr(args, name) for name in names if getattr(args, name) is not None}

    def measure(
        self, asker: Asker, scenes: Sequence[AskedThings], first_seed: int
    ) -> tuple[dict, list[dict]]:
        """Measures every part that is not left out.

        Args:
            asker: asks the checkpoint.
            scenes: held-out scenes, which labels and questions are about.
            first_seed: of the other scenes.

        Returns the measurements, and what was said of each of `scenes`.
        """
        measured: dict = {}
        texts: list[dict] = [{} for _ in scenes]
        if "labels" not in self.skip:
            measured |= self._labels(asker, scenes, texts)
        if "region_questions" not in self.skip:
            measured |= self._region_questions(asker, scenes, texts)
        for split in UNSEEN:
            if split not in self.skip:
                seeds = range(first_seed, first_seed + (self.unseen_scenes or len(scenes)))
                measured |= _of_split(split, _captioned(asker, split, seeds))
        if "counts" not in self.skip:
            seeds = range(first_seed, first_seed + self.count_scenes)
            measured["names_by_count"] = {
                str(count): _names(_captioned(asker, "heldout", seeds, count)) for count in COUNTS
            }
        return measured, texts

    def _labels(self, asker: Asker, scenes: Sequence[AskedThings], texts: list[dict]) -> dict:
        """Asks for the name of each region."""
        groups = [
            dataclasses.replace(group, prompts=LABEL_INSTRUCTION) for group in asker.groups(scenes)
        ]
        labels, cost = asker.ask_regions(scenes, groups, length=self.label_length, title="label")
        for own, scene, said in zip(texts, scenes, labels, strict=True):
            names = [thing.facts.concept for thing in scene.objects]
            own["labels"] = [
                {"truth": name, "label": text} for name, text in zip(names, said, strict=True)
            ]
        return _score_labels(scenes, labels) | {"labeling": cost.to_json()}

    def _region_questions(
        self, asker: Asker, scenes: Sequence[AskedThings], texts: list[dict]
    ) -> dict:
        """Asks each region a question of its own."""
        groups = list(asker.groups(scenes, asker.max_named_regions))
        asked: list[list[RegionQuestion]] = [[] for _ in scenes]
        with_prompts = []
        for group in groups:
            questions = [question_for(scenes[group.scene], k, group.regions) for k in group.regions]
            asked[group.scene] += questions
            prompts = [_in_group(question, group.regions) for question in questions]
            with_prompts.append(AskedRegions(group.scene, group.regions, prompts))

        answers, cost = asker.ask_regions(
            scenes, with_prompts, length=self.answer_length, title="answer regions"
        )
        for own, questions, said in zip(texts, asked, answers, strict=True):
            own["region_answers"] = [
                {"question": question.question, "truth": question.answer, "answer": text}
                for question, text in zip(questions, said, strict=True)
            ]
        return score_region_answers(asked, answers) | {"region_answering": cost.to_json()}


def _score_labels(scenes: Sequence[AskedThings], labels: Sequence[Sequence[str]]) -> dict:
    """Scores the labels of all things; then of those where boxes do not tell regions apart."""
    facts = [scene.facts for scene in scenes]
    scores = score_labels(facts, labels)
    for name, wanted in (("overlapping", True), ("apart", False)):
        marks = [
            label_is_right(text, things[k])
            for things, said in zip(facts, labels, strict=True)
            for k, text in enumerate(said)
            if is_overlapping(things, k) == wanted
        ]
        scores[f"{name}_label_accuracy"] = share(marks) if marks else None
    return scores


def question_for(scene: AskedThings, k: int, regions: Sequence[int]) -> RegionQuestion:
    """Returns the first question about thing `k` that names no region beyond a group's.

    In a scene that is one group that is the seed's first.
    """
    questions = scene.objects[k].questions
    return next(one for one in questions if one.other is None or one.other in regions)


def _in_group(question: RegionQuestion, regions: Sequence[int]) -> str:
    """Words a question that names a region by its place among the group's."""
    if question.other is None:
        return question.question
    place = list(regions).index(question.other)
    return question.question.replace(f"<region {question.other}>", f"<region {place}>")


def _captioned(asker: Asker, split: str, seeds: range, count: int | None = None) -> dict:
    """Scores the captions of other scenes."""
    title = split if count is None else f"{count} things"
    bar = tqdm(seeds, desc=f"render {title}", disable=not asker.progress)
    scenes = [render_things(seed, split, count) for seed in bar]
    groups = list(asker.groups(scenes))
    return score_things(scenes, asker.ask_regions(scenes, groups, title=title)[0])


def _of_split(split: str, scores: dict) -> dict:
    """Returns what is reported of an unseen split: its names, and all scores under its name."""
    names = ("name_accuracy", "clear_name_accuracy")
    return {**{f"{split}_{name}": scores[name] for name in names}, split: scores}


def _names(scores: dict) -> dict:
    return {name: scores[name] for name in ("name_accuracy", "regions")}
