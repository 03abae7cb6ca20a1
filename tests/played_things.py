"""Scenes of things without any drawing of a set, and a model that knows them by heart."""

import re
from types import SimpleNamespace

import numpy as np
import torch
from perceptiondlm.generation_options import DiffusionOptions
from perceptiondlm.scenes import things
from perceptiondlm.scenes.backgrounds import SEEN_PHOTOGRAPHS, UNSEEN_PHOTOGRAPHS
from perceptiondlm.scenes.concepts import CONCEPTS
from perceptiondlm.scenes.emoji_sets import SETS, SPRITE_SIDE, Atlas
from perceptiondlm.scenes.thing_language import LABEL_INSTRUCTION, caption_of
from perceptiondlm.scenes.thing_questions import QUESTIONS, answers_to
from PIL import Image

END = 7


def played_sources() -> things.Sources:
    """Gives every concept a disc in every set, and gray photographs."""
    y, x = np.mgrid[:SPRITE_SIDE, :SPRITE_SIDE] + 0.5
    inside = np.hypot(x - SPRITE_SIDE / 2, y - SPRITE_SIDE / 2) <= SPRITE_SIDE / 2
    disc = np.full((SPRITE_SIDE, SPRITE_SIDE, 4), 200, np.uint8)
    disc[..., 3] = 255 * inside
    sprites = {concept.name: disc for concept in CONCEPTS}
    gray = Image.new("RGB", (300, 200), (90, 90, 90))
    names = (*SEEN_PHOTOGRAPHS, *UNSEEN_PHOTOGRAPHS)
    return things.Sources({name: Atlas(name, sprites) for name in SETS}, dict.fromkeys(names, gray))


class KnowingModel:
    """Knows every scene that was rendered, and says what is right about it.

    Attributes:
        knows: whether it knows a thing; of others it says nothing at all.
        calls: what it was asked.
    """

    device, dtype = torch.device("cpu"), torch.float32
    decoding_defaults = {}

    def __init__(self, layout: str = "independent", max_regions: int = 3):
        self.config = SimpleNamespace(
            eot_token_id=END,
            eos_token_id=None,
            num_region_prompts=max_regions,
            region_layout=layout,
            roi_output_size=2,
        )
        self.calls = []
        self.scenes = {}
        self.knows = lambda thing: True

    def named_parameters(self):
        return [("weight", torch.arange(3.0))]

    def rendered(self, *arguments, **options) -> things.ThingScene:
        """Renders a scene, and remembers it."""
        scene = self.render(*arguments, **options)
        self.scenes[scene.image.tobytes()] = scene
        return scene

    def diffusion_generate(self, *, images, processor, masks=None, prompts=None, **options):
        DiffusionOptions(**options)
        if not isinstance(images, list):
            images, masks = [images], [masks]
        self.calls.append({"masks": masks, "prompts": prompts, **options})
        if masks is None:
            texts = [["no"] for _ in images]
        else:
            asked = prompts or [None] * len(images)
            texts = [self.say(*one) for one in zip(images, masks, asked, strict=True)]
        ids = [[[1] * 4 + [END] * 2 for _ in row] for row in texts]
        groups = sum(-(-len(row) // self.config.num_region_prompts) for row in texts)
        forwards = groups * (options.get("steps") or 6)
        return SimpleNamespace(texts=texts, token_ids=ids, num_forwards=forwards)

    def say(self, image, masks, prompts) -> list[str]:
        """Says what is asked of each region."""
        seen = self.scenes[image.tobytes()].things
        facts = [thing.facts for thing in seen]
        numbers = [
            next(k for k, thing in enumerate(seen) if np.array_equal(thing.mask, mask))
            for mask in masks
        ]
        rng = np.random.default_rng(0)
        texts = []
        for place, k in enumerate(numbers):
            if not self.knows(seen[k]):
                texts.append("")
            elif prompts is None:
                texts.append(caption_of(rng, facts, k))
            elif prompts == LABEL_INSTRUCTION:
                texts.append(facts[k].concept)
            else:
                kind, other = kind_of(prompts[place])
                other = None if other is None else numbers[other]
                texts.append(answers_to(facts, k, kind, other)[0])
        return texts


def kind_of(question: str) -> tuple[str, int | None]:
    """Finds the kind of a question about a region, and the number of the region that it names."""
    named = re.search(r"<region (\d+)>", question)
    wording = question.replace(named[1], "{j}") if named else question
    kind = next(kind for kind, wordings in QUESTIONS.items() if wording in wordings)
    return kind, int(named[1]) if named else None
