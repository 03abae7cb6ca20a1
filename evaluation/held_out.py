"""Measures a checkpoint on held-out scenes: captions every region, answers every question."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from tqdm import tqdm

from ..generation_options import DiffusionOptions, expect_known, merge_options
from ..generation_seen import plan_groups
from .asking import Asker
from .scene_kinds import SHAPES, SPLIT, SceneKind
from .synthetic_judge import score_answers
from .throughput import Throughput


@dataclass(frozen=True)
class SceneTexts:
    """What a checkpoint said about some scenes, and how long that took."""

    captions: list[list[str]]  # for each scene the caption of each region
    answers: list[list[str]]  # for each scene the answer to each question
    captioning: Throughput
    answering: Throughput
    num_groups: int  # region groups; several for a scene with more regions than one may have


def held_out_scenes(
    first_seed: int,
    count: int,
    kind: SceneKind = SHAPES,
    split: str = SPLIT,
    *,
    progress: bool = True,
) -> list:
    """Renders the held-out scenes of `count` seeds from `first_seed` on."""
    if count < 1:
        raise ValueError(f"expected scenes of 1 or more, got {count}")
    seeds = range(first_seed, first_seed + count)
    return [kind.render(seed, split) for seed in tqdm(seeds, desc="render", disable=not progress)]


def describe_scenes(
    model,
    processor,
    scenes: Sequence,
    *,
    batch_size: int = 16,
    regions_per_pass: int | None = None,
    options: dict | None = None,
    progress: bool = True,
) -> SceneTexts:
    """Captions all regions of the scenes and answers all their questions.

    Args:
        model: has `diffusion_generate` and `config`; processor: passed on to it.
        scenes: of any sizes, batched in their order.
        batch_size: images, or questions, in one call.
        regions_per_pass: bounds the regions of a group, 1 for one region at a time; None for as
            many as the checkpoint takes at once.
        options: of `diffusion_generate`. An answer takes no more steps than it has positions.
        progress: shows progress bars.
    """
    asker = Asker(model, processor, batch_size, regions_per_pass, options or {}, progress)
    return describe(asker, scenes)


def describe(asker: Asker, scenes: Sequence) -> SceneTexts:
    """Captions all regions of the scenes and answers all their questions."""
    groups = list(asker.groups(scenes))
    captions, captioning = asker.ask_regions(scenes, groups)
    answers, answering = asker.ask_scenes(scenes)

    # The model divides again what is more than it takes at once.
    max_regions = asker.model.config.num_region_prompts
    num_groups = len(plan_groups([len(group.regions) for group in groups], max_regions))
    return SceneTexts(captions, answers, captioning, answering, num_groups)


def measurements(scenes: Sequence, said: SceneTexts, kind: SceneKind = SHAPES) -> dict:
    """Returns accuracies and costs of what a checkpoint said, as a report has them.

    They are those of the kind's judge of captions and of `score_answers`;
    then `tokens_per_forward` (caption positions per forward pass, padding counted) and
    `tokens_per_forward_effective` (tokens before end of turn), `forwards`, `passes` (region
    groups), `forwards_per_pass`, `seconds` (captions and answers); and `captioning` and `answering`
    in full.
    """
    questions = [question for scene in scenes for question in scene.questions]
    answers = score_answers(questions, [text for texts in said.answers for text in texts])
    captioning, answering = said.captioning, said.answering

    return {
        **kind.score(scenes, said.captions),
        "question_accuracy": answers.pop("question_accuracy"),
        "questions": answers.pop("questions"),
        "questions_per_kind": {
            kind: {"accuracy": share, "questions": answers["kind_counts"][kind]}
            for kind, share in answers["per_kind"].items()
        },
        "tokens_per_forward": captioning.nominal_tpf,
        "tokens_per_forward_effective": captioning.effective_tpf,
        "forwards": captioning.forwards,
        "passes": said.num_groups,
        "forwards_per_pass": captioning.forwards / said.num_groups,
        "seconds": captioning.end_to_end_seconds + answering.end_to_end_seconds,
        "captioning": captioning.to_json(),
        "answering": answering.to_json(),
    }


def resolved_options(model, options: dict) -> dict:
    """Returns every decoding option in force: those given, then the checkpoint's, then defaults.

    What `fast` stands for is recorded as it is for captions; for answers it is less.
    """
    expect_known(options)
    chosen = DiffusionOptions(**merge_options(model.decoding_defaults, options, "captions"))
    record = {field.name: getattr(chosen, field.name) for field in dataclasses.fields(chosen)}
    record.pop("generator")
    if chosen.steps is None:
        record["steps"] = chosen.caption_length
    return record
