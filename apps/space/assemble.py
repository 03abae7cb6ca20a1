"""Makes the folder of a Hugging Face Space: python apps/space/assemble.py FOLDER

The folder holds app.py, README.md, requirements.txt and, as `perceptiondlm`, this package with its
embedded model.
"""

import os
import shutil
import sys
from pathlib import Path

SPACE = Path(os.path.abspath(__file__)).parent
ROOT = SPACE.parents[1]
PARTS = ("apps", "common", "conversion", "regions", "scenes", "tiny")  # beside the root's modules
SKIPPED = shutil.ignore_patterns("__pycache__", "space", "report*")


def assemble(folder: Path):
    """Fills a folder that is not there yet, or is empty."""
    if folder.exists() and any(folder.iterdir()):
        raise FileExistsError(f"expected an empty folder, got {folder}")
    package = folder / "perceptiondlm"
    package.mkdir(parents=True, exist_ok=True)
    for name in ("app.py", "README.md", "requirements.txt"):
        shutil.copyfile(SPACE / name, folder / name)
    for file in [*ROOT.glob("*.py"), ROOT / "LICENSE"]:
        shutil.copyfile(file, package / file.name)
    for part in PARTS:
        if (ROOT / part).is_dir():
            shutil.copytree(ROOT / part, package / part, ignore=SKIPPED)


if __name__ == "__main__":
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        sys.exit(__doc__)
    try:
        assemble(Path(sys.argv[1]))
    except OSError as error:
        sys.exit(f"assemble: {error}")
