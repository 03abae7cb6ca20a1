"""Draws `docs/captioning.gif`: the embedded model captions a scene, step by step.

    python docs/figures/make_animation.py

It does what `perceptiondlm caption scene.png --masks ... --animate captioning.gif` does.
"""

from pathlib import Path

from perceptiondlm.apps.captioning.animation import draw_history, encode_animation
from perceptiondlm.apps.captioning.captioner import RegionCaptioner
from perceptiondlm.scenes.example_scenes import EMBEDDED_KIND, open_example

OUTPUT = Path(__file__).parents[1] / "captioning.gif"
SCENES = {"shapes": 55, "things": 281}  # seeds of scenes that models were not trained on


def main():
    """Captions the scene and writes the animation."""
    scene = open_example(EMBEDDED_KIND, SCENES[EMBEDDED_KIND])
    captioner = RegionCaptioner.from_pretrained()
    masks = [thing.mask for thing in scene.objects]
    result = captioner(scene.image, masks, return_history=True)

    print(result)
    for thing in scene.objects:
        print("truth:", thing.caption)
    OUTPUT.write_bytes(encode_animation(draw_history(result), OUTPUT.suffix))
    print(f"{OUTPUT}: {OUTPUT.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
