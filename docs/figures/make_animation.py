"""Draws `docs/captioning.gif`: the embedded model captions a synthetic scene, step by step.

    python docs/figures/make_animation.py

It does what `perceptiondlm caption scene.png --masks ... --animate captioning.gif` does.
"""

from pathlib import Path

from perceptiondlm.apps.captioning.animation import draw_history, encode_animation
from perceptiondlm.apps.captioning.captioner import RegionCaptioner
from perceptiondlm.scenes.shapes import render_scene

OUTPUT = Path(__file__).parents[1] / "captioning.gif"
SCENE = 55  # seed of a scene that the model was not trained on


def main():
    """Captions the scene and writes the animation."""
    scene = render_scene(SCENE, "heldout")
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
