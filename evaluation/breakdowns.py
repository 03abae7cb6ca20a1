"""Breaks scores down: confidence intervals, tables by category and crowding, interference."""

from collections.abc import Mapping, Sequence

import numpy as np

from .benchmarks import Benchmark
from .scoring import Evaluation, Question, RegionScore, mean, question_score, summarize

INTERFERENCE_SUBTYPE = "salient negative"  # questions about what lies outside the region
INTERVAL = 95  # per cent


def confidence_intervals(
    regions: Mapping[str, RegionScore],
    image_of: Mapping[str, str],
    *,
    resamples: int = 1000,
    seed: int = 0,
) -> dict:
    """Estimates confidence intervals of the three averages by a percentile bootstrap.

    Regions of one image share what makes it hard, so whole images are drawn with replacement.

    Args:
        regions: the score of each region, by key.
        image_of: the image of each region.
        resamples: draws; `seed`: of the generator that makes them.

    Returns [low, high] of the central 95 % for each average, and how they were made.
    """
    if resamples < 1:
        raise ValueError(f"expected resamples of 1 or more, got {resamples}")

    # A draw says how often each image is in it: (resamples, images).
    sums = _sums_per_image(regions, image_of)  # (images, 4)
    generator = np.random.default_rng(seed)
    images = len(sums)
    draws = generator.multinomial(images, np.full(images, 1 / images), size=resamples)

    # The averages of every draw: (resamples,)
    positive, count, negative, negative_count = (draws @ sums).T
    positive = positive / np.maximum(count, 1)
    negative = negative / np.maximum(negative_count, 1)
    averages = {
        "average_positive": positive,
        "average_negative": negative,
        "average": (positive + negative) / 2,
    }

    tail = (100 - INTERVAL) / 2
    return {
        **{name: np.percentile(v, [tail, 100 - tail]).tolist() for name, v in averages.items()},
        "interval_percent": INTERVAL,
        "resampled": "images",
        "resamples": resamples,
        "seed": seed,
    }


def _sums_per_image(regions: Mapping[str, RegionScore], image_of: Mapping[str, str]) -> np.ndarray:
    """Sums each image's scores: sum and number of the positive, sum and number of the negative.

    Returns (images, 4); without any regions one row of zeros.
    """
    sums = {}
    for key, region in regions.items():
        row = sums.setdefault(image_of[key], np.zeros(4))
        row += (region.positive, 1, region.negative or 0, region.negative is not None)
    return np.array(list(sums.values()) or [np.zeros(4)])


def table_by(regions: Mapping[str, RegionScore], group_of: Mapping[str, object]) -> dict:
    """Averages the scores of each group of regions, groups in sorted order."""
    groups = {}
    for key, region in regions.items():
        groups.setdefault(group_of[key], []).append(region)
    return {
        str(group): {"regions": len(members), **summarize(members)}
        for group, members in sorted(groups.items())
    }


def interference(
    questions: Mapping[str, Sequence[Question]], regions: Mapping[str, RegionScore]
) -> dict:
    """Measures how far captions speak of what lies outside their region.

    Only questions of the subtype "salient negative" ask about that. Returns the number of regions
    and questions, `score` (mean over regions of the mean over their questions, with the protocol's
    cap for an object that is not recognized) and `mentioned_rate` (the share of questions whose
    answer says that the foreign object is mentioned).
    """
    region_means, mentioned = [], []
    for key, region in regions.items():
        chosen = [
            (question, index)
            for question, index in zip(questions[key], region.choice_index[1:], strict=True)
            if question.subtype == INTERFERENCE_SUBTYPE
        ]

        # Regions count alike, however many such questions they have.
        scores = [question_score(q, index, region.recognition) for q, index in chosen]
        region_means += [mean(scores)] if scores else []
        mentioned += [index is not None and q.scores[index] < 0 for q, index in chosen]

    return {
        "regions": len(region_means),
        "questions": len(mentioned),
        "score": mean(region_means),
        "mentioned_rate": mean(mentioned),
    }


def coverage(evaluation: Evaluation, answers: Mapping[str, Sequence | None]) -> dict:
    """Counts what a score does not rest on: answers that are missing or fit no choice."""
    answered = {
        key: region
        for key, region in evaluation.regions.items()
        if key not in set(evaluation.missing)
    }

    unmatched = unanswered = recognition = 0
    for key, region in answered.items():
        # Questions beyond the list have no answer either.
        given = [*answers[key], *[None] * (len(region.choice_index) - len(answers[key]))]
        recognition += region.choice_index[0] is None
        unanswered += given.count(None)
        unmatched += sum(
            index is None and answer is not None
            for index, answer in zip(region.choice_index, given, strict=True)
        )

    return {
        "regions": len(evaluation.regions),
        "missing_predictions": len(evaluation.missing),
        "unanswered_questions": unanswered,
        "answers_that_fit_no_choice": unmatched,
        "recognitions_that_fit_no_choice": recognition,
    }


def break_down(benchmark: Benchmark, evaluation: Evaluation, *, resamples: int, seed: int) -> dict:
    """Makes every section that a score file has besides the published ones."""
    regions = evaluation.regions
    image_of = {sample.key: sample.image_id for sample in benchmark.samples}
    crowd = benchmark.regions_per_image()

    return {
        "confidence_intervals": confidence_intervals(
            regions, image_of, resamples=resamples, seed=seed
        ),
        "per_category": table_by(regions, {s.key: s.category for s in benchmark.samples}),
        "per_region_count": table_by(regions, {key: crowd[i] for key, i in image_of.items()}),
        "interference": interference(benchmark.questions, regions),
    }
