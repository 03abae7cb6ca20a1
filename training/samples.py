"""Holds samples, one sequence with its images' features each, and batches them with seeded noise.

Axis letters: B batch, L sequence, T tiles, R region prompts, K regions, h w patches of a tile.
"""

from dataclasses import dataclass

import numpy as np
import torch

from ..configuration_perceptiondlm import ROLE_CAPTION, ROLE_ROI, ROLE_SHARED, SHARED_REGION
from ..modeling_loss import MINIMUM_MASK_RATE
from ..processing_perceptiondlm import PerceptionDLMProcessor
from ..processing_sequence import Padding, TokenSequence, pad_sequences
from .recipe_sections import MaskingRecipe

# Streams of random numbers: what is drawn for one purpose does not shift another's draws.
CONTENT_STREAM, NOISE_STREAM, ORDER_STREAM, CROWD_STREAM = range(4)


def generator_of(seed: int, stream: int, *key: int) -> np.random.Generator:
    """Returns a random generator that depends on nothing but its arguments."""
    return np.random.default_rng([seed, stream, *key])


@dataclass
class Sample:
    """One training sample.

    Attributes:
        sequence: ids, positions, roles and labels.
        features: the image processor's tensors for its images ({}: none); `region_patches`,
            `boxes` and `box_images` only with regions.
        key: (epoch, index), which seed the sample's noise.
    """

    sequence: TokenSequence
    features: dict[str, torch.Tensor]
    key: tuple[int, int]


def choose_regions(features: dict, regions: list[int], prompts: list[int]) -> dict:
    """Keeps the features of the given regions, region `regions[k]` with prompt `prompts[k]`."""
    patches = features["region_patches"]  # (T, R, h, w)
    chosen = torch.zeros_like(patches)
    chosen[:, prompts] = patches[:, regions]
    return {
        **features,
        "region_patches": chosen,
        "boxes": features["boxes"][regions],
        "box_images": features["box_images"][regions],
    }


def draw_prompts(rng: np.random.Generator, count: int, prompts: int, permute: bool) -> list[int]:
    """Chooses the prompt of each of `count` regions: at random, or in order."""
    return rng.permutation(prompts)[:count].tolist() if permute else list(range(count))


def share_trunk(sequences: list[TokenSequence]) -> TokenSequence:
    """Joins sequences that begin with the same trunk and have one branch each.

    Fixed tokens of all branches come first, then the answers, as in the tree of a region group.
    Raises ValueError where the trunks differ.
    """
    first = sequences[0]
    trunk = first.regions.count(SHARED_REGION)
    for sequence in sequences:
        if sequence.ids[:trunk] != first.ids[:trunk] or SHARED_REGION in sequence.regions[trunk:]:
            raise ValueError("expected sequences with the same trunk, got another one")

    shared = TokenSequence()
    shared.add(first.ids[:trunk], position=0, region=SHARED_REGION, role=ROLE_SHARED)
    for role in (ROLE_ROI, ROLE_CAPTION):
        shared.prompt_length = len(shared.ids)
        for k, one in enumerate(sequences):
            own = [i for i in range(trunk, len(one.ids)) if one.roles[i] == role]
            ids, start = [one.ids[i] for i in own], one.positions[own[0]]
            shared.add(ids, position=start, region=k, role=role, target=role == ROLE_CAPTION)
    return shared


class DiffusionCollator:
    """Stacks samples as the model takes them, with the noise of each.

    A sample's noise depends on the seed and its key alone, whatever the batch, worker or process
    it is in. `level` fixes t, for evaluation. Batches are as long as their longest sample, or the
    next multiple of `pad_to_multiple_of`.
    """

    def __init__(
        self,
        processor: PerceptionDLMProcessor,
        masking: MaskingRecipe,
        seed: int = 0,
        level: float | None = None,
        pad_to_multiple_of: int = 1,
    ):
        self.padding = Padding(pad_to_multiple_of=pad_to_multiple_of)
        self.pad_token_id = processor.tokenizer.pad_token_id
        image_processor = processor.image_processor
        side = image_processor.image_size // image_processor.patch_size
        self.patches_shape = (image_processor.num_region_prompts, side, side)  # (R, h, w)
        self.masking = masking
        self.seed = seed
        self.level = level

    def __call__(self, samples: list[Sample]) -> dict[str, torch.Tensor]:
        rows = [(sample, *draw) for sample in samples for draw in self._noise(sample)]
        sequences = [sample.sequence for sample, *_ in rows]
        batch = pad_sequences(sequences, self.pad_token_id, with_labels=True, padding=self.padding)

        noise = torch.ones(batch["labels"].shape)  # (B, L)
        responses = max(len(sequence.ids) - sequence.prompt_length for sequence in sequences)
        start = noise.shape[1] - responses
        for row, (_, _, draws) in zip(noise, rows, strict=True):
            row[start : start + len(draws)] = torch.from_numpy(draws)

        batch["timesteps"] = torch.tensor([t for _, t, _ in rows], dtype=torch.float32)
        batch["noise"] = noise
        return batch | self._images([sample.features for sample, *_ in rows])

    def _noise(self, sample: Sample) -> list[tuple[float, np.ndarray]]:
        """Draws t and a uniform number for each response position; twice when complementary."""
        rng = generator_of(self.seed, NOISE_STREAM, *sample.key)
        count = len(sample.sequence.ids) - sample.sequence.prompt_length
        full = rng.random() < self.masking.full_mask_share
        t, draws = self._draw(rng, count)
        if self.level is not None:
            return [(self.level, draws)]
        first = (1.0 if full else t, draws)
        if not self.masking.complementary:
            return [first]
        # masked where u >= p, that is where 1 - u <= 1 - p = (1 - eps) (1 - t)
        other = (1 - t) - MINIMUM_MASK_RATE / (1 - MINIMUM_MASK_RATE)
        return [first, self._draw(rng, count) if full else (other, 1 - draws)]

    def _draw(self, rng: np.random.Generator, count: int) -> tuple[float, np.ndarray]:
        """Draws t, and a uniform number for each of `count` positions."""
        t = rng.uniform(self.masking.t_low, self.masking.t_high)
        return t, rng.random(count, dtype=np.float32)

    def _images(self, features: list[dict]) -> dict[str, torch.Tensor]:
        """Stacks the features of all images; boxes say which image of the batch they are of."""
        features = [f for f in features if f]
        if not features:
            return {}
        names = ("pixel_values", "image_grids", "image_sizes")
        data = {name: torch.cat([f[name] for f in features]) for name in names}
        if self.patches_shape[0] == 0:
            return data

        first = np.cumsum([0] + [len(f["image_grids"]) for f in features]).tolist()
        with_regions = [(f, i) for f, i in zip(features, first, strict=False) if "boxes" in f]
        # without regions too, so that the prompts' gradient exists in every process of a run
        data["region_patches"] = torch.cat([self._patches(f) for f in features])
        if with_regions:
            data["boxes"] = torch.cat([f["boxes"] for f, _ in with_regions])
            data["box_images"] = torch.cat([f["box_images"] + i for f, i in with_regions])
        return data

    def _patches(self, features: dict) -> torch.Tensor:
        """Returns a sample's patches by region; none are set where it has no regions."""
        if "region_patches" in features:
            return features["region_patches"]
        tiles = len(features["pixel_values"])
        return torch.zeros(tiles, *self.patches_shape, dtype=torch.bool)
