"""Teaches the vision path names alone, before a model learns to write: one pass, no text.

    pixels, region prompts --> vision tower --> connector --> mean over each mask --> (K, D)
                                                                                        |
    names' tokens --> sum of their embeddings (N, D) -------------- scores (K, N) <-----+

The features of a region are to lie nearest to the embeddings of its name's tokens. A scene costs a
seventh of what it does in denoising, since the decoder is not run, and all its things count, not
only as many as there are region prompts.

Axis letters: B scenes, one tile each, M masks of a scene, K regions of the batch, N names, D text
width, R region prompts, h w patches of a tile.
"""

import copy
import functools

import numpy as np
import torch
import torch.nn.functional as F

from ..image_processing_perceptiondlm import normalize
from ..processing_sequence import encode_text
from ..scenes.concepts import CONCEPTS
from ..scenes.things import COUNTS, MAX_COUNT, render_thing_scene
from .samples import CONTENT_STREAM, draw_prompts, generator_of
from .synthetic import EncodedScene, SceneDataset, encode_image
from .trainer import DiffusionTrainer

NUMBERS = {concept.name: number for number, concept in enumerate(CONCEPTS)}
NO_NAME = -100  # as cross_entropy leaves it out
CROWD_STREAM = 3  # beside those of `samples`


def encode_named(crowded_share: float, image_processor, seed: int, split: str) -> EncodedScene:
    """Renders a scene, crowded or not, and prepares its pixels and the masks of all its things.

    Its `regions` are the numbers of the things' names.
    """
    rng, count = generator_of(seed, CROWD_STREAM), None
    if rng.random() < crowded_share:
        count = int(rng.integers(COUNTS[1] + 1, MAX_COUNT + 1))
    scene = render_thing_scene(seed, split, count=count)
    roomy = copy.copy(image_processor)
    roomy.num_region_prompts = MAX_COUNT
    pixels, features, order = encode_image(roomy, scene.image, scene.things)
    names = [NUMBERS[thing.facts.concept] for thing in scene.things]
    patches = {"region_patches": features["region_patches"]}
    return EncodedScene(pixels, patches, [names[k] for k in order], names)


class NameDataset(SceneDataset):
    """Scenes of things with the name of every region; an index counts on over epochs."""

    def __init__(self, processor, data, **options):
        tiles = processor.image_processor.max_tiles
        if tiles != 1:
            raise ValueError(
                f'expected model.max_tiles of 1 with data.objective of "names", got {tiles}'
            )
        self.encode = functools.partial(encode_named, data.crowded_share)
        super().__init__(processor, data, **options)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """Returns pixels, the patches of region prompts and of all masks, and names.

        At random the scene is mirrored, as every thing is when it is drawn.
        """
        epoch, i = divmod(index, self.count)
        rng = generator_of(self.seed, CONTENT_STREAM, epoch, i)
        scene = self._scene(epoch, i)
        pixels = torch.from_numpy(scene.pixels)  # (1, 3, S, S)
        patches = torch.from_numpy(scene.features["region_patches"])  # (1, M, h, w)
        if rng.random() < 0.5:
            pixels, patches = pixels.flip(-1), patches.flip(-1)

        # some of the things get region prompts
        prompts = self.processor.image_processor.num_region_prompts
        count = min(len(scene.regions), prompts)
        chosen = rng.permutation(len(scene.regions))[:count]
        prompted = torch.zeros(1, prompts, *patches.shape[2:], dtype=torch.bool)
        places = draw_prompts(rng, count, prompts, self.permute_prompts)
        prompted[:, places] = patches[:, chosen]

        names = torch.full((1, MAX_COUNT), NO_NAME)
        names[0, : len(scene.regions)] = torch.tensor(scene.regions)
        return {
            "pixel_values": normalize(pixels),
            "region_patches": prompted,
            "named_patches": patches,
            "names": names,
        }

    def length(self, index: int) -> int:
        """Returns the same for all: one tile."""
        return 1


def collate_named(samples: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Stacks samples of `NameDataset`."""
    return {name: torch.cat([sample[name] for sample in samples]) for name in samples[0]}


def name_tokens(tokenizer) -> list[torch.Tensor]:
    """Returns the token ids of each concept's name, as a label begins and after a space."""
    texts = [f"{concept.name} {concept.name}" for concept in CONCEPTS]
    return [torch.tensor(encode_text(tokenizer, text)) for text in texts]


def score_names(
    model, tokens: list[torch.Tensor], pixel_values, region_patches, named_patches
) -> torch.Tensor:
    """Scores every name for every mask: (B, M, N) float32.

    `pixel_values` (B, 3, S, S); `region_patches` bool (B, R, h, w) get region prompts;
    `named_patches` bool (B, M, h, w) are those of the masks; `tokens` are the N names'.
    """
    prompted = None if model.region_prompts is None else region_patches
    features = model.encode_images(pixel_values, prompted)  # (B, cells, D)
    merge = model.config.spatial_merge_size
    shares = F.avg_pool2d(named_patches.to(features), merge).flatten(2)  # (B, M, cells)
    regions = shares @ features / shares.sum(2, keepdim=True).clamp(min=1e-6)

    ids = torch.cat(tokens).to(regions.device)
    starts = np.cumsum([0, *map(len, tokens[:-1])])
    names = F.embedding_bag(
        ids,
        model.get_input_embeddings().weight.float(),
        torch.from_numpy(starts).to(ids),
        mode="sum",
    )
    return F.layer_norm(regions.float(), regions.shape[-1:]) @ names.T


class NameTrainer(DiffusionTrainer):
    """Trains the vision path of a `PerceptionDLMForConditionalGeneration` to tell names.

    Its options are `DiffusionTrainer`'s. Raises ValueError for several processes.
    """

    def __init__(self, model, args, recipe, processor, *datasets, **options):
        if args.world_size > 1:
            raise ValueError(
                f'expected one process with data.objective of "names", got {args.world_size}'
            )
        super().__init__(model, args, recipe, processor, *datasets, **options)
        self.data_collator = collate_named
        self.tokens = name_tokens(processor.tokenizer)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Returns the cross-entropy of the right name over all names, a mean over regions."""
        names = inputs.pop("names")
        with self.accelerator.autocast():  # which wraps `forward` alone
            scores = score_names(model, self.tokens, **inputs)
        loss = F.cross_entropy(scores.flatten(0, 1), names.flatten(), ignore_index=NO_NAME)
        return (loss, {"scores": scores}) if return_outputs else loss
