"""Reading benchmarks: the published forms, one's own COCO file, the Hub, and what is refused."""

import json
from pathlib import Path

import numpy as np
import pytest
from perceptiondlm.evaluation import benchmarks
from perceptiondlm.evaluation.benchmarks import load_benchmark
from PIL import Image

SIZE = (40, 60)  # height, width of the images below
CHOICES = [["It is red.", 1], ["It is not mentioned.", 0], ["It is blue.", -1]]
QUESTIONS = [
    {"question": "Which applies?", "choices": CHOICES, "type": "positive"},
    {
        "question": "Which applies?",
        "choices": [["A cat is mentioned.", -1], ["A cat is not mentioned.", 1]],
        "type": "negative",
        "subtype": "salient negative",
    },
]


def box_rle(x0: int, y0: int, x1: int, y1: int, size=SIZE) -> dict:
    """A box as uncompressed COCO RLE: runs down the columns, zeros first."""
    mask = np.zeros(size, dtype=bool)
    mask[y0:y1, x0:x1] = True
    flat = mask.flatten(order="F").astype(int)
    edges = np.flatnonzero(np.diff(np.concatenate([[0], flat, [0]])))
    runs = np.diff(np.concatenate([[0], edges, [flat.size]])).tolist()
    return {"size": list(size), "counts": runs if runs[-1] else runs[:-1]}


def write_paradlc(folder: Path, images: int = 2, regions: int = 2) -> Path:
    """A folder in ParaDLC-Bench's form with images and two questions a region."""
    (folder / "images").mkdir(parents=True)
    content = []
    for i in range(images):
        Image.new("RGB", SIZE[::-1], (40 * i, 80, 120)).save(folder / "images" / f"{i}.png")
        found = [
            {"index": r, "category_name": "dog", "mask_rle": box_rle(5 + 9 * r, 4, 12 + 9 * r, 20)}
            for r in range(regions)
        ]
        image = {"image_id": f"7{i}", "file_name": f"{i}.png", "annotations": found}
        content.append({**image, "height": SIZE[0], "width": SIZE[1]})
    keys = [f"{image['image_id']}_{a['index']}" for image in content for a in image["annotations"]]
    write(folder / "annotations.json", content)
    write(folder / "class_names.json", {key: f"hound {key}" for key in keys})
    write(folder / "qa.json", {key: QUESTIONS for key in keys})
    return folder


def write(path: Path, content):
    path.write_text(json.dumps(content))


def edit(path: Path, change):
    content = json.loads(path.read_text())
    change(content)
    write(path, content)


def write_coco(folder: Path, name: str = "annotations.json") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    image = {"id": 9, "file_name": "a.png", "height": SIZE[0], "width": SIZE[1]}
    polygon = [[10, 10, 20, 10, 20, 20, 10, 20]]
    regions = [
        {"id": 31, "image_id": 9, "category_id": 2, "segmentation": box_rle(1, 1, 5, 5)},
        {"id": 32, "image_id": 9, "category_id": 2, "segmentation": polygon},
    ]
    categories = [{"id": 2, "name": "Boat"}]
    file = folder / name
    write(file, {"images": [image], "annotations": regions, "categories": categories})
    return file


def test_a_paradlc_folder_is_keyed_by_image_and_index(tmp_path):
    benchmark = load_benchmark(write_paradlc(tmp_path / "b"))
    assert benchmark.name == "paradlc"
    assert [s.key for s in benchmark.samples] == ["70_0", "70_1", "71_0", "71_1"]
    sample = benchmark.samples[2]
    assert (sample.image_id, sample.size, sample.category) == ("71", SIZE, "dog")
    assert sample.class_name == "hound 71_0"
    assert sample.image_path == tmp_path / "b" / "images" / "1.png"
    assert [q.type for q in benchmark.questions["71_0"]] == ["positive", "negative"]


def test_a_coco_folder_with_questions_is_keyed_by_annotation(tmp_path):
    write_coco(tmp_path)
    write(tmp_path / "qa.json", {"32": QUESTIONS, "31": QUESTIONS[:1]})
    write(tmp_path / "class_names.json", {"31": "rowing boat"})
    benchmark = load_benchmark(tmp_path)
    assert [s.key for s in benchmark.samples] == ["32", "31"]  # in the order of the questions
    assert [s.class_name for s in benchmark.samples] == ["Boat", "rowing boat"]


def test_a_coco_file_of_ones_own_needs_no_questions(tmp_path):
    file = write_coco(tmp_path, "mine.json")
    benchmark = load_benchmark(file, images=tmp_path / "photos")
    assert benchmark.questions == {}
    assert benchmark.samples[0].image_path == tmp_path / "photos" / "a.png"


def test_polygons_become_masks_of_the_image_s_size(tmp_path):
    from pycocotools import mask as coco

    sample = load_benchmark(write_coco(tmp_path)).samples[1]
    mask = coco.decode(sample.mask)
    assert mask.shape == SIZE
    assert mask[11:19, 11:19].all() and mask.sum() == 100


def test_a_hub_id_is_downloaded(tmp_path, monkeypatch):
    write_paradlc(tmp_path / "snapshot" / "annotations")  # as the published datasets nest it
    asked = []

    def download(repo_id, revision):
        asked.append((repo_id, revision))
        return tmp_path / "snapshot"

    monkeypatch.setattr(benchmarks, "download_benchmark", download)
    assert len(load_benchmark("someone/some-bench", revision="v1").samples) == 4
    assert asked == [("someone/some-bench", "v1")]


def test_the_download_asks_the_hub_for_a_dataset(tmp_path, monkeypatch):
    import huggingface_hub

    asked = {}

    def snapshot_download(repo_id, **options):
        asked.update(options, repo_id=repo_id)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert benchmarks.download_benchmark("a/b") == tmp_path
    assert asked == {"repo_id": "a/b", "repo_type": "dataset", "revision": None}


def test_no_such_benchmark_is_a_file_not_found(tmp_path):
    with pytest.raises(FileNotFoundError, match="annotations.json"):
        load_benchmark(tmp_path)


@pytest.mark.parametrize(
    "name", ["../a.png", "x/../../a.png", "/etc/a.png", "..\\a.png", "C:\\a.png", "", ".", "a\0", 3]
)
def test_a_file_name_outside_the_images_is_refused(tmp_path, name):
    folder = write_paradlc(tmp_path)
    edit(folder / "annotations.json", lambda c: c[1].update(file_name=name))
    with pytest.raises(ValueError, match=r"annotations.json: image 1.*expected a file_name"):
        load_benchmark(folder)


def test_a_file_name_in_a_folder_of_the_images_is_allowed(tmp_path):
    folder = write_paradlc(tmp_path)
    edit(folder / "annotations.json", lambda c: c[0].update(file_name="sub/../sub/a.png"))
    assert load_benchmark(folder).samples[0].image_path == tmp_path / "images" / "sub" / "a.png"


def region(content):
    return content[0]["annotations"][1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c[0].pop("height"), "image 0: expected the fields"),
        (lambda c: c[0].update(height=0), "height and width of 1 or more"),
        (lambda c: c[0].update(annotations={}), "image 0: expected a list, got dict"),
        (lambda c: c.__setitem__(0, 5), "image 0: expected an object, got int"),
        (lambda c: region(c).pop("mask_rle"), "image 0, annotation 1: expected the fields"),
        (lambda c: region(c).update(mask_rle=None), "expected a COCO RLE or polygons, got None"),
        (lambda c: region(c)["mask_rle"].update(size=[2, 2]), r"height and width \[40, 60\]"),
        (lambda c: region(c).update(index=0), "expected every region once, got '70_0'"),
    ],
)
def test_a_bad_record_is_refused_with_its_file_and_place(tmp_path, change, message):
    folder = write_paradlc(tmp_path)
    edit(folder / "annotations.json", change)
    with pytest.raises(ValueError, match=f"annotations.json.*{message}"):
        load_benchmark(folder)


def test_other_json_and_no_json_are_refused_by_name(tmp_path):
    folder = write_paradlc(tmp_path)
    write(folder / "annotations.json", {"images": []})
    with pytest.raises(ValueError, match="annotations.json: expected a list of images"):
        load_benchmark(folder)
    (folder / "annotations.json").write_text("{")
    with pytest.raises(ValueError, match="expected JSON in .*annotations.json"):
        load_benchmark(folder)


def test_questions_about_no_region_are_refused(tmp_path):
    folder = write_paradlc(tmp_path)
    edit(folder / "qa.json", lambda c: c.update({"70_5": []}))
    with pytest.raises(ValueError, match="qa.json: expected questions about.*'70_5'"):
        load_benchmark(folder)


def test_an_annotation_of_no_image_is_refused(tmp_path):
    file = write_coco(tmp_path)
    edit(file, lambda c: c["annotations"][1].update(image_id=8))
    with pytest.raises(ValueError, match="annotation 1: expected the id of an image, got 8"):
        load_benchmark(file)
