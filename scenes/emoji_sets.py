"""Fetches the emoji sets from npm and draws them once, so that scenes find every concept's sprite.

Three sets are for training; OpenMoji is held out as a drawing style that a model has never seen.
A package is checked against its pinned sha512 before anything in it is read. What is kept is an
atlas, one file a set: no SVG is parsed after that. Nothing of the sets is part of this package (see
`scenes/ATTRIBUTION.md`).
"""

import base64
import contextlib
import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import tarfile
import tempfile
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from ..common.extras import extra
from ..common.files import writing
from .concepts import CONCEPTS, Concept

SPRITE_SIDE = 128  # pixels of the longer side of a drawing's box
DRAWING_SIDE = 384  # pixels at which an SVG is drawn, before it is cropped and made smaller
REFERENCE = re.compile(r"""(?:href\s*=\s*["']|url\(\s*["']?)[^#"'\s].{,40}""")  # to a thing outside
MAX_MEMBER = 64 << 20  # bytes of a file in a package
ALPHA_THRESHOLD = 128  # of 255: a pixel from here on belongs to the thing


@dataclass(frozen=True)
class EmojiSet:
    """A set of drawings, as one version of an npm package holds it."""

    name: str
    package: str
    version: str
    integrity: str  # of the package's file, as npm writes it
    license: str


SETS = {
    emoji_set.name: emoji_set
    for emoji_set in (
        EmojiSet(
            "noto",
            "@iconify-json/noto",
            "1.2.9",
            "sha512-DQiuXENbun41ch+XPSV55H9FaWKpHTyz46YIKtSaKYD4fIDDzL1tR6H4np/T38jfrTAeI3rcKF0mqHYeZVAuaw==",
            "Apache-2.0",
        ),
        EmojiSet(
            "fluent",
            "@iconify-json/fluent-emoji-flat",
            "1.2.6",
            "sha512-RY47RgPb47fYUiyrA64sIOL0+UU02s29sXpNBbIQRBUlPlfNFTKUmZDERGuxDs/7yNGWqQYvuaSYM1M4fRXlUw==",
            "MIT",
        ),
        EmojiSet(
            "twemoji",
            "@iconify-json/twemoji",
            "1.2.5",
            "sha512-uKpuIEV0v6K5BW3Mjdyl+XKFVAbbcPxAgifKvEMtZoUZB5+YiY5zaMm2uNNCxyXzAWU9yNLlj41WU6/mvgALsw==",
            "CC-BY-4.0",
        ),
        EmojiSet(
            "openmoji",
            "@iconify-json/openmoji",
            "1.2.29",
            "sha512-vXdhkqcXVSO6suy+m9LbcUM3OdVyuNOtpV8/als/WqfkQIRxevL5Geb/g+6GH/Qwnq1OqksEmaDGTCmZ5nFKJQ==",
            "CC-BY-SA-4.0",
        ),
    )
}
SEEN_SETS = ("noto", "fluent", "twemoji")
UNSEEN_SETS = ("openmoji",)


@dataclass(frozen=True, eq=False)
class Atlas:
    """The drawings of one set: a sprite for every concept."""

    name: str
    sprites: Mapping[str, np.ndarray]  # concept's name -> (h, w, 4) uint8 RGBA, cropped to its box


def cache_folder() -> Path:
    """Returns the folder of the atlases: PERCEPTIONDLM_SCENES, else one in the user's cache."""
    chosen = os.environ.get("PERCEPTIONDLM_SCENES")
    if chosen:
        return Path(chosen)
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "perceptiondlm" / "scenes"


# Packages.


def check_integrity(content: bytes, integrity: str, what: str) -> None:
    """Raises ValueError unless the bytes have the digest that npm writes as sha512-BASE64."""
    found = "sha512-" + base64.b64encode(hashlib.sha512(content).digest()).decode()
    if found != integrity:
        raise ValueError(f"expected {what} with integrity {integrity}, got {found}")


def fetch_package(emoji_set: EmojiSet) -> bytes:
    """Downloads a set's package by way of npm, whose settings name the registry; checks it.

    Raises:
        FileNotFoundError: npm is not installed.
        OSError: npm could not fetch the package.
        ValueError: the package is not the pinned one.
    """
    npm = shutil.which("npm")
    what = f"{emoji_set.package}@{emoji_set.version}"
    if npm is None:
        raise FileNotFoundError(f"expected npm on the PATH, to fetch {what}")

    with tempfile.TemporaryDirectory() as folder:
        command = [npm, "pack", what, "--pack-destination", folder, "--ignore-scripts"]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
        files = list(Path(folder).glob("*.tgz"))
        if done.returncode or len(files) != 1:
            raise OSError(f"expected npm to fetch {what}, got {done.stderr.strip()[-500:]}")
        content = files[0].read_bytes()
    check_integrity(content, emoji_set.integrity, what)
    return content


def read_package(content: bytes) -> dict[str, str]:
    """Reads every drawing of an iconify package; nothing is unpacked to the disk.

    Returns:
        codepoints ("1f692", without the variation selector) -> SVG document.
    """
    with tarfile.open(fileobj=io.BytesIO(content), mode="r:gz") as archive:
        icons, names = (_member(archive, f"package/{name}.json") for name in ("icons", "chars"))

    default = icons.get("width", 16), icons.get("height", 16)
    drawings = {}
    for codepoints, name in names.items():
        icon = icons["icons"].get(name)
        if icon is None:  # another name, or turned: none of those is a concept
            continue
        width, height = icon.get("width", default[0]), icon.get("height", default[1])
        drawings[codepoints.lower().replace("-fe0f", "")] = (
            f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
            f' viewBox="{icon.get("left", 0)} {icon.get("top", 0)} {width} {height}">'
            f"{icon['body']}</svg>"
        )
    return drawings


def _member(archive: tarfile.TarFile, name: str):
    """Reads one JSON file of a package."""
    member = archive.getmember(name)
    if not member.isfile() or member.size > MAX_MEMBER:
        raise ValueError(f"expected a file of at most {MAX_MEMBER} bytes at {name}")
    return json.load(archive.extractfile(member))


# Drawing.


def draw(svg: str) -> np.ndarray:
    """Draws an SVG document, cropped to what is more than a breath of color.

    Returns:
        (h, w, 4) uint8 RGBA, its longer side `SPRITE_SIDE`.

    Raises:
        ValueError: a drawing that refers to something outside it, or that is empty.
    """
    with extra("scenes"):
        import cairosvg

    found = REFERENCE.search(svg)
    if found:
        raise ValueError(f"expected a drawing without references, got {found.group()!r}")

    png = cairosvg.svg2png(
        bytestring=svg.encode(),
        output_width=DRAWING_SIDE,
        output_height=DRAWING_SIDE,
        unsafe=False,  # neither entities nor files nor addresses
    )
    image = Image.open(io.BytesIO(png)).convert("RGBA")
    box = image.getchannel("A").point(lambda alpha: 255 * (alpha >= ALPHA_THRESHOLD)).getbbox()
    if box is None:
        raise ValueError("expected a drawing with something in it, got an empty one")

    lengths = box[2] - box[0], box[3] - box[1]
    size = [max(round(length * SPRITE_SIDE / max(lengths)), 1) for length in lengths]
    return np.asarray(image.resize(size, Image.Resampling.LANCZOS, box=box))


def draw_set(name: str, drawings: Mapping[str, str], concepts: Sequence[Concept]) -> Atlas:
    """Draws the sprite of every concept.

    Args:
        name: of the set.
        drawings: codepoints -> SVG document.

    Raises:
        ValueError: a concept that the set lacks, or whose drawing is empty.
    """
    missing = [concept.name for concept in concepts if concept.codepoints not in drawings]
    if missing:
        raise ValueError(f"expected drawings of all concepts in {name}, got none of {missing}")
    return Atlas(name, {concept.name: draw(drawings[concept.codepoints]) for concept in concepts})


# Atlases.


def save_atlas(atlas: Atlas, path: Path) -> None:
    """Writes an atlas, whole or not at all."""
    with writing(path) as file:
        np.savez(file, **atlas.sprites)


def load_atlas(name: str, path: Path, concepts: Sequence[Concept]) -> Atlas:
    """Reads an atlas.

    Raises:
        FileNotFoundError: none is there.
        ValueError: not an atlas, or one that lacks a concept.
    """
    with path.open("rb") as file:
        try:
            stored = np.load(file, allow_pickle=False)
            arrays = {concept.name: stored[concept.name] for concept in concepts}
        except (KeyError, IndexError, ValueError, zipfile.BadZipFile, EOFError) as error:
            raise ValueError(f"expected an atlas of every concept at {path}: {error}") from error
    sprites = {name: _checked(sprite, name) for name, sprite in arrays.items()}
    return Atlas(name, sprites)


def _checked(sprite: np.ndarray, name: str) -> np.ndarray:
    """Returns a sprite that has the form of one, else raises ValueError."""
    if sprite.dtype != np.uint8 or sprite.ndim != 3 or sprite.shape[2] != 4 or not sprite.size:
        raise ValueError(f"expected (h, w, 4) uint8 of {name}, got {sprite.dtype} {sprite.shape}")
    return sprite


def atlas_path(name: str, folder: Path | None = None) -> Path:
    """Returns where the atlas of a set is kept; its name changes with what it is drawn from."""
    emoji_set = SETS[name]
    keys = [emoji_set.integrity, str(SPRITE_SIDE), str(DRAWING_SIDE)]
    keys += [f"{concept.name} {concept.codepoints}" for concept in CONCEPTS]
    digest = hashlib.sha256("\n".join(keys).encode()).hexdigest()[:12]
    return (folder or cache_folder()) / f"{name}-{emoji_set.version}-{digest}.npz"


def open_atlas(name: str, folder: Path | None = None) -> Atlas:
    """Opens the atlas of a set; the first time it fetches the set's package and draws it.

    Args:
        name: of `SETS`.
        folder: of the cache; `cache_folder()` if None.
    """
    path = atlas_path(name, folder)
    with contextlib.suppress(FileNotFoundError):
        return load_atlas(name, path, CONCEPTS)
    atlas = draw_set(name, read_package(fetch_package(SETS[name])), CONCEPTS)
    save_atlas(atlas, path)
    return atlas
