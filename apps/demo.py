"""Renders a scene that the model has not seen, captions its objects, asks a question, draws it."""

import argparse
import sys
from pathlib import Path

from ..scenes.shapes import render_scene
from .captioning.captioner import RegionCaptioner


def main(arguments: list[str] | None = None) -> int:
    """Writes `scene.png`, the annotated `captions.png` and `answer.png`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("outputs/demo"), help="folder")
    parser.add_argument("--model", help="folder or Hub id (default: the embedded model)")
    parser.add_argument("--subfolder")
    parser.add_argument("--scene", type=int, default=7, help="seed of the scene")
    args = parser.parse_args(arguments)

    scene = render_scene(args.scene, "heldout")
    question = scene.questions[0]
    captioner = RegionCaptioner.from_pretrained(args.model, subfolder=args.subfolder)
    captions = captioner(scene.image, [thing.mask for thing in scene.objects])
    answer = captioner.ask(scene.image, question.question)

    args.output.mkdir(parents=True, exist_ok=True)
    scene.image.save(args.output / "scene.png")
    captions.draw().save(args.output / "captions.png")
    answer.draw().save(args.output / "answer.png")
    print(captions)
    print(f"{captions.seconds:.2f} s, {captions.tokens_per_forward:.1f} tokens a forward pass")
    print(f"{answer} (the truth: {question.answer})")
    print(f"drawn in {args.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
