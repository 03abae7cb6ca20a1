"""Teaches the vision path to name regions, before a model learns to write.

    pixels, region prompts --> vision tower --> connector --> mean over each mask (B, M, D)
                                                                        |
    names' tokens --> sum of their embeddings (N, D) --> products --> scores (B, M, N)

It is a classification: the right name's tokens are to have the embeddings that are most like the
features of the region. The decoder is not run. A scene takes a fifth of the time that it takes in
denoising (13 ms against 66 on two cores), and all its things count, not only as many as there are
region prompts.

Axis letters: B scenes, one tile each, M masks of a scene, N names, D text width, R region prompts,
h w patches of a tile.
"""

import copy
import functools

import numpy as np
import torch
import torch.nn.functional as F

from ..image_processing_perceptiondlm import normalize
from ..processing_sequence import IGNORED_LABEL, encode_text
from ..scenes.concepts import CONCEPTS
from ..scenes.thing_arrangement import MAX_COUNT
from ..scenes.things import COUNTS, render_thing_scene
from .samples import CONTENT_STREAM, CROWD_STREAM, draw_prompts, generator_of
from .synthetic import EncodedScene, SceneDataset, encode_image
from .trainer import DiffusionTrainer

NUMBERS = {concept.name: number for number, concept in enumerate(CONCEPTS)}


def encode_named(crowded_share: float, image_processor, seed: int, split: str) -> EncodedScene:
    """Renders a scene, crowded or not, and prepares its pixels and the masks of all its things.

    A crowded scene has 9 to 24 things, others 2 to 8. `regions` of the result are not indices here
    but the numbers of the things' names, places in `CONCEPTS`.
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
    """Gives scenes of things with the name of every thing, one tile to a scene.

    An index counts on over epochs (`epoch * len(self) + i`). Raises ValueError for a processor
    whose images may have several tiles.
    """

    def __init__(self, processor, data, **options):
        tiles = processor.image_processor.max_tiles
        if tiles != 1:
            raise ValueError(
                f'expected model.max_tiles of 1 with data.objective of "names", got {tiles}'
            )
        self.encode = functools.partial(encode_named, data.crowded_share)
        super().__init__(processor, data, **options)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """Returns a scene, mirrored every other time, as tensors of one row each.

        `pixel_values` (1, 3, S, S); `region_patches` bool (1, R, h, w), of the things that get a
        region prompt; `named_patches` bool (1, M, h, w), of all; `names` int64 (1, M), with -100
        where a scene has fewer things than there is room for.
        """
        epoch, i = divmod(index, self.count)
        rng = generator_of(self.seed, CONTENT_STREAM, epoch, i)
        scene = self._scene(epoch, i)
        pixels = torch.from_numpy(scene.pixels)  # (1, 3, S, S)
        patches = torch.from_numpy(scene.features["region_patches"])  # (1, M, h, w)
        if rng.random() < 0.5:
            pixels, patches = pixels.flip(-1), patches.flip(-1)

        # Draw which things get region prompts.
        prompts = self.processor.image_processor.num_region_prompts
        count = min(len(scene.regions), prompts)
        chosen = rng.permutation(len(scene.regions))[:count]
        prompted = torch.zeros(1, prompts, *patches.shape[2:], dtype=torch.bool)
        places = draw_prompts(rng, count, prompts, self.permute_prompts)
        prompted[:, places] = patches[:, chosen]

        names = torch.full((1, MAX_COUNT), IGNORED_LABEL)
        names[0, : len(scene.regions)] = torch.tensor(scene.regions)
        return {
            "pixel_values": normalize(pixels),
            "region_patches": prompted,
            "named_patches": patches,
            "names": names,
        }

    def length(self, index: int) -> int:
        """Returns the length that batches are grouped by: the same for all, one tile."""
        return 1


def collate_named(samples: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Stacks samples of `NameDataset`."""
    return {name: torch.cat([sample[name] for sample in samples]) for name in samples[0]}


def name_tokens(tokenizer) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the token ids of all names, one after the other, and where each begins: (N,).

    Every name stands there twice, without a space before it as in a label, and with one as in a
    caption: a tokenizer has different tokens for them.
    """
    names = [encode_text(tokenizer, f"{concept.name} {concept.name}") for concept in CONCEPTS]
    starts = np.cumsum([0, *map(len, names[:-1])])
    return torch.tensor(sum(names, [])), torch.from_numpy(starts)


def score_names(model, tokens, pixel_values, region_patches, named_patches) -> torch.Tensor:
    """Scores every name for every mask: (B, M, N) float32.

    `tokens` as of `name_tokens`; `pixel_values` (B, 3, S, S); `region_patches` bool (B, R, h, w)
    get region prompts; `named_patches` bool (B, M, h, w) are those of the masks.
    """
    # Average the features of each mask, a cell counting by its share of the mask's patches.
    prompted = None if model.region_prompts is None else region_patches
    features = model.encode_images(pixel_values, prompted)  # (B, cells, D)
    merge = model.config.spatial_merge_size
    shares = F.avg_pool2d(named_patches.to(features), merge).flatten(2)  # (B, M, cells)
    regions = shares @ features / shares.sum(2, keepdim=True).clamp(min=1e-6)

    # Compare them with the names.
    ids, starts = (part.to(regions.device) for part in tokens)
    embeddings = model.get_input_embeddings().weight.float()
    names = F.embedding_bag(ids, embeddings, starts, mode="sum")  # (N, D)
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
        # The Trainer compiles `model.forward`, which is not called here.
        self.score = torch.compile(score_names) if args.torch_compile else score_names

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Returns the cross-entropy of the right name over all names, a mean over regions."""
        names = inputs.pop("names")
        model = self.accelerator.unwrap_model(model, keep_torch_compile=False)
        with self.accelerator.autocast():  # of itself it covers `model.forward` alone
            scores = self.score(model, self.tokens, **inputs)
        loss = F.cross_entropy(scores.flatten(0, 1), names.flatten(), ignore_index=IGNORED_LABEL)
        return (loss, {"scores": scores}) if return_outputs else loss
