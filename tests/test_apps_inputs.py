"""Images and regions from files, trustworthy or not."""

import contextlib
import json
import os
import struct
import threading
import zlib
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
from perceptiondlm.apps.captioning.inputs import find_images
from perceptiondlm.image_processing_perceptiondlm import load_mask
from perceptiondlm.regions import files
from perceptiondlm.regions.files import ImageSource, open_image
from perceptiondlm.regions.label_maps import split_labels
from perceptiondlm.regions.sources import LabelMaps, gather_regions, open_sources
from PIL import Image

SIZE = (20, 12)


def save(path, array=None, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    values = np.zeros(SIZE[::-1], np.uint8) if array is None else array
    Image.fromarray(values).save(path, **options)
    return path


def block(left, top, right, bottom) -> np.ndarray:
    mask = np.zeros(SIZE[::-1], np.uint8)
    mask[top:bottom, left:right] = 255
    return mask


def image_files(folder, *names) -> list[ImageSource]:
    return find_images([str(save(folder / name)) for name in names])


def origins(source, image) -> list[str]:
    return [region.origin for region in source.regions(image, SIZE)]


def boxes(source, image) -> list[tuple]:
    return [load_mask(r.mask, SIZE).getbbox() for r in source.regions(image, SIZE)]


def declare_png(path, width: int, height: int):
    """A PNG whose header promises more pixels than its few bytes hold."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)

    def chunk(kind: bytes, data: bytes) -> bytes:
        check = zlib.crc32(kind + data)
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", check)

    data = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + data)
    return path


def write_json(path, content):
    path.write_text(json.dumps(content))
    return str(path)


# Images.


def test_a_folder_gives_its_images_in_order_and_nothing_else(tmp_path):
    for name in ("b.jpg", "a.png", "sub/c.png"):
        save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("")
    assert [p.stem for p in find_images([str(tmp_path)])] == ["a", "b"]
    assert [p.stem for p in find_images([str(tmp_path)], recursive=True)] == ["a", "b", "c"]


def test_a_pattern_is_expanded(tmp_path):
    for name in ("cat.png", "car.png", "dog.png"):
        save(tmp_path / name)
    assert [p.stem for p in find_images([str(tmp_path / "ca*.png")])] == ["car", "cat"]


def test_an_image_named_twice_comes_once(tmp_path):
    path = str(save(tmp_path / "a.png"))
    assert len(find_images([path, str(tmp_path), path])) == 1


@pytest.mark.parametrize("name", ["nothing.png", "no*.png", "empty"])
def test_an_argument_that_names_nothing_is_said(tmp_path, name):
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=name.replace("*", ".")):
        find_images([str(tmp_path / name)])


POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"
SVG = b"<svg xmlns='http://www.w3.org/2000/svg'/>"


@pytest.mark.parametrize("content", [SVG, b"<html></html>", POSTSCRIPT, b"", b"\x89PNG"])
def test_what_is_no_image_is_refused(tmp_path, content):
    path = tmp_path / "image.png"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="image.png"):
        open_image(str(path))


@pytest.mark.parametrize("side", [10_000, 20_000, 60_000])
def test_a_decompression_bomb_is_refused_by_its_header(tmp_path, side):
    path = declare_png(tmp_path / "bomb.png", side, side)
    with pytest.raises(ValueError, match="pixels"):
        open_image(str(path))


def test_a_huge_file_is_refused_unread(tmp_path):
    path = tmp_path / "huge.png"
    with path.open("wb") as file:
        file.truncate(files.MAX_IMAGE_BYTES + 1)  # sparse
    with pytest.raises(ValueError, match="at most 256 MiB"):
        open_image(str(path))


def test_a_pipe_is_no_image(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(FileNotFoundError):
        open_image(str(tmp_path / "pipe.png"))


class _Images(BaseHTTPRequestHandler):
    """Serves an image of 2x1 pixels, and endless noise."""

    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        with contextlib.suppress(OSError):
            if self.path == "/endless":
                while True:
                    self.wfile.write(b"\0" * (1 << 16))
            Image.new("RGB", (2, 1), "red").save(self.wfile, "PNG")

    def log_message(self, *_):
        pass


@pytest.fixture
def address():
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Images)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_an_image_is_fetched_from_the_web(address):
    (image,) = find_images([f"{address}/red.png"])
    assert (image.stem, open_image(image.path).size) == ("red", (2, 1))


def test_an_endless_download_is_cut_off(address, monkeypatch):
    monkeypatch.setattr(files, "MAX_IMAGE_BYTES", 1 << 20)
    with pytest.raises(ValueError, match="at most 1 MiB"):
        open_image(f"{address}/endless")


def test_a_server_that_is_not_there_is_a_value_error():
    with pytest.raises(ValueError, match="expected .* at http:.*a.png, got"):
        open_image("http://127.0.0.1:9/a.png")


# Masks by name.


def test_masks_go_with_the_image_they_are_named_after(tmp_path):
    cat, cat_2, dog = image_files(tmp_path / "photos", "cat.jpg", "cat_2.jpg", "dog.jpg")
    for name in ("cat_10", "cat_9", "cat_mask", "cat_2_0", "dog", "catfish", "category_1"):
        save(tmp_path / "masks" / f"{name}.png", block(1, 1, 5, 5))
    save(tmp_path / "masks" / "dog" / "tail.png", block(1, 1, 5, 5))
    (source,) = open_sources([str(tmp_path / "masks")], [cat, cat_2, dog])
    assert origins(source, cat) == ["cat_9.png", "cat_10.png", "cat_mask.png"]
    assert origins(source, cat_2) == ["cat_2_0.png"]
    assert origins(source, dog) == ["dog.png", "tail.png"]


def test_an_image_is_not_its_own_mask(tmp_path):
    (cat,) = image_files(tmp_path, "cat.png")
    save(tmp_path / "cat_0.png", block(1, 1, 5, 5))
    (source,) = open_sources([str(tmp_path)], [cat])
    assert origins(source, cat) == ["cat_0.png"]


def test_single_masks_for_several_images_are_refused(tmp_path):
    two = image_files(tmp_path, "a.png", "b.png")
    with pytest.raises(ValueError, match="folder of masks"):
        open_sources([str(save(tmp_path / "mask.png"))], two)


def test_a_mask_of_another_size_is_refused(tmp_path):
    (cat,) = image_files(tmp_path, "cat.png")
    (source,) = open_sources([str(save(tmp_path / "mask.png", block(0, 0, 5, 5).T))], [cat])
    with pytest.raises(ValueError, match="20x12, got 12x20"):
        source.regions(cat, SIZE)


@pytest.mark.parametrize("kind", ["JPEG", "MPO"])
def test_a_jpeg_of_thousands_of_scans_is_named_and_a_progressive_one_opened(tmp_path, kind):
    path, image = tmp_path / "a.jpg", Image.effect_noise((64, 64), 50).convert("RGB")
    options = {"save_all": True, "append_images": [image]} if kind == "MPO" else {}
    image.save(path, kind, progressive=True, **options)
    data = path.read_bytes()
    assert 1 < data.count(b"\xff\xda") < 30 and open_image(str(path)).size == (64, 64)
    last = data.rindex(b"\xff\xda")
    path.write_bytes(data[:-2] + data[last:-2] * 6000 + data[-2:])
    with pytest.raises(ValueError, match="at most 256 scans in the JPEG of .*a.jpg, got 60"):
        open_image(str(path))


@pytest.mark.parametrize("size", [(39_000_000, 1), (1, 39_000_000)])
def test_an_image_with_an_endless_side_is_named_before_it_is_decoded(tmp_path, size):
    declare_png(tmp_path / "a.png", *size)
    with pytest.raises(ValueError, match="at most 200,000 pixels along a side of .*a.png"):
        open_image(str(tmp_path / "a.png"))
    with pytest.raises(ValueError, match="at most 200,000 pixels along a side of .*a.png"):
        files.open_mask_file(tmp_path / "a.png")


def test_a_jpeg_mask_is_refused(tmp_path):
    (cat,) = image_files(tmp_path, "cat.png")
    (source,) = open_sources([str(save(tmp_path / "mask.jpg"))], [cat])
    with pytest.raises(ValueError, match="without loss"):
        source.regions(cat, SIZE)


@pytest.mark.parametrize(("name", "kind"), [("mask.png", "JPEG"), ("mask.webp", "WEBP")])
def test_a_lossy_mask_is_refused_whatever_its_name(tmp_path, name, kind):
    (cat,) = image_files(tmp_path, "cat.png")
    Image.fromarray(block(3, 3, 9, 9)).rotate(20).save(tmp_path / name, kind)
    (source,) = open_sources([str(tmp_path / name)], [cat])
    with pytest.raises(ValueError, match=f"{name} without loss"):
        source.regions(cat, SIZE)


def test_a_palette_mask_is_its_colors(tmp_path):
    (cat,) = image_files(tmp_path, "cat.png")
    Image.fromarray(block(3, 3, 9, 9)).quantize(2).save(tmp_path / "mask.png")
    (source,) = open_sources([str(tmp_path / "mask.png")], [cat])
    assert boxes(source, cat) == [(3, 3, 9, 9)]


def test_a_mask_with_an_orientation_is_turned_once(tmp_path):
    (cat,) = image_files(tmp_path, "cat.png")
    exif = Image.Exif()
    exif[0x0112] = 8  # a quarter to the left makes it upright
    stored = Image.fromarray(np.ascontiguousarray(np.rot90(block(3, 2, 9, 5), -1)))
    stored.save(tmp_path / "mask.png", exif=exif)
    (source,) = open_sources([str(tmp_path / "mask.png")], [cat])
    assert boxes(source, cat) == boxes(LabelMaps(tmp_path / "mask.png"), cat) == [(3, 2, 9, 5)]


def test_a_mask_of_the_unrotated_size_is_told_of_the_orientation(tmp_path):
    (cat,) = image_files(tmp_path, "cat.png")
    (source,) = open_sources([str(save(tmp_path / "mask.png", block(0, 0, 5, 5).T))], [cat])
    with pytest.raises(ValueError, match="got 12x20: .*EXIF orientation"):
        source.regions(cat, SIZE)


# Label maps.


def test_every_color_of_a_label_map_is_a_region(tmp_path):
    labels = np.zeros((*SIZE[::-1], 3), np.uint8)
    labels[:4, :6] = (255, 0, 0)
    labels[5:9, 10:20] = (0, 0, 255)
    (cat,) = image_files(tmp_path, "cat.png")
    source = LabelMaps(save(tmp_path / "labels" / "cat.png", labels))
    assert boxes(source, cat) == [(10, 5, 20, 9), (0, 0, 6, 4)]  # by color, blue first
    assert boxes(LabelMaps(tmp_path / "labels"), cat) == boxes(source, cat)


@pytest.mark.parametrize("mode", ["L", "P", "I", "I;16"])
def test_every_value_of_a_gray_or_palette_label_map_is_a_region(mode):
    values = np.zeros(SIZE[::-1], np.int32)
    values[:3, :5], values[6:, 8:] = 1, 200
    if mode == "I;16":
        labels = Image.fromarray(values.astype(np.uint16))
    else:
        labels = Image.fromarray(values if mode == "I" else values.astype(np.uint8))
    if mode == "P":
        labels.putpalette(list(range(256)) * 3)
    found = [load_mask(r.mask, SIZE).getbbox() for r in split_labels(labels, "labels")]
    assert found == [(0, 0, 5, 3), (8, 6, 20, 12)]


def test_voids_and_the_black_of_any_index_are_no_regions(tmp_path):
    values = np.full(SIZE[::-1], 9, np.uint8)  # black
    values[2:9, 1:9] = values[2:9, 11:19] = 255
    values[3:8, 2:8], values[3:8, 12:18] = 0, 4
    labels = Image.fromarray(values).convert("P")
    palette = np.random.default_rng(0).integers(1, 256, (256, 3), dtype=np.uint8)
    palette[9], palette[255] = 0, (224, 224, 192)
    labels.putpalette(palette.tobytes())
    labels.save(tmp_path / "index.png")
    labels.convert("RGB").save(tmp_path / "colors.png")
    (cat,) = image_files(tmp_path, "cat.png")
    objects = [(2, 3, 8, 8), (12, 3, 18, 8)]
    assert boxes(LabelMaps(tmp_path / "index.png"), cat) == objects
    assert sorted(boxes(LabelMaps(tmp_path / "colors.png"), cat)) == objects


def test_a_photograph_is_no_label_map():
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    with pytest.raises(ValueError, match="at most 1000 regions"):
        split_labels(Image.fromarray(noise), "noise.png")


# Annotation files.


def coco(**changes) -> dict:
    return {
        "images": [
            {"id": 7, "file_name": "val/cat.png", "width": SIZE[0], "height": SIZE[1]},
            {"id": 8, "file_name": "dog.png", "width": SIZE[0], "height": SIZE[1]},
        ],
        "annotations": [
            {"id": 1, "image_id": 7, "category_id": 3, "bbox": [1, 2, 4, 5]},
            {"id": 2, "image_id": 7, "segmentation": [[1, 1, 9, 1, 9, 9]]},
            {"id": 3, "image_id": 7, "segmentation": {"size": [12, 20], "counts": [12, 24, 204]}},
            {"id": 4, "image_id": 8, "bbox": [0, 0, 2, 2]},
        ],
        "categories": [{"id": 3, "name": "cat"}],
        **changes,
    }


def test_coco_regions_go_by_the_images_name(tmp_path):
    cat, dog, bird = image_files(tmp_path, "cat.png", "dog.png", "bird.png")
    (source,) = open_sources([write_json(tmp_path / "coco.json", coco())], [cat, dog, bird])
    assert boxes(source, cat) == [(1, 2, 5, 7), (2, 1, 9, 8), (1, 0, 3, 12)]
    assert origins(source, dog) == ["coco.json#4"]
    assert origins(source, bird) == []


def test_coco_ids_and_categories_are_kept(tmp_path):
    (cat,) = image_files(tmp_path, "cat.png")
    (source,) = open_sources([write_json(tmp_path / "coco.json", coco())], [cat])
    region = source.regions(cat, SIZE)[0]
    assert region.annotation == {"id": 1, "image_id": 7, "category_id": 3, "category": "cat"}


def test_equal_names_in_two_folders_are_told_apart_by_the_folder(tmp_path):
    one, two = image_files(tmp_path, "a/cat.png", "b/cat.png")
    images = [{"id": 1, "file_name": "a/cat.png"}, {"id": 2, "file_name": "b/cat.png"}]
    annotations = [{"id": i, "image_id": i, "bbox": [i, 0, 2, 2]} for i in (1, 2)]
    content = {"images": images, "annotations": annotations}
    (source,) = open_sources([write_json(tmp_path / "coco.json", content)], [one, two])
    assert (boxes(source, one), boxes(source, two)) == ([(1, 0, 3, 2)], [(2, 0, 4, 2)])


@pytest.mark.parametrize(
    "name",
    [
        "../../etc/passwd",
        "/etc/passwd",
        "a/../../b.png",
        "C:\\a.png",
        "..\\a.png",
        "a\0.png",
        "",
        None,
        5,
    ],
)
def test_a_file_name_that_leaves_the_folder_is_refused_and_the_rest_goes_on(tmp_path, name):
    (cat,) = image_files(tmp_path, "cat.png")
    content = coco()
    content["images"].append({"id": 9, "file_name": name})
    (source,) = open_sources([write_json(tmp_path / "coco.json", content)], [cat])
    assert len(source.refused) == 1
    assert len(source.regions(cat, SIZE)) == 3


@pytest.mark.parametrize("named_in_file", [True, False])
def test_a_sam_file_goes_with_its_image(tmp_path, named_in_file):
    sa_1, sa_2 = image_files(tmp_path, "sa_1.jpg", "sa_2.jpg")
    rle = {"size": [12, 20], "counts": [24, 12, 204]}
    content = {"annotations": [{"segmentation": rle, "bbox": [2, 0, 1, 12], "area": 12}]}
    if named_in_file:
        content["image"] = {"file_name": "sa_2.jpg"}
    path = tmp_path / ("any.json" if named_in_file else "sa_2.json")
    (source,) = open_sources([write_json(path, content)], [sa_1, sa_2])
    assert (boxes(source, sa_1), boxes(source, sa_2)) == ([], [(2, 0, 3, 12)])


def test_a_folder_of_sam_files_is_read_by_name(tmp_path):
    sa_1, sa_2 = image_files(tmp_path / "photos", "sa_1.jpg", "sa_2.jpg")
    (tmp_path / "sam").mkdir()
    write_json(tmp_path / "sam" / "sa_2.json", {"annotations": [{"bbox": [1, 1, 2, 2]}]})
    sources = open_sources([str(tmp_path / "sam")], [sa_1, sa_2])
    assert [len(gather_regions(sources, p, SIZE)) for p in (sa_1, sa_2)] == [0, 1]


def test_a_plain_list_of_masks_is_understood(tmp_path):
    (cat,) = image_files(tmp_path, "cat.png")
    masks = [{"box": [0, 0, 3, 3]}, [4, 4, 6, 6], {"polygons": [[0, 0, 8, 0, 8, 8]]}]
    (source,) = open_sources([write_json(tmp_path / "masks.json", masks)], [cat])
    assert boxes(source, cat) == [(0, 0, 3, 3), (4, 4, 6, 6), (1, 0, 8, 7)]


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[" * 100_000,
        '"text"',
        "5",
        "{}",
        "[]",
        "\xff",
        '{"images": 5, "annotations": []}',
        '{"images": [], "annotations": [5]}',
        '{"images": [{}], "annotations": []}',
    ],
)
def test_a_damaged_annotation_file_is_refused_by_name(tmp_path, text):
    (cat,) = image_files(tmp_path, "cat.png")
    (tmp_path / "bad.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match="bad.json"):
        open_sources([str(tmp_path / "bad.json")], [cat])


@pytest.mark.parametrize("place", ["{path}", "file://{path}", "http://127.0.0.1:9/{path}"])
def test_a_path_in_an_annotation_file_is_never_opened(tmp_path, place):
    (cat,) = image_files(tmp_path, "cat.png")
    secret = save(tmp_path / "secret.png", block(0, 0, 9, 9))
    path = write_json(tmp_path / "m.json", [place.format(path=secret)])
    (source,) = open_sources([path], [cat])
    with pytest.raises(ValueError, match="expected annotations or masks"):
        source.regions(cat, SIZE)


def test_huge_json_is_refused_unread(tmp_path):
    (cat,) = image_files(tmp_path, "cat.png")
    with (tmp_path / "huge.json").open("wb") as file:
        file.truncate(files.MAX_JSON_BYTES + 1)
    with pytest.raises(ValueError, match="at most 512 MiB"):
        open_sources([str(tmp_path / "huge.json")], [cat])


@pytest.mark.parametrize(
    "annotation",
    [
        {"segmentation": {"size": [12, 20], "counts": "bad\0counts"}},
        {"segmentation": {"size": [40_000, 40_000], "counts": [1_600_000_000]}},
        {"segmentation": [[0, 0]]},
        {"bbox": [0, 0, "wide", 2]},
        {"bbox": [0, 0, 1e999, 2]},
        {},
        "x",
        5,
    ],
)
def test_a_damaged_annotation_is_a_value_error(tmp_path, annotation):
    (cat,) = image_files(tmp_path, "cat.png")
    (source,) = open_sources([write_json(tmp_path / "sam.json", [annotation])], [cat])
    with pytest.raises(ValueError):
        boxes(source, cat)


def test_more_regions_than_memory_are_refused_before_they_are_decoded(tmp_path):
    (cat,) = image_files(tmp_path, "cat.png")
    (source,) = open_sources([write_json(tmp_path / "m.json", [[0, 0, 3, 3]] * 1001)], [cat])
    with pytest.raises(ValueError, match="at most 1000 regions"):
        gather_regions([source], cat, SIZE)
    with pytest.raises(ValueError, match="at most 37 regions"):
        gather_regions([source], cat, (10_000, 8_000))


def test_the_largest_regions_are_kept_in_their_order(tmp_path):
    (cat,) = image_files(tmp_path, "cat.png")
    masks = [[0, 0, 3, 3], [0, 0, 9, 9], [0, 0, 2, 2], [0, 0, 6, 6]]
    (source,) = open_sources([write_json(tmp_path / "m.json", masks)], [cat])
    kept = gather_regions([source], cat, SIZE, max_regions=2)
    assert [region.mask for region in kept] == [[0, 0, 9, 9], [0, 0, 6, 6]]
