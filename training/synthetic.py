"""Makes training samples of synthetic scenes: region captions, or questions and answers."""

import multiprocessing
import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset
from tqdm import tqdm

from ..image_processing_perceptiondlm import normalize
from ..processing_perceptiondlm import PerceptionDLMProcessor
from ..scenes.language import Question, ask, caption_of
from ..scenes.shapes import render_scene
from .recipe_sections import SyntheticData
from .samples import (
    CONTENT_STREAM,
    Sample,
    choose_regions,
    draw_prompts,
    generator_of,
    share_trunk,
)

QUESTION_LENGTH = 16  # tokens, roughly
QUESTION_ROUNDS = 8
CAPTIONS, QUESTIONS = "captions", "questions"  # forms of a sample


@dataclass
class EncodedScene:
    """A scene as the image processor gives it, pixels as bytes, and its objects."""

    pixels: np.ndarray  # (T, 3, S, S) uint8
    features: dict[str, np.ndarray]
    regions: list[dict[str, str]]  # attributes of the objects of the first region group, by area
    objects: list[dict[str, str]]  # of all

    def tensors(self) -> dict[str, torch.Tensor]:
        """Returns the image processor's tensors."""
        values = normalize(torch.from_numpy(self.pixels))
        rest = {name: torch.from_numpy(value) for name, value in self.features.items()}
        return {"pixel_values": values, **rest}


def encode_scene(image_processor, seed: int, split: str) -> EncodedScene:
    """Renders a scene and prepares its pixels and, for a model with region prompts, its masks."""
    scene = render_scene(seed, split)
    attributes = [thing.attributes for thing in scene.objects]
    pixels, features, order = encode_image(image_processor, scene.image, scene.objects)
    return EncodedScene(pixels, features, [attributes[k] for k in order], attributes)


def encode_image(image_processor, image: Image.Image, objects: Sequence) -> tuple:
    """Prepares the pixels of a scene and, for a model with region prompts, its objects' masks.

    Returns pixels as bytes, the other features, and the objects of the first region group by area,
    as indices.
    """
    captioned = objects[: image_processor.num_region_prompts]
    masks = [[thing.mask for thing in captioned]] if captioned else None
    # Training keeps bytes, which take a quarter of the memory of float32.
    features = image_processor([image], masks, do_normalize=False)
    order = features.pop("region_orders", [[]])[0]

    pixels = features.pop("pixel_values").numpy()
    arrays = {name: value.numpy() for name, value in features.items()}
    return pixels, arrays, [int(k) for k in order]


def draw_questions(
    rng: np.random.Generator, objects: list, max_questions: int, ask: Callable = ask
) -> list[Question]:
    """Draws up to `max_questions` different questions about objects given by what is true of them.

    Asked in rounds of at most one question of each kind: kinds with few different questions, such
    as "how many objects", come less often.
    """
    drawn: dict[str, Question] = {}
    for _ in range(QUESTION_ROUNDS):
        asked = ask(rng, objects)
        for i in rng.permutation(len(asked)):
            drawn.setdefault(asked[i].question, asked[i])
        if len(drawn) >= max_questions:
            break
    return list(drawn.values())[:max_questions]


class SceneDataset(Dataset):
    """Samples of scenes; an index counts on over epochs (`epoch * len(self) + i`)."""

    encode = staticmethod(encode_scene)

    def __init__(
        self,
        processor: PerceptionDLMProcessor,
        data: SyntheticData,
        *,
        seed: int = 0,
        split: str = "train",
        permute_prompts: bool = True,
    ):
        if data.questions_per_sample > 1 and processor.region_layout != "independent":
            raise ValueError(
                "expected data.questions_per_sample of 1 but in the independent layout, got"
                f" {data.questions_per_sample} in {processor.region_layout!r}"
            )

        held_out = split == "heldout"
        first_share = None if held_out else data.first_region_share
        # of the first epoch, and of the others
        self.region_shares = (
            data.region_share if first_share is None else first_share,
            data.region_share,
        )
        if any(self.region_shares) and not processor.image_processor.num_region_prompts:
            raise ValueError(
                "expected data.region_share and data.first_region_share of 0 for a model without"
                f" region prompts, got {self.region_shares[1]} and {self.region_shares[0]}"
            )

        self.processor = processor
        self.data = data
        self.seed = seed
        self.split = split
        self.count = data.eval_scenes if held_out else data.scenes
        self.sets = 1 if held_out else data.scene_sets
        self.first_seed = data.eval_first_seed if held_out else data.first_seed
        self.permute_prompts = permute_prompts
        self.cached: list[EncodedScene] | None = None
        if data.cache:
            self.cached = self._encode_all()

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Sample:
        epoch, i = divmod(index, self.count)
        rng, form, slots = self._draw_form(epoch, i)
        scene = self._scene(epoch, i)
        if form == QUESTIONS:
            return self._questions(rng, scene, (epoch, i))
        return self._regions(rng, scene, (epoch, i), form, slots)

    def length(self, index: int) -> int:
        """Estimates how long a sample is, without making it."""
        epoch, i = divmod(index, self.count)
        _, form, slots = self._draw_form(epoch, i)
        image, regions = 0, 4
        if self.cached is not None:
            scene = self._scene(epoch, i)
            image = len(scene.pixels) * self.processor.image_processor.cells_per_side**2
            regions = min(len(scene.regions), self._max_regions)

        if form == QUESTIONS:
            return image + self.data.questions_per_sample * (QUESTION_LENGTH + slots)
        return image + regions * (self.processor.roi_output_size**2 + 1 + slots)

    def _draw_form(self, epoch: int, i: int) -> tuple[np.random.Generator, str, int]:
        """Draws the form of a sample and the slots of each of its responses.

        Returns the generator that the sample's content is to be drawn from, and both.
        """
        rng = generator_of(self.seed, CONTENT_STREAM, epoch, i)
        if rng.random() < self.region_shares[min(epoch, 1)]:
            return rng, *self._draw_region_form(rng, epoch)
        return rng, QUESTIONS, self.data.max_new_tokens

    def _draw_region_form(self, rng: np.random.Generator, epoch: int) -> tuple[str, int]:
        """Draws the form of a sample about regions, and the slots of each response."""
        return CAPTIONS, self.data.caption_length

    @property
    def _max_regions(self) -> int:
        prompts = self.processor.image_processor.num_region_prompts
        return min(self.data.regions_per_sample or prompts, prompts)

    def _scene(self, epoch: int, i: int) -> EncodedScene:
        """Returns the scene of a sample, from the cache or rendered now."""
        number = (epoch if self.data.fresh else epoch % self.sets) * self.count + i
        if self.cached is not None:
            return self.cached[number]
        return self.encode(self.processor.image_processor, self.first_seed + number, self.split)

    def _ask(self, rng: np.random.Generator, scene: EncodedScene) -> list[Question]:
        """Draws the questions of a sample."""
        return draw_questions(rng, scene.objects, self.data.questions_per_sample)

    def _encode_all(self) -> list[EncodedScene]:
        """Renders the scenes of all sets in several processes."""
        image_processor = self.processor.image_processor
        numbers = range(self.count * self.sets)
        jobs = [
            (self.encode, image_processor, self.first_seed + number, self.split)
            for number in numbers
        ]
        workers = self.data.cache_workers
        with multiprocessing.get_context("fork").Pool(workers, _ignore_interrupts) as pool:
            encoded = pool.imap(_encode_job, jobs, chunksize=64)
            return list(tqdm(encoded, total=len(jobs), desc="rendering scenes", mininterval=10))

    def _regions(self, rng, scene: EncodedScene, key, form: str, slots: int) -> Sample:
        """Makes a sample of a form about the regions of a scene."""
        regions, prompts, features = self._draw_regions(rng, scene)
        texts = [caption_of(scene.regions[k]) for k in regions]
        return self._answered(features, texts, slots, prompts, key)

    def _draw_regions(self, rng, scene: EncodedScene) -> tuple[list[int], list[int], dict]:
        """Draws the regions of a sample and their prompts; returns both and their features."""
        count = min(len(scene.regions), self._max_regions)
        regions = sorted(rng.permutation(len(scene.regions))[:count].tolist())
        total = self.processor.image_processor.num_region_prompts
        prompts = draw_prompts(rng, count, total, self.permute_prompts)
        return regions, prompts, choose_regions(scene.tensors(), regions, prompts)

    def _answered(
        self, features: dict, texts, length: int, prompts, key, instruction=None, order=()
    ):
        """Makes a sample of a text for each region; `order` has the regions' mask numbers."""
        slots = self.processor.caption_slots(texts, len(texts), length)
        about = {**features, "region_orders": [list(order)]}
        sequence = self.processor.region_sequence(about, 0, slots, instruction, prompts=prompts)

        # What a question names is replayed there too: a box for each run of RoI tokens.
        if order and self.processor.roi_output_size:
            places = [prompts.index(number) for number in sequence.spans]
            features |= {name: features[name][places] for name in ("boxes", "box_images")}
        return Sample(sequence, features, key)

    def _questions(self, rng, scene: EncodedScene, key) -> Sample:
        """Makes a sample of questions, each a branch of one trunk where there are several."""
        questions = self._ask(rng, scene)
        names = ("pixel_values", "image_grids", "image_sizes")
        tensors = scene.tensors()
        features = {name: tensors[name] for name in names}
        sequences = [self._question(features, question) for question in questions]
        sequence = sequences[0] if len(questions) == 1 else share_trunk(sequences)
        return Sample(sequence, features, key)

    def _question(self, features: dict, question: Question):
        """Builds the sequence of one question and its answer."""
        content = [{"type": "image"}, {"type": "text", "text": question.question}]
        message = [{"role": "user", "content": content}]
        text = self.processor.apply_chat_template(message, add_generation_prompt=True)
        return self.processor.chat_sequence(
            text, features, answer=question.answer, max_new_tokens=self.data.max_new_tokens
        )


def _ignore_interrupts():
    """Leaves Ctrl-C, which every process of a terminal gets, to the parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _encode_job(job) -> EncodedScene:
    torch.set_num_threads(1)
    encode, *arguments = job
    return encode(*arguments)
