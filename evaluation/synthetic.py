"""`perceptiondlm evaluate synthetic`: evaluates on drawn scenes, which are judged exactly.

Alone, it measures a checkpoint on held-out scenes in one go (`held_out`). `write` makes a folder in
ParaDLC-Bench's form, so that `predict`, `score` and `report` take it as any other. `judge` answers
the questions of such a folder from what is known to be drawn, without asking anybody.
"""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace

from tqdm import tqdm

from ..common.folders import new_folder
from ..generation_rules import ACCEPT_RULES
from ..image_masks import encode_rle
from ..scenes.language import VOCABULARY, named_values
from ..scenes.shapes import SPLITS, Scene, render_scene
from .benchmarks import Benchmark, load_benchmark
from .checkpoint import (
    add_checkpoint_arguments,
    add_decoding_arguments,
    checkpoint_record,
    decoding_options,
    load_checkpoint,
)
from .environment import run_environment
from .files import file_sha256, read_json, run_record_path, write_json
from .held_out import (
    SPLIT,
    SceneTexts,
    describe_scenes,
    held_out_scenes,
    measurements,
    resolved_options,
)
from .held_things import UNSEEN_STYLE, held_out_things, score_things
from .judge import read_captions
from .synthetic_judge import borrowed_attributes, score_captions, wrong_attributes

TRUTH_FILE = "truth.json"  # per region its attributes
WRITTEN = {"images", "annotations.json", "class_names.json", "qa.json", TRUTH_FILE}
THING_JUDGE_VERSION = "things-grammar-1"
JUDGE_VERSION = "synthetic-exact-1"  # to be changed whenever a question or answer below is
RIGHT, UNNAMED, WRONG = range(3)  # choices of a question about an attribute
MENTIONED, UNMENTIONED = range(2)  # choices of a question about another region
MEASURING = (  # options of measuring, which `write` and `judge` have no use for
    *("model", "subfolder", "dtype", "device", "quantize", "scenes", "seed", "batch_size"),
    *("output", "scene_kind", "steps", *ACCEPT_RULES, "options", "regions_per_pass", "texts"),
)
IDENTIFYING = ("shape", "colour", "position")  # what tells regions apart; others often agree


def write_scenes(
    folder: str | Path, seeds: range, *, split: str = "heldout", progress: bool = True
) -> Path:
    """Draws one scene for each seed and writes images, region masks, questions and the truth.

    The folder is written whole or not at all. Raises FileExistsError for one that holds anything
    else than this function writes.
    """
    folder = Path(folder)
    held = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    if held - WRITTEN or (folder.exists() and not folder.is_dir()):
        raise FileExistsError(f"expected a new folder, or one of scenes alone, got {folder}")
    with new_folder(folder, force=True) as unfinished:
        _write_scenes(unfinished, seeds, split, progress)
    return folder


def _write_scenes(folder: Path, seeds: range, split: str, progress: bool):
    (folder / "images").mkdir()
    annotations, truth, questions = [], {}, {}
    for seed in tqdm(seeds, desc="scenes", disable=not progress):
        scene = render_scene(seed, split)
        image_id = f"{split}-{seed:06d}"
        scene.image.save(folder / "images" / f"{image_id}.png")
        annotations.append(_annotation(image_id, scene))

        # What is true of each region, and the questions about it
        attributes = [thing.attributes for thing in scene.objects]
        for index, own in enumerate(attributes):
            truth[f"{image_id}_{index}"] = own
            others = attributes[:index] + attributes[index + 1 :]
            questions[f"{image_id}_{index}"] = region_questions(own, others)

    write_json(folder / "annotations.json", annotations)
    write_json(folder / "class_names.json", {key: own["shape"] for key, own in truth.items()})
    write_json(folder / "qa.json", questions)
    write_json(folder / TRUTH_FILE, truth)


def _annotation(image_id: str, scene: Scene) -> dict:
    """Returns a scene's record in an `annotations.json`."""
    regions = [
        {
            "index": index,
            "category_name": thing.attributes["shape"],
            "mask_rle": encode_rle(thing.mask),
        }
        for index, thing in enumerate(scene.objects)
    ]

    width, height = scene.image.size
    size = {"height": height, "width": width}
    return {"image_id": image_id, "file_name": f"{image_id}.png", **size, "annotations": regions}


def region_questions(own: Mapping[str, str], others: Sequence[Mapping[str, str]]) -> list[dict]:
    """Words a region's questions as a `qa.json` has them: its attributes, then other regions."""
    return [
        *(_attribute_question(name, own) for name in VOCABULARY),
        *(_other_question(other) for other in others),
    ]


def _attribute_question(name: str, own: Mapping[str, str]) -> dict:
    return {
        "question": f"What does the description say of the {name}?",
        "choices": [
            [f"The {name} is given as {own[name]} and nothing else.", 1],
            [f"The {name} is not given.", 0],
            [f"The {name} is given as something other than {own[name]}.", -1],
        ],
        "type": "positive",
    }


def _other_question(other: Mapping[str, str]) -> dict:
    thing = "the {colour} {shape} at the {position}".format(**other)
    return {
        "question": "Is another object described?",
        "choices": [
            [f"Something of {thing} is described.", -1],
            [f"Nothing of {thing} is described.", 1],
        ],
        "type": "negative",
        "subtype": "salient negative",
    }


def exact_answers(
    caption: str, own: Mapping[str, str], others: Sequence[Mapping[str, str]]
) -> list[str]:
    """Answers a region's recognition question and its `region_questions`, in letters.

    An object is recognized by its shape, named alone. Another region is described when a shape,
    color or position is named that is its, and not the region's own.
    """
    named = named_values(caption)
    wrong = wrong_attributes(caption, own)
    answers = ["Yes" if named["shape"] == {own["shape"]} else "No"]

    for name in VOCABULARY:
        choice = RIGHT if name not in wrong else WRONG if named[name] else UNNAMED
        answers.append("ABC"[choice])

    for other in others:
        borrowed = borrowed_attributes(wrong, [other]) & set(IDENTIFYING)
        answers.append("AB"[MENTIONED if borrowed else UNMENTIONED])
    return answers


def judge_scenes(
    benchmark: Benchmark, truth: Mapping[str, dict], captions: Mapping[str, str]
) -> tuple[dict[str, list[str]], dict]:
    """Judges captions exactly; returns the answers to be scored, and accuracies by attribute.

    Regions without a caption have no answers, and count as wrong in the accuracies.
    """
    answers, scenes, texts = {}, [], []
    for keys in _keys_by_image(benchmark):
        # The scene as far as its judge looks at it
        attributes = [truth[key] for key in keys]
        scenes.append(SimpleNamespace(objects=[SimpleNamespace(attributes=a) for a in attributes]))
        texts.append([captions.get(key) for key in keys])

        for index, key in enumerate(keys):
            if key in captions:
                others = attributes[:index] + attributes[index + 1 :]
                answers[key] = exact_answers(captions[key], attributes[index], others)

    return answers, score_captions(scenes, texts)


def _keys_by_image(benchmark: Benchmark) -> list[list[str]]:
    """Returns the keys of each image's regions."""
    keys: dict[str, list[str]] = {}
    for sample in benchmark.samples:
        keys.setdefault(sample.image_id, []).append(sample.key)
    return list(keys.values())


def configure(parser: argparse.ArgumentParser):
    """Adds the options of measuring, and those of `write` and `judge`."""
    add_checkpoint_arguments(parser, required=False)
    add_scene_arguments(parser)
    add_decoding_arguments(parser)
    add = parser.add_argument
    add("--regions-per-pass", type=int, help="at most; 1: one region at a time")
    kinds = ("shapes", "things")
    add("--scene-kind", choices=kinds, default="shapes", help="what the scenes hold")
    add("--texts", help="also write every caption and answer beside the truth (JSON)")
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
    options = decoding_options(args)
    model, processor = load_checkpoint(args)
    resolved_options(model, options)  # refuses a mistake before any work

    common = {
        "batch_size": args.batch_size,
        "regions_per_pass": args.regions_per_pass,
        "options": options,
    }
    draw = held_out_things if args.scene_kind == "things" else held_out_scenes
    scenes = draw(args.seed, args.scenes)
    said = describe_scenes(model, processor, scenes, **common)

    measured = measurements(scenes, said)
    record = _scene_record(args, model, options) | {"regions_per_pass": args.regions_per_pass}
    if args.scene_kind == "things":
        record |= {"scene_kind": "things", "judge": THING_JUDGE_VERSION}
        unseen = held_out_things(args.seed, args.scenes, UNSEEN_STYLE)
        captions = describe_scenes(model, processor, unseen, **common).captions
        measured["unseen_style_name_accuracy"] = score_things(unseen, captions)["name_accuracy"]
    write_json(args.output, measured | record)
    if args.texts:
        write_json(args.texts, _texts_beside_truth(args.seed, scenes, said))
    print(f"{args.output}: {summary_line(measured)}")
    return 0


def _scene_record(args: argparse.Namespace, model, options: dict) -> dict:
    """Records where measurements on scenes come from."""
    return {
        **checkpoint_record(args, model),
        "decoding_options": resolved_options(model, options),
        "scenes": args.scenes,
        "seed": args.seed,
        "split": SPLIT,
        "batch_size": args.batch_size,
        "judge": JUDGE_VERSION,
        **run_environment(),
    }


def _texts_beside_truth(first_seed: int, scenes: Sequence[Scene], said: SceneTexts) -> list[dict]:
    """Returns every caption and answer of the scenes beside what is right."""
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
        records.append({"seed": first_seed + number, "captions": captions, "answers": answers})
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
    names = ("name_accuracy", "attribute_accuracy", "relation_accuracy", "grammatical")
    names += ("mixture_rate", "unseen_style_name_accuracy", "question_accuracy")
    shares = (
        f"{name} {100 * measured[name]:.2f} %" for name in names if measured.get(name) is not None
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
