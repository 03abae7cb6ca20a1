"""Shows the model on a scene that it has not seen: captions, answers, a template, an animation."""

import argparse
import re
import sys
from pathlib import Path

from ..common.files import only_run, write_bytes
from ..scenes.example_scenes import EMBEDDED_KIND, EXAMPLE_KINDS, ExampleScene, open_example
from .captioning.animation import draw_history, encode_animation
from .captioning.captioner import RegionCaptioner
from .captioning.drawing import encode_image
from .captioning.results import RegionCaptions

Files = dict[str, bytes]  # by name


def main(arguments: list[str] | None = None) -> int:
    """Prints what the model says beside what is true, and writes the drawings.

    They are `scene.png`, `captions.png`, the animation `captions.gif`, `answer.png` and, where the
    kind of scenes has questions about single regions, `region_answers.png`.
    """
    args = _parser().parse_args(arguments)
    try:
        scene = open_example(args.scene_kind, args.scene)
        captioner = RegionCaptioner.from_pretrained(args.model, subfolder=args.subfolder)
    except (ValueError, OSError) as error:  # OSError: a checkpoint that is not there, among others
        print(f"demo: {error}", file=sys.stderr)
        return 2

    files = {"scene.png": encode_image(scene.image, ".png"), **_caption(captioner, scene)}
    if all(thing.question for thing in scene.objects):
        length = EXAMPLE_KINDS[args.scene_kind].answer_length
        files |= _ask_regions(captioner, scene, length)
    _fill_template(captioner, scene)
    files |= _ask(captioner, scene)

    with only_run(args.output):
        for name, content in files.items():
            write_bytes(args.output / name, content)
    print(f"drawn in {args.output}: {', '.join(files)}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--output", type=Path, default=Path("outputs/demo"), help="folder")
    add("--model", help="folder or Hub id (default: the embedded model)")
    add("--subfolder", help="of the model")
    help_text = f"what the model knows (default: {EMBEDDED_KIND}, as the embedded model)"
    add("--scene-kind", choices=tuple(EXAMPLE_KINDS), default=EMBEDDED_KIND, help=help_text)
    kept = ", ".join(map(str, EXAMPLE_KINDS["things"].shown))
    add("--scene", type=int, help=f"seed of the scene; of things one out of {kept}")
    return parser


def _caption(captioner: RegionCaptioner, scene: ExampleScene) -> Files:
    """Captions every region, and draws the result and the way there."""
    masks = [thing.mask for thing in scene.objects]
    result = captioner(scene.image, masks, return_history=True)
    truths = [thing.caption for thing in scene.objects]

    _print_regions("a caption for each region", result, zip(result.captions, truths, strict=True))
    print(f"   {result.tokens_per_forward:.1f} tokens a forward pass\n")
    return {
        "captions.png": encode_image(result.draw(), ".png"),
        "captions.gif": encode_animation(draw_history(result), ".gif"),
    }


def _ask_regions(captioner: RegionCaptioner, scene: ExampleScene, length: int | None) -> Files:
    """Asks each region its own question; an answer has `length` tokens at most."""
    asked = [thing.question for thing in scene.objects]
    questions, truths = [one.question for one in asked], [one.answer for one in asked]
    masks = [thing.mask for thing in scene.objects]
    result = captioner(scene.image, masks, questions=questions, caption_length=length)

    shown = [_as_people_count(question) for question in questions]
    said = [f"{q} {a}" for q, a in zip(shown, result.captions, strict=True)]
    _print_regions("a question for each region", result, zip(said, truths, strict=True))
    print()
    return {"region_answers.png": encode_image(result.draw(), ".png")}


def _fill_template(captioner: RegionCaptioner, scene: ExampleScene):
    """Fills the scene's template for each region."""
    masks = [thing.mask for thing in scene.objects]
    result = captioner(scene.image, masks, template=scene.template)
    found = [_listed(region.fields) for region in result.regions]
    truths = [_listed(thing.fields) for thing in scene.objects]
    print(scene.template)
    _print_regions("its fields for each region", result, zip(found, truths, strict=True))
    print()


def _ask(captioner: RegionCaptioner, scene: ExampleScene) -> Files:
    """Asks a question about the whole image."""
    question = scene.questions[0]
    answer = captioner.ask(scene.image, question.question)
    print(f"{answer} (the truth: {question.answer}), {answer.seconds:.2f} s\n")
    return {"answer.png": encode_image(answer.draw(), ".png")}


def _print_regions(title: str, result: RegionCaptions, pairs):
    """Prints what is said of each region and, below it, the truth."""
    print(f"{title}, {result.seconds:.2f} s")
    for number, (said, truth) in enumerate(pairs, 1):
        print(f"{number}  {said}\n   truth: {truth}")


def _as_people_count(question: str) -> str:
    """Numbers the regions that a question names from 1, as they are printed and drawn."""
    return re.sub(r"<region (\d+)>", lambda named: f"<region {int(named[1]) + 1}>", question)


def _listed(fields: dict) -> str:
    """Returns fields as text, by the names that the template gives them."""
    return ", ".join(f"{name}: {value}" for name, value in fields.items())


if __name__ == "__main__":
    sys.exit(main())
