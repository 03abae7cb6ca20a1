"""`perceptiondlm evaluate score`: turns a judge's recorded answers into scores."""

import argparse
import logging
from pathlib import Path

from .benchmarks import Benchmark, load_benchmark
from .breakdowns import break_down, coverage
from .files import file_sha256, read_json, write_json
from .scoring import MISSING_POLICIES, score_benchmark

logger = logging.getLogger(__name__)


def score(
    benchmark: Benchmark,
    answers: dict,
    *,
    missing: str = "wrong",
    resamples: int = 1000,
    seed: int = 0,
) -> dict:
    """Scores answers and breaks the scores down.

    Args:
        benchmark: what was asked.
        answers: per region key the recognition answer, then one per question.
        missing: how regions without answers count (see `score_benchmark`).
        resamples: bootstrap draws for the confidence intervals.
        seed: of those draws.

    Returns the published `summary` and `regions`, then `missing`, `coverage`,
    `confidence_intervals`, `per_category`, `per_region_count` and `interference`.
    """
    if not benchmark.questions:
        raise ValueError(f"expected questions in {benchmark.source.parent / 'qa.json'}, got none")
    evaluation = score_benchmark(benchmark.questions, answers, missing=missing)
    return {
        "summary": evaluation.summary,
        "regions": {key: region.to_json() for key, region in evaluation.regions.items()},
        "missing": {"policy": missing, "regions": list(evaluation.missing)},
        "coverage": coverage(evaluation, answers),
        **break_down(benchmark, evaluation, resamples=resamples, seed=seed),
    }


def configure(parser: argparse.ArgumentParser):
    """Adds the options of this step."""
    parser.add_argument("--annotations", required=True, help="benchmark folder, or Hub dataset id")
    parser.add_argument("--answers", required=True, help="JSON: {region: [recognition, ...]}")
    parser.add_argument("--output", required=True, help="where the scores go (JSON)")
    parser.add_argument(
        "--missing",
        choices=MISSING_POLICIES,
        default="wrong",
        help="regions without answers count as wrong (default) or are dropped, as published",
    )
    parser.add_argument("--resamples", type=int, default=1000, help="bootstrap draws")
    parser.add_argument("--seed", type=int, default=0, help="of the bootstrap")


def run(args: argparse.Namespace) -> int:
    """Scores the answers, writes the scores and prints the averages."""
    benchmark = load_benchmark(args.annotations)
    answers = read_json(args.answers)
    if not isinstance(answers, dict):
        raise ValueError(f"{args.answers}: expected an object, got {type(answers).__name__}")

    result = score(
        benchmark, answers, missing=args.missing, resamples=args.resamples, seed=args.seed
    )
    result["provenance"] = _provenance(benchmark, args)
    write_json(args.output, result)
    _report_missing(result["missing"])
    print_summary(result)
    return 0


def _provenance(benchmark: Benchmark, args: argparse.Namespace) -> dict:
    """Names the files that the scores come from, with their hashes."""
    return {
        "annotations": str(args.annotations),
        "questions_sha256": file_sha256(benchmark.source.parent / "qa.json"),
        "answers": str(args.answers),
        "answers_sha256": file_sha256(Path(args.answers)),
    }


def _report_missing(missing: dict):
    """Warns of regions without answers, and says how they count."""
    if missing["regions"]:
        verdict = "counted as wrong" if missing["policy"] == "wrong" else "dropped"
        first = ", ".join(missing["regions"][:5])
        logger.warning(
            "%d regions have no answers, %s: %s%s",
            len(missing["regions"]),
            verdict,
            first,
            ", ..." if len(missing["regions"]) > 5 else "",
        )


def print_summary(result: dict):
    """Prints the three averages with their intervals, in per cent."""
    for name, value in result["summary"].items():
        low, high = result["confidence_intervals"][name]
        print(f"{name:17} {100 * value:7.2f} %  [{100 * low:.2f}, {100 * high:.2f}]")
