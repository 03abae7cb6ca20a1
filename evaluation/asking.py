"""Asks a checkpoint about the regions of scenes, and about whole scenes, batch by batch."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from tqdm import tqdm

from ..generation_options import DiffusionOptions, options_for
from .throughput import Throughput, batch_cost, stop_ids, timed, total_throughput


@dataclass(frozen=True)
class AskedRegions:
    """Regions of one scene that are handed to the model together."""

    scene: int
    regions: list[int]  # indices of the scene's objects
    prompts: str | list[str] | None = None  # one for all, or one for each; None: the checkpoint's


@dataclass(frozen=True)
class Asker:
    """Asks one checkpoint, decoding always in the same way.

    A scene has `image`, `objects` with a `mask` each, and `questions`.
    """

    model: Any  # has `diffusion_generate`, `config` and `decoding_defaults`
    processor: Any  # passed on to the model
    batch_size: int = 16  # images, or questions, in one call
    # Upper bound for the regions of a group; None: as many as the checkpoint takes at once.
    regions_per_pass: int | None = None
    options: dict = field(default_factory=dict)  # of `diffusion_generate`
    progress: bool = True  # shows progress bars

    def __post_init__(self):
        for name in ("batch_size", "regions_per_pass"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"expected {name} of 1 or more, got {value}")

    def groups(self, scenes: Sequence, max_regions: int | None = None) -> Iterator[AskedRegions]:
        """Splits the regions of each scene into groups of at most `max_regions`, in their order."""
        bounds = [bound for bound in (self.regions_per_pass, max_regions) if bound is not None]
        for i, scene in enumerate(scenes):
            regions = list(range(len(scene.objects)))
            step = min([len(regions), *bounds])
            yield from (
                AskedRegions(i, regions[first : first + step])
                for first in range(0, len(regions), step)
            )

    @property
    def max_named_regions(self) -> int:
        """Returns how many regions a group may have whose questions name one another.

        In the tree layout as many as there are prompts; 1 where no question can name a region.
        """
        config = self.model.config
        can_name = config.region_layout == "independent" and config.roi_output_size
        return config.num_region_prompts if can_name else 1

    def ask_regions(
        self,
        scenes: Sequence,
        groups: Sequence[AskedRegions],
        *,
        length: int | None = None,
        title: str = "caption",
    ) -> tuple[list[list[str]], Throughput]:
        """Asks about groups of regions.

        Args:
            scenes: of any sizes.
            groups: batched in their order; every region is in one of them.
            length: tokens of a response; None: as the options say. A response takes no more steps
                than it has positions where it is given.
            title: of the progress bar.

        Returns for each scene the response of each region, and what that took.
        """
        options = self.options if length is None else self._with_length("caption_length", length)
        texts = [[""] * len(scene.objects) for scene in scenes]
        costs = []
        with self._bar(sum(map(len, texts)), title, "region") as bar:
            for first in range(0, len(groups), self.batch_size):
                batch = groups[first : first + self.batch_size]
                result, cost = self._generate(len(batch), options, **_region_inputs(scenes, batch))

                # Back to where the regions stand in their scenes
                for group, own in zip(batch, result.texts, strict=True):
                    for k, text in zip(group.regions, own, strict=True):
                        texts[group.scene][k] = text
                costs.append(cost)
                bar.update(cost.regions)
        return texts, total_throughput(costs)

    def ask_scenes(self, scenes: Sequence) -> tuple[list[list[str]], Throughput]:
        """Asks each scene's questions about the whole image.

        Returns for each scene the answer to each question, and what that took; the regions that
        the `Throughput` counts are answers here. An answer takes no more steps than positions.
        """
        options = self._with_length("max_new_tokens")
        asked = [(scene.image, question) for scene in scenes for question in scene.questions]
        texts, costs = [], []
        with self._bar(len(asked), "answer", "question") as bar:
            for first in range(0, len(asked), self.batch_size):
                batch = asked[first : first + self.batch_size]
                images = [[image] for image, _ in batch]
                prompts = [question.question for _, question in batch]
                result, cost = self._generate(len(batch), options, images=images, prompts=prompts)

                texts += [row[0] for row in result.texts]
                costs.append(cost)
                bar.update(len(batch))
        answers = iter(texts)
        return [[next(answers) for _ in scene.questions] for scene in scenes], total_throughput(
            costs
        )

    def _with_length(self, name: str, length: int | None = None) -> dict:
        """Returns the options with a response's length, their steps limited to its positions."""
        options = self.options if length is None else {**self.options, name: length}
        chosen = DiffusionOptions.build(self.model.decoding_defaults, options)
        if chosen.steps is None:
            return options
        return options | {"steps": min(chosen.steps, getattr(chosen, name))}

    def _generate(self, count: int, options: dict, **inputs):
        """Calls `diffusion_generate` once; returns the result and its cost."""
        start = time.perf_counter()
        given = options_for("captions" if "masks" in inputs else "answers", options)
        call = self.model.diffusion_generate
        result, seconds = timed(self.model, call, processor=self.processor, **inputs, **given)
        cost = batch_cost(
            result,
            stop_ids(self.model.config),
            images=count,
            generate_seconds=seconds,
            end_to_end_seconds=time.perf_counter() - start,
        )
        return result, cost

    def _bar(self, total: int, title: str, unit: str) -> tqdm:
        return tqdm(total=total, desc=title, unit=unit, disable=not self.progress)


def _region_inputs(scenes: Sequence, groups: Sequence[AskedRegions]) -> dict:
    """Returns images, masks and, where there are any, prompts of some groups."""
    inputs: dict = {
        "images": [scenes[group.scene].image for group in groups],
        "masks": [[scenes[group.scene].objects[k].mask for k in group.regions] for group in groups],
    }
    if any(group.prompts is not None for group in groups):
        inputs["prompts"] = [group.prompts for group in groups]
    return inputs
