"""Makes training samples of scenes of things: captions, labels, and questions about each region."""

from collections.abc import Callable

import numpy as np

from ..processing_sequence import encode_text
from ..scenes.concepts import CONCEPTS
from ..scenes.thing_facts import ThingFacts
from ..scenes.thing_language import LABEL_INSTRUCTION, caption_of, label_of
from ..scenes.thing_questions import NUMBERS, RegionQuestion, ask_about_region, ask_about_scene
from ..scenes.things import render_thing_scene
from .samples import Sample
from .synthetic import CAPTIONS, EncodedScene, SceneDataset, draw_questions, encode_image

LABELS, ANSWERS = "labels", "answers"  # forms of a sample, beside captions and questions
DRAWS = 20  # of a text that may be longer than its slots
NAMES = [concept.name for concept in CONCEPTS]
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


def _expect_room(tokenizer, option: str, slots: int, texts: list[str]):
    """Refuses slots, as an option of the data says, for which one of some texts is too long."""
    counts = [len(encode_text(tokenizer, text)) for text in texts]
    if max(counts) > slots:
        longest = texts[counts.index(max(counts))]
        raise ValueError(
            f"expected data.{option} of {max(counts)} or more, for {longest!r}, got {slots}"
        )


class ThingDataset(SceneDataset):
    """Samples of scenes of things, in the forms of which the recipe has shares."""

    encode = staticmethod(encode_things)

    def __init__(self, processor, data, *, split: str = "train", **options):
        if data.region_question_share and processor.region_layout != "independent":
            raise ValueError(
                "expected data.region_question_share of 0 but in the independent layout, got"
                f" {data.region_question_share} in {processor.region_layout!r}"
            )
        # of the first epoch, and of the others
        first = None if split == "heldout" else data.first_label_share
        self.label_shares = (data.label_share if first is None else first, data.label_share)

        # Before scenes are rendered: a run does not end hours later for a long name.
        if any(self.label_shares):
            length = data.label_length or data.caption_length
            _expect_room(processor.tokenizer, "label_length", length, NAMES)
        shares = (data.region_share, data.first_region_share)
        if any(share is not None and share < 1 for share in shares):
            answers = [*NAMES, *NUMBERS, "yes", "no"]
            _expect_room(processor.tokenizer, "max_new_tokens", data.max_new_tokens, answers)
        super().__init__(processor, data, split=split, **options)

    def _ask(self, rng: np.random.Generator, scene: EncodedThings):
        return draw_questions(
            rng, scene.objects, self.data.questions_per_sample, ask=ask_about_scene
        )

    def _draw_region_form(self, rng: np.random.Generator, epoch: int) -> tuple[str, int]:
        data, drawn = self.data, rng.random()
        label_share = self.label_shares[min(epoch, 1)]
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
            texts = [self._fitting(slots, label_of, rng, things[k]) for k in order]
            return self._answered(features, texts, slots, prompts, key, LABEL_INSTRUCTION)
        if form == ANSWERS:
            ask = self._region_question
            asked = {k: self._fitting(slots, ask, rng, things, k, order) for k in order}
            texts = [asked[k].answer for k in order]
            questions = {k: question.question for k, question in asked.items()}
            return self._answered(features, texts, slots, prompts, key, questions, order)
        texts = [self._fitting(slots, caption_of, rng, things, k) for k in order]
        return self._answered(features, texts, slots, prompts, key)

    def _fitting(self, slots: int, draw: Callable, *about):
        """Draws a text, or a question, about something until its tokens fit into the slots.

        Raises ValueError where that takes more than `DRAWS` times.
        """
        for _ in range(DRAWS):
            drawn = draw(*about)
            text = drawn.answer if isinstance(drawn, RegionQuestion) else drawn
            count = len(encode_text(self.processor.tokenizer, text))
            if count <= slots:
                return drawn
        raise ValueError(
            f"expected texts of at most {slots} tokens, as data.caption_length, label_length and"
            f" region_answer_length say, got {count}: {text!r}"
        )

    def _region_question(self, rng, things: list[ThingFacts], k: int, order: list[int]):
        """Draws a question about a region that names no region that is not in the sample."""
        questions = [
            question
            for question in ask_about_region(rng, things, k)
            if question.other is None or question.other in order
        ]
        return questions[rng.integers(len(questions))]
