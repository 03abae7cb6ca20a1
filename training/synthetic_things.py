"""Makes training samples of scenes of things: captions, labels, and questions about each region."""

import operator
from collections.abc import Callable
from typing import Any

import numpy as np

from ..scenes.thing_facts import ThingFacts
from ..scenes.thing_language import LABEL_INSTRUCTION, caption_of, label_of
from ..scenes.thing_questions import ask_about_region, ask_about_scene
from ..scenes.things import render_thing_scene
from .samples import Sample
from .synthetic import CAPTIONS, EncodedScene, SceneDataset, draw_questions, encode_image

LABELS, ANSWERS = "labels", "answers"  # forms of a sample, beside captions and questions
DRAWS = 20  # of a text that may be longer than its slots
CAPTION_SLOT_SHARE = 0.15  # of the labels and answers are padded as captions are


class EncodedThings(EncodedScene):
    """A scene of things; its `regions` are indices of its `objects`, which are `ThingFacts`."""

    regions: list[int]
    objects: list[ThingFacts]


def encode_things(image_processor, seed: int, split: str) -> EncodedThings:
    """Renders a scene of things and prepares its pixels and its masks."""
    scene = render_thing_scene(seed, split)
    pixels, features, order = encode_image(image_processor, scene.image, scene.things)
    return EncodedThings(pixels, features, order, [thing.facts for thing in scene.things])


class ThingDataset(SceneDataset):
    """Samples of scenes of things, in the forms of which the recipe has shares."""

    encode = staticmethod(encode_things)

    def __init__(self, processor, data, **options):
        if data.region_question_share and processor.region_layout != "independent":
            raise ValueError(
                "expected data.region_question_share of 0 but in the independent layout, got"
                f" {data.region_question_share} in {processor.region_layout!r}"
            )
        super().__init__(processor, data, **options)

    def _ask(self, rng: np.random.Generator, scene: EncodedThings):
        return draw_questions(
            rng, scene.objects, self.data.questions_per_sample, ask=ask_about_scene
        )

    def _draw_region_form(self, rng: np.random.Generator, epoch: int) -> tuple[str, int]:
        data = self.data
        drawn = rng.random()
        label_share = data.label_share
        if epoch == 0 and self.split != "heldout" and data.first_label_share is not None:
            label_share = data.first_label_share
        if drawn < label_share:
            return LABELS, self._draw_slots(rng, data.label_length)
        if drawn < label_share + data.region_question_share:
            return ANSWERS, self._draw_slots(rng, data.region_answer_length)
        return CAPTIONS, data.caption_length

    def _draw_slots(self, rng: np.random.Generator, length: int | None) -> int:
        """Draws the slots of a shorter form: its own, at times those of captions."""
        if length is None or rng.random() < CAPTION_SLOT_SHARE:
            return self.data.caption_length
        return length

    def _regions(self, rng, scene: EncodedThings, key, form: str, slots: int) -> Sample:
        """Makes a sample of captions, of labels, or of answers to a question for each region."""
        regions, prompts, features = self._draw_regions(rng, scene)
        things, order = scene.objects, [scene.regions[k] for k in regions]

        if form == LABELS:
            texts = [self._fitting(lambda k=k: label_of(rng, things[k]), slots) for k in order]
            return self._answered(features, texts, slots, prompts, key, LABEL_INSTRUCTION)
        if form == ANSWERS:
            ask, answer = self._region_question, operator.attrgetter("answer")
            asked = {
                k: self._fitting(lambda k=k: ask(rng, things, k, order), slots, answer)
                for k in order
            }
            texts = [asked[k].answer for k in order]
            questions = {k: question.question for k, question in asked.items()}
            return self._answered(features, texts, slots, prompts, key, questions, order)
        texts = [self._fitting(lambda k=k: caption_of(rng, things, k), slots) for k in order]
        return self._answered(features, texts, slots, prompts, key)

    def _fitting(self, draw: Callable[[], Any], slots: int, text_of: Callable[[Any], str] = str):
        """Draws again and again until a text fits into its slots.

        Raises ValueError where that takes more than `DRAWS` times.
        """
        for _ in range(DRAWS):
            drawn = draw()
            ids = self.processor.tokenizer(text_of(drawn), add_special_tokens=False)["input_ids"]
            if len(ids) <= slots:
                return drawn
        raise ValueError(
            f"expected texts of at most {slots} tokens, as data.caption_length, label_length and"
            f" region_answer_length say, got {len(ids)}: {text_of(drawn)!r}"
        )

    def _region_question(self, rng, things: list[ThingFacts], k: int, order: list[int]):
        """Draws a question about a region that names no region that is not in the sample."""
        questions = [
            question
            for question in ask_about_region(rng, things, k)
            if question.other is None or question.other in order
        ]
        return questions[rng.integers(len(questions))]
