"""The list of concepts, and the sets that draw them: packages, drawings, atlases."""

import base64
import hashlib
import io
import json
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from perceptiondlm.scenes import emoji_sets
from perceptiondlm.scenes.concepts import CONCEPTS, Concept, concept_named
from perceptiondlm.scenes.emoji_sets import SETS, Atlas, EmojiSet

STAR = Concept("star", (), "sky", "2b50", False, False, False)
DISK = Concept("disk", (), "sky", "26aa", False, False, False)


# ------------------------------------------------------------------ concepts


def test_the_concepts_are_300_to_450_sorted_by_name():
    names = [concept.name for concept in CONCEPTS]
    assert 300 <= len(names) <= 450 and names == sorted(names)


def test_no_name_or_synonym_is_given_twice():
    words = Counter(word for c in CONCEPTS for word in (c.name, *c.synonyms))
    assert set(words.values()) == {1}


def test_names_are_plain_words_in_lower_case():
    for concept in CONCEPTS:
        for word in (concept.name, *concept.synonyms):
            assert word.replace(" ", "").replace("-", "").isalpha() and word.isascii(), word
            assert word == word.lower() == word.strip()


def test_no_two_concepts_are_one_drawing():
    assert len({concept.codepoints for concept in CONCEPTS}) == len(CONCEPTS)


def test_codepoints_are_written_as_the_sets_write_them():
    for concept in CONCEPTS:
        parts = concept.codepoints.split("-")
        assert [f"{int(part, 16):x}" for part in parts] == parts and "fe0f" not in parts


def test_what_is_alive_edible_or_a_vehicle_agrees_with_the_groups():
    for concept in CONCEPTS:
        assert concept.is_vehicle == (concept.group == "vehicle"), concept
        assert not concept.is_edible or concept.group in {"fruit", "vegetable", "food", "dessert"}
        assert not concept.is_alive or concept.group in {"animal", "plant"}
        assert concept.is_alive or concept.group != "animal"
        assert concept.is_alive + concept.is_edible + concept.is_vehicle <= 1


@pytest.mark.parametrize(
    "name, alive, edible, vehicle",
    [
        ("fire engine", False, False, True),
        ("cat", True, False, False),
        ("cactus", True, False, False),
        ("banana", False, True, False),
        ("teddy bear", False, False, False),
        ("carousel horse", False, False, False),
        ("snowman", False, False, False),
        ("bouquet", False, False, False),
        ("honey pot", False, False, False),
        ("mug of beer", False, False, False),
        ("skateboard", False, False, False),
    ],
)
def test_concepts_are_what_people_say_they_are(name, alive, edible, vehicle):
    found = concept_named(name)
    assert (found.is_alive, found.is_edible, found.is_vehicle) == (alive, edible, vehicle)


@pytest.mark.parametrize("name", ["Cat", "unheard of", "plane"])
def test_what_is_no_name_of_a_concept_raises(name):
    with pytest.raises(ValueError, match="name of a concept, got"):
        concept_named(name)


# ------------------------------------------------------------------ packages


def package(icons: dict, characters: dict) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w:gz") as archive:
        for name, value in (("icons", icons), ("chars", characters)):
            content = json.dumps(value).encode()
            member = tarfile.TarInfo(f"package/{name}.json")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return file.getvalue()


def played_package() -> bytes:
    icons = {
        "width": 32,
        "height": 32,
        "icons": {
            "star": {"body": '<rect x="4" y="8" width="24" height="12" fill="#f00"/>'},
            "disk": {"body": '<circle cx="8" cy="8" r="4" fill="#00f"/>', "width": 16},
        },
    }
    return package(icons, {"2b50": "star", "26aa-FE0F": "disk", "1f600": "absent"})


def integrity_of(content: bytes) -> str:
    return "sha512-" + base64.b64encode(hashlib.sha512(content).digest()).decode()


def npm_that(monkeypatch, tmp_path, script: str) -> None:
    """Puts a command `npm` on the PATH, before all others."""
    npm = tmp_path / "bin" / "npm"
    npm.parent.mkdir()
    npm.write_text(f"#!/bin/sh\n{script}\n")
    npm.chmod(0o755)
    monkeypatch.setenv("PATH", f"{npm.parent}:/usr/bin:/bin")


def test_a_package_is_fetched_by_npm_pack_at_its_pinned_version(monkeypatch, tmp_path):
    content = played_package()
    (tmp_path / "made.tgz").write_bytes(content)
    npm_that(
        monkeypatch,
        tmp_path,
        f'echo "$@" > {tmp_path}/said; [ "$3" = --pack-destination ] && '
        f'cp {tmp_path}/made.tgz "$4/a.tgz"',
    )
    fetched = emoji_sets.fetch_package(EmojiSet("a", "@b/c", "1.2.3", integrity_of(content), "MIT"))
    assert fetched == content
    assert (tmp_path / "said").read_text().startswith("pack @b/c@1.2.3 ")


def test_a_package_that_is_not_the_pinned_one_is_refused(monkeypatch, tmp_path):
    (tmp_path / "made.tgz").write_bytes(b"something else")
    npm_that(monkeypatch, tmp_path, f'cp {tmp_path}/made.tgz "$4/a.tgz"')
    with pytest.raises(ValueError, match="expected @iconify-json/noto@.* with integrity"):
        emoji_sets.fetch_package(SETS["noto"])


def test_what_npm_says_when_it_fails_is_told(monkeypatch, tmp_path):
    npm_that(monkeypatch, tmp_path, "echo no such host >&2; exit 1")
    with pytest.raises(OSError, match="no such host"):
        emoji_sets.fetch_package(SETS["noto"])


def test_without_npm_the_error_names_it(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="expected npm on the PATH"):
        emoji_sets.fetch_package(SETS["noto"])


def test_drawings_are_read_by_codepoints_without_variation_selectors():
    drawings = emoji_sets.read_package(played_package())
    assert set(drawings) == {"2b50", "26aa"}
    assert 'viewBox="0 0 16 32"' in drawings["26aa"]


def test_a_link_in_a_package_is_not_followed():
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w:gz") as archive:
        member = tarfile.TarInfo("package/icons.json")
        member.type, member.linkname = tarfile.SYMTYPE, "/etc/hostname"
        archive.addfile(member)
    with pytest.raises(ValueError, match="expected a file"):
        emoji_sets.read_package(file.getvalue())


# ------------------------------------------------------------------ drawings


def test_a_drawing_is_cropped_to_its_box_and_fills_the_sprite():
    pytest.importorskip("cairosvg")
    drawings = emoji_sets.read_package(played_package())
    sprite = emoji_sets.draw(drawings["2b50"])
    assert sprite.shape == (64, 128, 4)
    assert abs(sprite[2:-2, 2:-2].astype(int) - (255, 0, 0, 255)).max() <= 2

    disk = emoji_sets.draw(drawings["26aa"])
    assert abs(disk.shape[0] - disk.shape[1]) <= 2 and max(disk.shape) == 128
    y, x = np.mgrid[: disk.shape[0], : disk.shape[1]] + 0.5
    round_ = np.hypot(x - disk.shape[1] / 2, y - disk.shape[0] / 2) <= 64
    assert ((disk[..., 3] > 127) ^ round_).mean() < 0.02


@pytest.mark.parametrize(
    "body",
    [
        '<image href="file:///etc/hostname"/>',
        "<image xlink:href='http://localhost:1/a.png'/>",
        '<rect style="fill: url( http://localhost:1/a.svg#b)"/>',
        '<use href="other.svg#a"/>',
    ],
)
def test_a_drawing_that_refers_to_something_outside_is_refused(body):
    pytest.importorskip("cairosvg")
    with pytest.raises(ValueError, match="without references"):
        emoji_sets.draw(f'<svg viewBox="0 0 8 8">{body}</svg>')


def test_an_empty_drawing_is_refused():
    pytest.importorskip("cairosvg")
    with pytest.raises(ValueError, match="empty"):
        emoji_sets.draw('<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 8 8"></svg>')


def test_a_concept_that_a_set_lacks_is_named():
    with pytest.raises(ValueError, match=r"got none of \['star'\]"):
        emoji_sets.draw_set("noto", {}, [STAR])


# ------------------------------------------------------------------ atlases


def sprite_of(side: int) -> np.ndarray:
    return np.random.default_rng(side).integers(0, 256, (side, 128, 4), dtype=np.uint8)


def test_an_atlas_is_read_as_it_was_written(tmp_path):
    sprites = {"star": sprite_of(9), "disk": sprite_of(128)}
    emoji_sets.save_atlas(Atlas("noto", sprites), tmp_path / "a.npz")
    found = emoji_sets.load_atlas("noto", tmp_path / "a.npz", [STAR, DISK])
    assert all(np.array_equal(found.sprites[name], sprites[name]) for name in sprites)
    assert [path.name for path in tmp_path.iterdir()] == ["a.npz"]


def test_an_atlas_without_a_concept_is_refused(tmp_path):
    emoji_sets.save_atlas(Atlas("noto", {"disk": sprite_of(9)}), tmp_path / "a.npz")
    with pytest.raises(ValueError, match="atlas of every concept"):
        emoji_sets.load_atlas("noto", tmp_path / "a.npz", [STAR, DISK])


@pytest.mark.parametrize("content", [b"", b"not an atlas", b"PK\x03\x04 cut off"])
def test_a_broken_atlas_is_refused(tmp_path, content):
    (tmp_path / "a.npz").write_bytes(content)
    with pytest.raises(ValueError, match="atlas of every concept"):
        emoji_sets.load_atlas("noto", tmp_path / "a.npz", [STAR])


def test_a_sprite_of_another_form_is_refused(tmp_path):
    wrong = {"star": np.zeros((4, 4, 3), np.uint8)}
    emoji_sets.save_atlas(Atlas("noto", wrong), tmp_path / "a.npz")
    with pytest.raises(ValueError, match="uint8 of star"):
        emoji_sets.load_atlas("noto", tmp_path / "a.npz", [STAR])


def test_a_set_is_fetched_and_drawn_once(monkeypatch, tmp_path):
    pytest.importorskip("cairosvg")
    fetched = []
    monkeypatch.setattr(emoji_sets, "CONCEPTS", (STAR, DISK))
    monkeypatch.setattr(
        emoji_sets, "fetch_package", lambda chosen: fetched.append(chosen) or played_package()
    )
    monkeypatch.setenv("PERCEPTIONDLM_SCENES", str(tmp_path))
    first, second = (emoji_sets.open_atlas("noto") for _ in range(2))
    assert fetched == [SETS["noto"]]
    assert all(np.array_equal(first.sprites[n], second.sprites[n]) for n in ("star", "disk"))


def test_another_list_of_concepts_has_another_atlas(monkeypatch, tmp_path):
    before = emoji_sets.atlas_path("noto", tmp_path)
    monkeypatch.setattr(emoji_sets, "CONCEPTS", CONCEPTS[1:])
    assert emoji_sets.atlas_path("noto", tmp_path) != before


def test_every_set_is_named_with_its_version_and_license_in_the_attribution():
    text = (Path(emoji_sets.__file__).parent / "ATTRIBUTION.md").read_text(encoding="utf-8")
    for emoji_set in SETS.values():
        row = next(line for line in text.splitlines() if f"`{emoji_set.package}`" in line)
        assert emoji_set.version in row and emoji_set.license.replace("-", " ") in row.replace(
            "-", " "
        )


@pytest.mark.parametrize("name", SETS)
def test_every_concept_is_drawn_by_every_set(name):
    path = emoji_sets.atlas_path(name)
    if not path.is_file():
        pytest.skip(f"needs {path.name}, which the first scene of things makes")
    sprites = emoji_sets.load_atlas(name, path, CONCEPTS).sprites
    assert set(sprites) == {concept.name for concept in CONCEPTS}
    for concept, sprite in sprites.items():
        assert max(sprite.shape[:2]) == emoji_sets.SPRITE_SIDE, concept
        assert (sprite[..., 3] >= emoji_sets.ALPHA_THRESHOLD).mean() > 0.1, concept
    assert len({sprite.tobytes() for sprite in sprites.values()}) == len(CONCEPTS)
