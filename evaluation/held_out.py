"""Measures a checkpoint on held-out scenes: captions every region, answers every question."""

import dataclasses
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from tqdm import tqdm

from ..generation_options import DiffusionOptions, options_for
from ..generation_seen import plan_groups
from ..scenes.shapes import Scene, render_scene
from .held_things import AskedThings, score_things
from .synthetic_judge import score_answers, score_captions
from .throughput import Throughput, batch_cost, stop_ids, timed, total_throughput

SPLIT = "heldout"  # never trained on


@dataclass(frozen=True)
class SceneTexts:
    """What a checkpoint said about some scenes, and how long that took."""

    captions: list[list[str]]  # for each scene the caption of each region
    answers: list[list[str]]  # for each scene the answer to each question
    captioning: Throughput
    answering: Throughput
    num_groups: int  # region groups; several for a scene with more regions than one may have


def held_out_scenes(first_seed: int, count: int, *, progress: bool = True) -> list[Scene]:
    """Renders the held-out scenes of `count` seeds from `first_seed` on."""
    if count < 1:
        raise ValueError(f"expected scenes of 1 or more, got {count}")
    seeds = range(first_seed, first_seed + count)
    return [render_scene(seed, SPLIT) for seed in tqdm(seeds, desc="render", disable=not progress)]


def describe_scenes(
    model,
    processor,
    scenes: Sequence[Scene],
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
    for name, value in (("batch_size", batch_size), ("regions_per_pass", regions_per_pass or 1)):
        if value < 1:
            raise ValueError(f"expected {name} of 1 or more, got {value}")

    options = options or {}
    groups = list(_region_groups(scenes, regions_per_pass))
    common = {"model": model, "processor": processor, "batch_size": batch_size}
    captions, captioning = _caption(groups, scenes, options, progress=progress, **common)
    answers, answering = _answer(scenes, answer_options(model, options), progress, **common)

    # The model divides again what is more than it takes at once.
    max_regions = model.config.num_region_prompts
    num_groups = len(plan_groups([len(regions) for _, regions in groups], max_regions))
    return SceneTexts(captions, answers, captioning, answering, num_groups)


def answer_options(model, options: dict) -> dict:
    """Limits the options' steps to the positions of an answer."""
    chosen = DiffusionOptions.build(model.decoding_defaults, options)
    if chosen.steps is None:
        return options
    return options | {"steps": min(chosen.steps, chosen.max_new_tokens)}


def _region_groups(scenes: Sequence[Scene], size: int | None) -> Iterator[tuple[int, list[int]]]:
    """Yields (index of a scene, indices of its regions) that are handed to the model together."""
    for i, scene in enumerate(scenes):
        regions = list(range(len(scene.objects)))
        step = size or len(regions)
        yield from ((i, regions[first : first + step]) for first in range(0, len(regions), step))


def _caption(groups, scenes, options, *, model, processor, batch_size, progress):
    """Captions the regions of every scene; returns the captions and the `Throughput`."""
    captions = [[""] * len(scene.objects) for scene in scenes]
    costs = []
    bar = tqdm(total=sum(map(len, captions)), desc="caption", unit="region", disable=not progress)
    with bar:
        for first in range(0, len(groups), batch_size):
            batch = groups[first : first + batch_size]
            images = [scenes[i].image for i, _ in batch]
            masks = [[scenes[i].objects[k].mask for k in regions] for i, regions in batch]
            result, cost = _generate(
                model, len(batch), images=images, masks=masks, processor=processor, **options
            )

            # Back to where the regions stand in their scenes
            for (i, regions), texts in zip(batch, result.texts, strict=True):
                for k, text in zip(regions, texts, strict=True):
                    captions[i][k] = text
            costs.append(cost)
            bar.update(cost.regions)
    return captions, total_throughput(costs)


def _answer(scenes, options, progress, *, model, processor, batch_size):
    """Answers the questions of every scene; returns the answers and the `Throughput`.

    The regions that the `Throughput` counts are answers here.
    """
    asked = [(scene.image, question) for scene in scenes for question in scene.questions]
    texts, costs = [], []
    with tqdm(total=len(asked), desc="answer", unit="question", disable=not progress) as bar:
        for first in range(0, len(asked), batch_size):
            batch = asked[first : first + batch_size]
            images = [[image] for image, _ in batch]
            prompts = [question.question for _, question in batch]
            result, cost = _generate(
                model, len(batch), images=images, prompts=prompts, processor=processor, **options
            )

            texts += [row[0] for row in result.texts]
            costs.append(cost)
            bar.update(len(batch))
    answers = iter(texts)
    return [[next(answers) for _ in scene.questions] for scene in scenes], total_throughput(costs)


def _generate(model, count: int, **inputs):
    """Calls `diffusion_generate` once; returns the result and its cost."""
    start = time.perf_counter()
    task = "captions" if "masks" in inputs else "answers"
    result, seconds = timed(model, model.diffusion_generate, **options_for(task, inputs))
    cost = batch_cost(
        result,
        stop_ids(model.config),
        images=count,
        generate_seconds=seconds,
        end_to_end_seconds=time.perf_counter() - start,
    )
    return result, cost


def measurements(scenes: Sequence[Scene], said: SceneTexts) -> dict:
    """Returns accuracies and costs of what a checkpoint said, as a report has them.

    They are those of `score_captions` (of things: `score_thing_captions`) and `score_answers`;
    then `tokens_per_forward` (caption positions per forward pass, padding counted) and
    `tokens_per_forward_effective` (tokens before end of turn), `forwards`, `passes` (region
    groups), `forwards_per_pass`, `seconds` (captions and answers); and `captioning` and `answering`
    in full.
    """
    questions = [question for scene in scenes for question in scene.questions]
    answers = score_answers(questions, [text for texts in said.answers for text in texts])
    captioning, answering = said.captioning, said.answering

    return {
        **_caption_scores(scenes, said.captions),
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


def _caption_scores(scenes: Sequence, captions: Sequence[Sequence[str]]) -> dict:
    """Scores captions with the judge of the scenes' kind."""
    is_things = isinstance(scenes[0], AskedThings)
    return (score_things if is_things else score_captions)(scenes, captions)


def resolved_options(model, options: dict) -> dict:
    """Returns every decoding option in force: those given, then the checkpoint's, then defaults."""
    chosen = DiffusionOptions.build(model.decoding_defaults, options)
    record = {field.name: getattr(chosen, field.name) for field in dataclasses.fields(chosen)}
    record.pop("generator")
    if chosen.steps is None:
        record["steps"] = chosen.caption_length
    return record
