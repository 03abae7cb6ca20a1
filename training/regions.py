"""Makes samples of region captions: an image's region masks, in groups that share a sequence."""

import numpy as np

from ..configuration_perceptiondlm import path_inside
from ..processing_perceptiondlm import PerceptionDLMProcessor
from .recipe_sections import RegionData
from .records import Record, count_masks
from .samples import CONTENT_STREAM, Sample, choose_regions, draw_prompts, generator_of


def partition(count: int, max_size: int, rng: np.random.Generator) -> list[list[int]]:
    """Divides `count` masks at random into groups of at most `max_size`.

    There are as few groups as there can be, of nearly equal size.
    """
    groups = np.array_split(rng.permutation(count), -(-count // max_size))
    return [sorted(group.tolist()) for group in groups]


class RegionSamples:
    """Makes samples of records with `image`, `mask_rles` (or `masks`) and `captions`."""

    def __init__(
        self,
        processor: PerceptionDLMProcessor,
        data: RegionData,
        *,
        seed: int = 0,
        permute_prompts: bool = True,
    ):
        self.processor = processor
        self.data = data
        self.seed = seed
        self.permute_prompts = permute_prompts
        prompts = processor.image_processor.num_region_prompts
        if prompts == 0:
            raise ValueError("expected a model with region prompts for region captions, got none")
        self.max_regions = min(data.regions_per_sample or prompts, prompts)

    count = staticmethod(count_masks)

    def samples_of(self, count: int) -> int:
        """Counts the groups of a record with so many masks."""
        return -(-count // self.max_regions)

    def length(self, count: int, number: int) -> int:
        """Estimates a group's length by its branches: no image has been opened yet."""
        groups = self.samples_of(count)
        regions = count // groups + (number < count % groups)
        return regions * (self.processor.roi_output_size**2 + (self.data.caption_length or 64))

    def make(self, record: Record, number: int, rng, key: tuple, epoch: int) -> Sample:
        """Makes the sample of group `number` of this epoch's partition of the record's masks."""
        masks, captions = record.get("mask_rles", "masks"), record.get("captions")
        if not masks:
            raise ValueError("expected at least one mask, got none")
        if len(captions) != len(masks):
            raise ValueError(
                f"expected a caption for each of {len(masks)} masks, got {len(captions)} captions"
            )

        order_rng = generator_of(self.seed, CONTENT_STREAM, epoch, *record.key, 0)
        group = partition(len(masks), self.max_regions, order_rng)[number]

        features = self.processor.image_processor(
            [image_of(record, self.data.image_root)], [[masks[k] for k in group]]
        )
        order = features.pop("region_orders")[0]

        texts = [self._checked(captions[group[k]]) for k in order]
        slots = self.processor.caption_slots(texts, len(texts), self.data.caption_length)
        for slot in slots:
            if len(slot) > self.data.max_text_tokens:
                raise ValueError(
                    f"expected a caption of at most {self.data.max_text_tokens} tokens,"
                    f" got {len(slot)}"
                )

        prompts = draw_prompts(
            rng, len(texts), self.processor.image_processor.num_region_prompts, self.permute_prompts
        )
        features = choose_regions(dict(features), list(range(len(texts))), prompts)
        sequence = self.processor.region_sequence(features, 0, slots, prompts=prompts)
        return Sample(sequence, features, key)

    def _checked(self, caption) -> str:
        """Returns a caption without the white space around it; ValueError for none."""
        if not isinstance(caption, str) or not caption.strip():
            raise ValueError(f"expected a caption with text in it, got {caption!r}")
        return caption.strip()


def image_of(record: Record, root: str | None) -> str | bytes:
    """Returns the record's only image: its bytes, or its path."""
    if record.images:
        return record.images[0]
    return image_path(record.get("image", kind=str), record, root)


def image_path(name, record: Record, root: str | None) -> str:
    """Returns the path of an image that a record names, inside `root` or the record's folder."""
    if not isinstance(name, str):
        raise ValueError(f"expected an image as a path, got {name!r}")
    try:
        return str(path_inside(root or record.folder, name))
    except ValueError as error:
        raise ValueError(f"{error}: see data.image_root") from error
