"""Renders a scene that the model has not seen, captions its objects, asks a question, draws it."""

import argparse
import sys
from pathlib import Path

from ..common.files import only_run, write_bytes
from ..scenes.shapes import render_scene
from .captioning.captioner import RegionCaptioner
from .captioning.drawing import encode_image


def main(arguments: list[str] | None = None) -> int:
    """Writes `scene.png`, the annotated `captions.png` and `answer.png`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("outputs/demo"), help="folder")
    parser.add_argument("--model", help="folder or Hub id (default: the embedded model)")
    parser.add_argument("--subfolder")
    parser.add_argument("--scene", type=int, default=7, help="seed of the scene")
    args = parser.parse_args(arguments)

    # Scenes of this split are never trained on, and what is true of them is known.
    scene = render_scene(args.scene, "heldout")
    question = scene.questions[0]
    captioner = RegionCaptioner.from_pretrained(args.model, subfolder=args.subfolder)
    captions = captioner(scene.image, [thing.mask for thing in scene.objects])
    answer = captioner.ask(scene.image, question.question)

    drawings = {"scene": scene.image, "captions": captions.draw(), "answer": answer.draw()}
    with only_run(args.output):
        for name, drawing in drawings.items():
            write_bytes(args.output / f"{name}.png", encode_image(drawing, ".png"))

    print(captions)
    print(f"{captions.seconds:.2f} s, {captions.tokens_per_forward:.1f} tokens a forward pass")
    print(f"{answer} (the truth: {question.answer})")
    print(f"drawn in {args.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
