"""`perceptiondlm evaluate synthetic`: evaluates on drawn scenes, which are judged exactly.

Alone, it measures a checkpoint on held-out scenes in one go (`held_out`). `write` makes a folder in
ParaDLC-Bench's form, so that `predict`, `score` and `report` take it as any other. `judge` answers
the questions of such a folder from what is known to be drawn, without asking anybody.
"""

import argparse
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

from ..scenes.shapes import SPLITS
from .asking import Asker
from .benchmarks import load_benchmark
from .checkpoint import (
    FLAGS,
    add_checkpoint_arguments,
    add_decoding_arguments,
    checkpoint_record,
    decoding_options,
    load_checkpoint,
)
from .environment import run_environment
from .files import file_sha256, read_json, run_record_path, write_json
from .held_out import SceneTexts, describe, held_out_scenes, measurements, resolved_options
from .judge import read_captions
from .scene_kinds import KINDS, SPLIT, SceneKind, add_kind_argument
from .synthetic_folder import TRUTH_FILE, judge_scenes, write_scenes
from .synthetic_judge import JUDGE_VERSION
from .thing_measures import ThingMeasures

MORE = tuple(field.name for field in dataclasses.fields(ThingMeasures))
MEASURING = (  # options of measuring, which `write` and `judge` have no use for
    *("model", "subfolder", "dtype", "device", "quantize", "scenes", "seed", "batch_size"),
    *("output", "scene_kind", *FLAGS, "options", "regions_per_pass", "texts", *MORE),
)
SUMMARY = (  # of things, in one line
    *("name_accuracy", "clear_name_accuracy", "unseen_style_name_accuracy"),
    *("unseen_background_name_accuracy", "attribute_accuracy", "relation_accuracy", "grammatical"),
    *("mixture_rate", "label_accuracy", "region_question_accuracy", "question_accuracy"),
)


def configure(parser: argparse.ArgumentParser):
    """Adds the options of measuring, and those of `write` and `judge`."""
    add_checkpoint_arguments(parser, required=False)
    add_scene_arguments(parser)
    add_decoding_arguments(parser)
    add = parser.add_argument
    add("--regions-per-pass", type=int, help="at most; 1: one region at a time")
    add("--texts", help="also write every caption and answer beside the truth (JSON)")
    ThingMeasures.add_arguments(parser)
    parser.set_defaults(run_action=run_measure, of_measuring=parser.get_default)

    # Options of the actions are stored under other names: argparse would overwrite those above.
    actions = parser.add_subparsers(dest="action", metavar="[write | judge]")
    write = actions.add_parser("write", help="draw scenes into a benchmark folder")
    write.add_argument("--output", dest="own_output", required=True, help="benchmark folder")
    write.add_argument("--scenes", dest="own_scenes", type=int, default=500, help="how many")
    write.add_argument("--start", type=int, default=0, help="first seed")
    write.add_argument("--split", choices=SPLITS, default="heldout")
    write.set_defaults(run_action=run_write)

    judge = actions.add_parser("judge", help="answer a folder's questions about captions")
    judge.add_argument("--benchmark", required=True, help="folder that `write` made")
    judge.add_argument("--predictions", required=True, help="JSON: {region: caption}")
    judge.add_argument(
        "--output", dest="own_output", required=True, help="where the answers go (JSON)"
    )
    judge.set_defaults(run_action=run_judge)


def add_scene_arguments(parser: argparse.ArgumentParser):
    """Adds the options of measuring on held-out scenes."""
    add = parser.add_argument
    add("--scenes", type=int, default=500, help="how many held-out scenes")
    add("--seed", type=int, default=0, help="of the first scene; the next ones follow")
    add("--batch-size", type=int, default=16, help="images, or questions, in one call")
    add("--output", help="where the report goes (JSON)")
    add_kind_argument(parser)


def run(args: argparse.Namespace) -> int:
    """Measures, writes or judges."""
    if args.action is not None:
        _refuse_measuring(args)
    return args.run_action(args)


def _refuse_measuring(args: argparse.Namespace):
    """Raises ValueError for options of measuring before `write` or `judge`, which ignore them."""
    given = [name for name in MEASURING if getattr(args, name) != args.of_measuring(name)]
    if given:
        names = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        raise ValueError(f"expected no {names} before {args.action}, whose options follow it")


def run_measure(args: argparse.Namespace) -> int:
    """Measures a checkpoint on held-out scenes and writes what was measured."""
    if args.output is None:
        raise ValueError("expected --output REPORT.json, got none")
    options, kind = decoding_options(args), KINDS[args.scene_kind]
    more = _more(args, kind)
    model, processor = load_checkpoint(args)
    resolved_options(model, options)  # refuses a mistake before any work

    asker = Asker(model, processor, args.batch_size, args.regions_per_pass, options)
    scenes = held_out_scenes(args.seed, args.scenes, kind)
    said = describe(asker, scenes)
    measured, texts = measurements(scenes, said, kind), [{} for _ in scenes]
    record = scene_record(args, model, kind) | {
        "decoding_options": resolved_options(model, options),
        "regions_per_pass": args.regions_per_pass,
    }
    if more is not None:
        found, texts = more.measure(asker, scenes, args.seed)
        measured |= found
        record["more"] = dataclasses.asdict(more)

    write_json(args.output, measured | record)
    if args.texts:
        write_json(args.texts, _texts_beside_truth(args.seed, scenes, said, texts))
    print(f"{args.output}: {summary_line(measured)}")
    return 0


def _more(args: argparse.Namespace, kind: SceneKind) -> ThingMeasures | None:
    """Returns what else is measured on a kind; ValueError for its options without a use."""
    given = ThingMeasures.given(args)
    if kind.more is not None:
        return kind.more(**given)
    if given:
        names = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        raise ValueError(f"expected {names} with --scene-kind things alone, got {kind.name}")
    return None


def scene_record(args: argparse.Namespace, model, kind: SceneKind) -> dict:
    """Records where measurements on scenes come from."""
    return {
        **checkpoint_record(args, model),
        "scene_kind": kind.name,
        "scenes": args.scenes,
        "seed": args.seed,
        "split": SPLIT,
        "batch_size": args.batch_size,
        "judge": kind.judge,
        **run_environment(),
    }


def _texts_beside_truth(
    first_seed: int, scenes: Sequence, said: SceneTexts, more: Sequence[dict]
) -> list[dict]:
    """Returns every text about the scenes, and what `more` was said, beside the truth."""
    records = []
    for number, scene in enumerate(scenes):
        captions = [
            {"truth": thing.caption, "caption": text}
            for thing, text in zip(scene.objects, said.captions[number], strict=True)
        ]
        answers = [
            {"question": asked.question, "truth": asked.answer, "answer": text}
            for asked, text in zip(scene.questions, said.answers[number], strict=True)
        ]
        own = {"seed": first_seed + number, "captions": captions, "answers": answers}
        records.append(own | more[number])
    return records


def summary_line(measured: Mapping) -> str:
    """Tells the measurements that matter most in one line."""
    if "name_accuracy" in measured:
        return _thing_line(measured)
    return (
        f"attributes {100 * measured['attribute_accuracy']:.2f} %,"
        f" whole captions {100 * measured['exact_caption_rate']:.2f} %,"
        f" interference {100 * measured['interference_rate']:.2f} %"
        f" ({100 * measured['interference_by_chance']:.2f} % by chance),"
        f" questions {100 * measured['question_accuracy']:.2f} %;"
        f" {measured['regions']} regions, {measured['forwards_per_pass']:.1f} forwards per group,"
        f" TPF {measured['tokens_per_forward']:.2f}, {measured['seconds']:.1f} s"
    )


def _thing_line(measured: Mapping) -> str:
    """Tells the same of scenes of things."""
    shares = (
        f"{name.replace('_', ' ')} {100 * measured[name]:.2f} %"
        for name in SUMMARY
        if measured.get(name) is not None
    )
    return ", ".join(shares) + f"; {measured['forwards_per_pass']:.1f} forwards per group"


def run_write(args: argparse.Namespace) -> int:
    """Writes a benchmark folder."""
    if args.own_scenes < 1:
        raise ValueError(f"expected scenes of 1 or more, got {args.own_scenes}")
    seeds = range(args.start, args.start + args.own_scenes)
    write_scenes(args.own_output, seeds, split=args.split)
    print(f"{args.own_output}: {args.own_scenes} scenes")
    return 0


def run_judge(args: argparse.Namespace) -> int:
    """Judges captions of a benchmark folder and writes the answers."""
    benchmark = load_benchmark(args.benchmark)
    truth = read_json(Path(args.benchmark) / TRUTH_FILE)
    captions = read_captions(args.predictions, benchmark)
    answers, accuracies = judge_scenes(benchmark, truth, captions)

    write_json(args.own_output, answers)
    record = {
        "judge": "exact",
        "prompt_version": JUDGE_VERSION,
        "predictions": str(args.predictions),
        "predictions_sha256": file_sha256(args.predictions),
        "exact": accuracies,
        "environment": run_environment(),
    }
    write_json(run_record_path(args.own_output), record)

    print(
        f"{args.own_output}: attributes {100 * accuracies['attribute_accuracy']:.2f} % right,"
        f" captions {100 * accuracies['exact_caption_rate']:.2f} %,"
        f" interference {100 * accuracies['interference_rate']:.2f} %"
    )
    return 0
