"""`perceptiondlm evaluate confidence`: what scores tell, on drawn scenes that are judged exactly.

Two questions. Are captions that are wrong less sure than right ones: the area under the ROC curve
of `DiffusionOutput.scores` (1: always, 0.5: no better than chance)? And is the region for its true
caption the one, of all regions of its scene, under which `diffusion_score` finds that caption the
likeliest?
"""

import argparse
import statistics
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

from ..scenes.language import normalize
from ..scenes.shapes import Scene
from .checkpoint import (
    add_checkpoint_arguments,
    add_decoding_arguments,
    checkpoint_record,
    decoding_options,
    load_checkpoint,
)
from .environment import run_environment
from .files import write_json
from .held_out import SPLIT, held_out_scenes


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


def measure(model, processor, scenes: Sequence[Scene], options: dict, method: str) -> dict:
    """Captions the regions of scenes, and looks for the region of each true caption.

    Args:
        options: of `diffusion_generate`.
        method: of `diffusion_score`.

    A true caption that two objects of a scene share is looked for by no one.
    """
    scores: list[float] = []
    is_right: list[bool] = []
    picked: list[bool] = []
    for scene in tqdm(scenes, desc="score", unit="scene"):
        truth = [thing.caption for thing in scene.objects]
        seen = model.see(scene.image, [thing.mask for thing in scene.objects], processor=processor)
        out = model.diffusion_generate(seen, processor=processor, **options)
        scores += out.scores[0]
        is_right += [
            normalize(text) == normalize(true)
            for text, true in zip(out.texts[0], truth, strict=True)
        ]

        # Each true caption for each region.
        found = model.diffusion_score(
            seen, texts=[truth] * len(truth), method=method, processor=processor
        )[0]
        for k, text in enumerate(truth):
            if truth.count(text) == 1:
                likelihoods = [own[k] for own in found]
                picked.append(int(np.argmax(likelihoods)) == k)

    wrong = [score for score, right in zip(scores, is_right, strict=True) if not right]
    right = [score for score, right in zip(scores, is_right, strict=True) if right]
    return {
        "regions": len(scores),
        "wrong_captions": len(wrong),
        "median_score_right": statistics.median(right) if right else None,
        "median_score_wrong": statistics.median(wrong) if wrong else None,
        "roc_area": roc_area(scores, is_right),
        "captions_looked_for": len(picked),
        "region_found": statistics.mean(picked) if picked else None,
    }


def configure(parser: argparse.ArgumentParser):
    """Adds the arguments."""
    add_checkpoint_arguments(parser)
    add_decoding_arguments(parser)
    parser.add_argument("--scenes", type=int, default=500, help="held-out scenes")
    parser.add_argument("--seed", type=int, default=0, help="of the first scene")
    parser.add_argument("--method", choices=("one_pass", "monte_carlo"), default="one_pass")
    parser.add_argument("--output", type=Path, help="JSON")


def run(args: argparse.Namespace) -> int:
    """Measures, prints what was found and writes it."""
    model, processor = load_checkpoint(args)
    options = decoding_options(args, questions=False)
    scenes = held_out_scenes(args.seed, args.scenes)
    found = measure(model, processor, scenes, options, args.method)
    record = {
        "checkpoint": checkpoint_record(args, model),
        "environment": run_environment(),
        "scenes": {"split": SPLIT, "first_seed": args.seed, "count": args.scenes},
        "method": args.method,
        "options": options,
        **found,
    }
    if args.output is not None:
        write_json(args.output, record)
    area = "none" if found["roc_area"] is None else f"{found['roc_area']:.3f}"
    print(
        f"{found['wrong_captions']} of {found['regions']} captions wrong; area under the ROC curve"
        f" of the scores {area}; region found for {found['region_found']:.1%} of"
        f" {found['captions_looked_for']} captions"
    )
    return 0
