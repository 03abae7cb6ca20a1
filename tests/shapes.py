"""Names the fixed model of drawn shapes, for tests that hold what a trained model says.

It is a checkpoint like the embedded one, `tiny/`, but is never trained anew: what it says of its
scene, and of `perceptiondlm.scenes.shapes`, stays as the tests have it. Its code is at the root.
"""

from pathlib import Path

from perceptiondlm.apps.captioning.captioner import RegionCaptioner

ROOT = Path(__file__).parents[1]
SHAPES = "tests/shapes_model"  # a subfolder of ROOT
ARGUMENTS = ["--model", str(ROOT), "--subfolder", SHAPES]  # of a command line
SCENE = ROOT / "tests" / "shapes_scene" / "scene.png"
SCENE_MASKS = [SCENE.with_name(f"scene_mask_{i}.png") for i in (0, 1)]


def shapes_captioner(**options) -> RegionCaptioner:
    """Loads the fixed model; `options` are those of `RegionCaptioner.from_pretrained`."""
    return RegionCaptioner.from_pretrained(ROOT, subfolder=SHAPES, **options)
