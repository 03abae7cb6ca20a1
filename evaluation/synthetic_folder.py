"""Makes scenes into a folder in ParaDLC-Bench's form, and judges captions of it exactly."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace

from tqdm import tqdm

from ..common.folders import new_folder
from ..image_masks import encode_rle
from ..scenes.language import VOCABULARY, named_values
from ..scenes.shapes import Scene, render_scene
from .benchmarks import Benchmark
from .files import write_json
from .synthetic_judge import borrowed_attributes, score_captions, wrong_attributes

TRUTH_FILE = "truth.json"  # per region its attributes
WRITTEN = {"images", "annotations.json", "class_names.json", "qa.json", TRUTH_FILE}
RIGHT, UNNAMED, WRONG = range(3)  # choices of a question about an attribute
MENTIONED, UNMENTIONED = range(2)  # choices of a question about another region
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
