"""Images that the model has seen: their features, and what of the prompt was computed already.

    images, masks  ->  processor  ->  tiles  ->  encode once  ->  Seen
                                                                    |
    prompts, templates, texts to score, again and again  ----------+

In the tree layout the trunk, everything up to the image's end, depends on no question: its keys and
values are kept too, so that another question costs its own tokens alone.
"""

import weakref
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from .configuration_perceptiondlm import PerceptionDLMConfig
from .image_processing_perceptiondlm import (
    PerceptionDLMImageProcessor,
    flatten_images,
    pair_masks,
)
from .modeling_language import fastest_linear
from .processing_perceptiondlm import PerceptionDLMProcessor, tile_limits
from .processing_sequence import TokenSequence


@dataclass
class RegionGroup:
    """Names the regions of one image that share one sequence: one row of a batch.

    Attributes:
        image: the image's number.
        masks: the numbers of its region masks, in the order given.
        instruction: for the regions, see `pair_prompts`.
    """

    image: int
    masks: list[int]
    instruction: str | list[str | None] | None = None


@dataclass
class SeenGroup:
    """Holds the features of one region group, or of the images of one conversation.

    Attributes:
        images: the numbers of its images.
        masks: the numbers of its region masks, in the order given; none for whole images.
        geometry: the image processor's `image_sizes` and `image_grids`; with regions also
            `region_orders`, a list of the numbers of its masks, the largest first.
        image_features: float (tokens, D), of all its images.
        region_features: float (regions, roi_output_size^2, D), the largest region first; None
            without regions.
        trunks: keys and values of the trunks that were computed, by their token ids.
    """

    images: list[int]
    masks: list[int]
    geometry: dict
    image_features: torch.Tensor | None
    region_features: torch.Tensor | None = None
    trunks: dict[tuple[int, ...], list[tuple[torch.Tensor, torch.Tensor]]] = field(
        default_factory=dict, repr=False
    )

    @property
    def order(self) -> list[int]:
        """Returns the numbers of its masks in the order of their areas, the largest first."""
        return self.geometry["region_orders"][0]

    def tensors(self) -> Iterator[torch.Tensor]:
        """Lists what takes memory."""
        yield from (t for t in (self.image_features, self.region_features) if t is not None)
        for layers in self.trunks.values():
            for key, value in layers:
                yield from (key, value)


@dataclass
class Seen:
    """Holds what a model knows of images: `diffusion_generate` takes it in their place.

    Attributes:
        groups: one for each region group of each image; one for each image without region masks.
        counts: of each image the number of its region masks; None for images without any.
        chosen: of each image the region masks that are asked about; see `only`.
        owner: refers to the model, whose features no other model can use.
    """

    groups: list[SeenGroup]
    counts: list[int] | None
    chosen: list[list[int]] | None
    owner: weakref.ref

    @property
    def num_images(self) -> int:
        """Counts the images."""
        return 1 + max(image for group in self.groups for image in group.images)

    @property
    def nbytes(self) -> int:
        """Counts the bytes that are held; trunks come to it as prompts ask for them."""
        return sum(t.nbytes for group in self.groups for t in group.tensors())

    @classmethod
    def joined(cls, parts: Sequence["Seen"]) -> "Seen":
        """Puts what was seen in several calls together, as if it had been seen in one.

        Nothing is copied. Raises ValueError for parts of several models, or some with region masks
        and some without.
        """
        if not parts:
            raise ValueError("expected something that was seen, got nothing")
        first = parts[0]
        if any(part.owner() is not first.owner() for part in parts):
            raise ValueError("expected images that one model has seen, got those of several")
        if len({part.counts is None for part in parts}) > 1:
            raise ValueError("expected all images with region masks or all without, got both")

        groups: list[SeenGroup] = []
        start = 0
        for part in parts:
            moved = (replace(g, images=[i + start for i in g.images]) for g in part.groups)
            groups += moved
            start += part.num_images
        if first.counts is None:
            return replace(first, groups=groups)
        return replace(
            first,
            groups=groups,
            counts=[count for part in parts for count in part.counts or ()],
            chosen=[own for part in parts for own in part.chosen or ()],
        )

    def only(self, masks: Iterable[int] | Sequence[Iterable[int]]) -> "Seen":
        """Returns the same images with only some of their regions to be asked about.

        Args:
            masks: the numbers of region masks of the one image, or a list of them for each image.

        Nothing is copied or encoded again: the model has still seen all regions. Raises ValueError
        for a mask that there is not.
        """
        if self.counts is None:
            raise ValueError("expected an image that was seen with region masks, got one without")
        given: list = list(masks)
        lists = [given] if len(self.counts) == 1 and not _is_nested(given) else given
        if len(lists) != len(self.counts):
            raise ValueError(f"expected masks of {len(self.counts)} images, got {len(lists)}")

        chosen = []
        for own, count in zip(lists, self.counts, strict=True):
            own = list(own)
            known = all(type(k) is int and 0 <= k < count for k in own)
            if not known or len(set(own)) < len(own):
                raise ValueError(f"expected different masks from 0 to {count - 1}, got {own}")
            chosen.append(own)
        if not any(chosen):
            raise ValueError("expected at least one mask, got none")
        return replace(self, chosen=chosen)


def _is_nested(values: list) -> bool:
    return any(isinstance(value, (list, tuple, range)) for value in values)


def plan_groups(counts: Sequence[int], max_regions: int, instructions=None) -> list[RegionGroup]:
    """Splits each image's masks, in the order given, into groups of at most `max_regions`.

    `instructions` has one for each image, see `pair_prompts`.
    """
    if max_regions == 0:
        raise ValueError("expected a checkpoint with region prompts for masks, got one without")
    for i, count in enumerate(counts):
        if count == 0:
            raise ValueError(f"expected at least one mask for image {i}, got none")

    groups = []
    for image, (count, given) in enumerate(
        zip(counts, instructions or [None] * len(counts), strict=True)
    ):
        for first in range(0, count, max_regions):
            masks = list(range(first, min(first + max_regions, count)))
            own = [given[k] for k in masks] if isinstance(given, list) else given
            groups.append(RegionGroup(image, masks, own))
    return groups


def group_by_instruction(
    counts: Sequence[int], max_regions: int, instructions: list, default: str
) -> list[RegionGroup]:
    """Splits each image's masks as `plan_groups` does, with one instruction in each group.

    That is for the joint layout, whose weights know one instruction for the regions of a sequence;
    None stands for `default`.
    """
    plan_groups(counts, max_regions)  # refuses images without masks
    groups = []
    for image, (count, given) in enumerate(zip(counts, instructions, strict=True)):
        texts = given if isinstance(given, list) else [given] * count
        by_text: dict[str, list[int]] = {}
        for k, text in enumerate(texts):
            by_text.setdefault(text or default, []).append(k)
        for text, masks in by_text.items():
            for group in plan_groups([len(masks)], max_regions):
                groups.append(RegionGroup(image, [masks[k] for k in group.masks], text))
    return groups


def expect_seen_by(seen: Seen, model):
    """Raises ValueError for what another model has seen."""
    if seen.owner() is not model:
        raise ValueError("expected images that this model has seen, got those of another model")


def inputs_of(
    processor, groups: Sequence[SeenGroup], sequences: Sequence[TokenSequence], task: str
) -> dict:
    """Stacks sequences about images that were seen, one for each of `groups`, into model inputs."""
    is_tree = processor.region_layout == "independent"
    inputs = processor.stack(list(sequences), task, align_trunks=is_tree)
    images = [group.image_features for group in groups if group.image_features is not None]
    if images:
        inputs["image_features"] = torch.cat(images)
    regions = [
        _taken(group.region_features, sequence.spans)
        for group, sequence in zip(groups, sequences, strict=True)
        if group.region_features is not None
    ]
    if regions:
        inputs["region_features"] = torch.cat(regions)
    return inputs


def _taken(regions: torch.Tensor, spans: list[int]) -> torch.Tensor:
    """Takes a region's features, (spans, cells, D), for each run of its placeholders."""
    if spans == list(range(len(regions))):
        return regions
    return regions.index_select(0, torch.tensor(spans, device=regions.device))


class SeeingMixin:
    """Gives `see` to a model, and finds the processor that it needs for it.

    Attributes:
        config, device, see_features: the model's.
        _source: the path or Hub id and the loading options of the weights, beside which a
            processor is looked for; None for a model that was not loaded.
        _processor: the processor that was found there.
    """

    config: PerceptionDLMConfig
    device: torch.device

    _source: tuple[str, dict] | None = None
    _processor: PerceptionDLMProcessor | None = None

    @torch.no_grad()
    def see(self, images, masks=None, *, processor=None) -> Seen:
        """Encodes images once, for any number of calls about them.

        Args:
            images: one image or a list of them; without masks, a list in the list holds the images
                that are asked about together.
            masks: region masks, as `diffusion_generate` takes them; None for questions about whole
                images.
            processor: defaults to the one saved beside the weights.

        Returns what `diffusion_generate` and `diffusion_score` take in place of images and masks.
        It is of this model's present weights. Raises as `diffusion_generate`.
        """
        fastest_linear(self)  # type: ignore[arg-type]
        processor = processor or self._saved_processor()
        self._check_processor(processor)
        if masks is None:
            listed = list(images) if isinstance(images, (list, tuple)) else [images]
            nested = [list(one) if isinstance(one, (list, tuple)) else [one] for one in listed]
            if not nested or any(not own or any(one is None for one in own) for own in nested):
                raise ValueError("expected an image or a list of them to see, got none")
            groups = self._see_images(nested, processor)
            groups = [replace(group, images=[i]) for i, group in enumerate(groups)]
            return Seen(groups, None, None, weakref.ref(self))

        images, masks = pair_masks(images, masks)
        counts = [len(own) for own in masks]
        plan = plan_groups(counts, self.config.num_region_prompts)
        groups = self._see_regions(plan, images, masks, processor)
        return Seen(groups, counts, [list(range(count)) for count in counts], weakref.ref(self))

    def _see_regions(
        self, plan: Sequence[RegionGroup], images, masks, processor
    ) -> list[SeenGroup]:
        """Encodes the images of region groups, all together."""
        features = processor.image_processor(
            [images[group.image] for group in plan],
            [[masks[group.image][k] for k in group.masks] for group in plan],
        )
        tokens, regions = self._encode(features)

        # Each group has its part of what was encoded.
        counts = [processor.count_image_tokens(features, i) for i in range(len(plan))]
        own_tokens = tokens.split(counts)
        own_regions: Sequence[torch.Tensor | None] = [None] * len(plan)
        if regions is not None:
            own_regions = regions.split([len(group.masks) for group in plan])
        return [
            SeenGroup(
                [group.image],
                group.masks,
                {
                    "image_sizes": features["image_sizes"][i : i + 1],
                    "image_grids": features["image_grids"][i : i + 1],
                    "region_orders": [[group.masks[int(k)] for k in features["region_orders"][i]]],
                },
                own_tokens[i],
                own_regions[i],
            )
            for i, group in enumerate(plan)
        ]

    def _see_images(self, image_groups: list[list], processor) -> list[SeenGroup]:
        """Encodes the images of conversations, all together; the same images once."""
        distinct = {tuple(map(id, group)): group for group in image_groups}
        counts = [len(group) for group in distinct.values()]
        flat = flatten_images(list(distinct.values()))
        tokens = features = None
        if flat:
            features = processor.image_processor(flat, max_tiles=tile_limits(counts, None))
            tokens, _ = self._encode(features)

        seen, first, start = {}, 0, 0
        for key, group in distinct.items():
            places = slice(first, first + len(group))
            if not group:
                seen[key] = SeenGroup([], [], {}, None)
                continue
            assert features is not None and tokens is not None  # there are images
            geometry = {name: features[name][places] for name in ("image_sizes", "image_grids")}
            count = sum(processor.count_image_tokens(geometry, k) for k in range(len(group)))
            seen[key] = SeenGroup([], [], geometry, tokens[start : start + count])
            first, start = first + len(group), start + count
        return [seen[tuple(map(id, group))] for group in image_groups]

    def _encode(self, features) -> tuple[torch.Tensor, torch.Tensor | None]:
        names = PerceptionDLMImageProcessor.model_input_names
        tensors = {k: features[k].to(self.device) for k in names if k in features}
        return self.see_features(**tensors)  # type: ignore[attr-defined]

    # The processor that is saved beside the weights.

    def _saved_processor(self) -> PerceptionDLMProcessor:
        """Loads the processor saved beside the weights, once."""
        if self._processor is None:
            if self._source is None:
                raise ValueError("expected `processor`: this model was not loaded from a folder")
            path, options = self._source
            try:
                self._processor = PerceptionDLMProcessor.from_pretrained(path, **options)
            except (OSError, ValueError) as error:  # transformers raises either
                place = Path(path) / options.get("subfolder", "")
                raise FileNotFoundError(
                    f"expected a processor beside the weights in {place}, got: {error}; pass"
                    " `processor`"
                ) from error
        return self._processor

    def _processor_if_saved(self) -> PerceptionDLMProcessor | None:
        try:
            return None if self._source is None else self._saved_processor()
        except FileNotFoundError:
            return None

    def _check_processor(self, processor):
        """Refuses a processor that was made for another model."""
        vision, images = self.config.vision_config, processor.image_processor
        pairs = {
            "region_layout": (self.config.region_layout, processor.region_layout),
            "roi_output_size": (self.config.roi_output_size, processor.roi_output_size),
            "image_size": (vision.image_size, images.image_size),
            "image_layout": (self.config.image_layout, images.image_layout),
            "mask_token_id": (self.config.mask_token_id, processor.mask_token_id),
        }
        for name, (expected, got) in pairs.items():
            if expected != got:
                raise ValueError(
                    f"expected a processor with the model's {name} {expected!r}, got {got!r}"
                )
