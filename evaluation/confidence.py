"""`perceptiondlm evaluate confidence`: what scores tell, on drawn scenes that are judged exactly.

Are captions that are wrong less sure than right ones: the area under the ROC curve of
`DiffusionOutput.scores` (1: always, 0.5: no better than chance)? Is exp(score), the geometric mean
of a caption's token probabilities, how often a caption that has it is right (`calibration`)? And is
the region for its true caption the one, of all regions of its scene, under which `diffusion_score`
finds that caption the likeliest?
"""

import argparse
import statistics
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

from .checkpoint import (
    add_checkpoint_arguments,
    add_decoding_arguments,
    checkpoint_record,
    decoding_options,
    load_checkpoint,
)
from .environment import run_environment
from .files import write_json
from .held_out import held_out_scenes
from .scene_kinds import KINDS, SHAPES, SPLIT, SceneKind, add_kind_argument


def roc_area(scores: Sequence[float], is_right: Sequence[bool]) -> float | None:
    """Returns how often a right one scores above a wrong one, ties counted half.

    None where all are right or all wrong.
    """
    values, right = np.asarray(scores, dtype=float), np.asarray(is_right, dtype=bool)
    above, below = values[right], values[~right]
    if not len(above) or not len(below):
        return None
    differences = above[:, None] - below[None]
    return float(((differences > 0) + (differences == 0) / 2).mean())


def calibration(probabilities: Sequence[float], is_right: Sequence[bool], bins: int = 10) -> dict:
    """Compares probabilities with how often what has them is right, in bins of equal width.

    Returns `bins`, each with its bounds, how many fall into it, their mean probability and the
    share that is right (empty bins are left out), and `calibration_error`: the mean distance
    between the two, weighed by how many (expected calibration error, arXiv:1706.04599).

    Raises:
        ValueError: if one is no probability.
    """
    values, right = np.asarray(probabilities, dtype=float), np.asarray(is_right, dtype=bool)
    if strangers := values[~((values >= 0) & (values <= 1))].tolist():
        raise ValueError(f"expected probabilities from 0 to 1, got {strangers[0]}")
    places = np.clip((values * bins).astype(int), 0, bins - 1)
    rows = [
        {
            "from": k / bins,
            "to": (k + 1) / bins,
            "count": int((places == k).sum()),
            "mean_probability": float(values[places == k].mean()),
            "right": float(right[places == k].mean()),
        }
        for k in np.unique(places).tolist()
    ]
    distances = [row["count"] * abs(row["mean_probability"] - row["right"]) for row in rows]
    return {"bins": rows, "calibration_error": sum(distances) / len(values) if rows else None}


def measure(
    model, processor, scenes: Sequence, options: dict, method: str, kind: SceneKind = SHAPES
) -> dict:
    """Captions the regions of scenes, and looks for the region of each true caption.

    Args:
        options: of `diffusion_generate`.
        method: of `diffusion_score`.
        kind: of the scenes; says which captions are right.

    Returns `regions`; what `_told_apart` finds of right and wrong captions and, where the kind
    marks more than whole captions (names), of that under its name; `captions_looked_for` and the
    share of them of which the right region is the one that is found (`region_found`). A true
    caption that two objects of a scene share is looked for by no one.
    """
    scores: list[float] = []
    marks: dict[str, list[bool]] = defaultdict(list)
    picked: list[bool] = []
    for scene in tqdm(scenes, desc="score", unit="scene"):
        truth = [thing.caption for thing in scene.objects]
        seen = model.see(scene.image, [thing.mask for thing in scene.objects], processor=processor)
        out = model.diffusion_generate(seen, processor=processor, **options)
        scores += out.scores[0]
        for name, is_right in kind.mark(scene, out.texts[0]).items():
            marks[name] += is_right

        # Each true caption for each region.
        found = model.diffusion_score(
            seen,
            texts=[truth] * len(truth),
            method=method,
            length=options.get("caption_length"),
            processor=processor,
        )[0]
        for k, text in enumerate(truth):
            if truth.count(text) == 1:
                likelihoods = [own[k] for own in found]
                picked.append(int(np.argmax(likelihoods)) == k)

    return {
        "regions": len(scores),
        **_told_apart(scores, marks.pop("captions"), "wrong_captions"),
        **{name: _told_apart(scores, own, "wrong") for name, own in marks.items()},
        "captions_looked_for": len(picked),
        "region_found": statistics.mean(picked) if picked else None,
    }


def _told_apart(scores: Sequence[float], is_right: Sequence[bool], wrong_name: str) -> dict:
    """Tells how many are wrong, by `wrong_name`, and what scores say of right and wrong ones."""
    wrong = [score for score, right in zip(scores, is_right, strict=True) if not right]
    right = [score for score, right in zip(scores, is_right, strict=True) if right]
    return {
        wrong_name: len(wrong),
        "median_score_right": statistics.median(right) if right else None,
        "median_score_wrong": statistics.median(wrong) if wrong else None,
        "roc_area": roc_area(scores, is_right),
        "calibration": calibration(np.exp(scores), is_right),
    }


def configure(parser: argparse.ArgumentParser):
    """Adds the arguments."""
    add_checkpoint_arguments(parser)
    add_decoding_arguments(parser)
    parser.add_argument("--scenes", type=int, default=500, help="held-out scenes")
    parser.add_argument("--seed", type=int, default=0, help="of the first scene")
    parser.add_argument("--method", choices=("one_pass", "monte_carlo"), default="one_pass")
    parser.add_argument("--output", type=Path, help="JSON")
    add_kind_argument(parser)


def run(args: argparse.Namespace) -> int:
    """Measures, prints what was found and writes it."""
    model, processor = load_checkpoint(args)
    options = decoding_options(args, questions=False)
    kind = KINDS[args.scene_kind]
    scenes = held_out_scenes(args.seed, args.scenes, kind)
    found = measure(model, processor, scenes, options, args.method, kind)
    record = {
        "checkpoint": checkpoint_record(args, model),
        "environment": run_environment(),
        "scene_kind": kind.name,
        "scenes": {"split": SPLIT, "first_seed": args.seed, "count": args.scenes},
        "judge": kind.judge,
        "method": args.method,
        "options": options,
        **found,
    }
    if args.output is not None:
        write_json(args.output, record)
    print(_summary_line(found))
    return 0


def _summary_line(found: dict) -> str:
    """Tells what was found in one line."""
    parts = [(found["wrong_captions"], "captions", found["roc_area"])]
    if names := found.get("names"):
        parts.append((names["wrong"], "names", names["roc_area"]))
    told = [
        f"{wrong} of {found['regions']} {what} wrong; area under the ROC curve of the scores "
        + ("none" if area is None else f"{area:.3f}")
        for wrong, what, area in parts
    ]
    share = found["region_found"]
    region = "none" if share is None else f"{share:.1%}"
    return "; ".join(
        [*told, f"region found for {region} of {found['captions_looked_for']} captions"]
    )
