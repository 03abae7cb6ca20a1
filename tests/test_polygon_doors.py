"""One polygon is the same region, pixel for pixel, wherever it enters; pycocotools is the judge."""

import json

import numpy as np
import pytest
import torch
from perceptiondlm.apps.cli import main
from perceptiondlm.apps.serving.decode import Decoder
from perceptiondlm.apps.serving.limits import Limits
from perceptiondlm.evaluation.benchmarks import load_benchmark
from perceptiondlm.image_loading import load_mask
from perceptiondlm.training.records import coco_records
from pycocotools import mask as coco

WIDTH, HEIGHT = 60, 50
CIRCLE = [
    coordinate
    for angle in np.linspace(0, 2 * np.pi, 50, endpoint=False).tolist()
    for coordinate in (30 + 19.3 * np.cos(angle).item(), 25 + 18.1 * np.sin(angle).item())
]
STAR = [5.5, 3.2, 55.1, 30.7, 2.0, 31.4, 48.9, 4.6, 29.3, 49.8]  # crosses itself
POLYGONS = pytest.mark.parametrize("polygon", [CIRCLE, STAR], ids=["circle", "star"])


def coco_mask(polygon: list[float]) -> np.ndarray:
    return coco.decode(coco.merge(coco.frPyObjects([polygon], HEIGHT, WIDTH))) > 0


def pixels(mask) -> np.ndarray:
    return np.asarray(mask) > 0


def coco_content(polygon: list[float]) -> dict:
    """A COCO file's content with the polygon as its only annotation."""
    image = {"id": 1, "file_name": "a.png", "height": HEIGHT, "width": WIDTH}
    annotation = {"id": 2, "image_id": 1, "segmentation": [polygon], "caption": "a shape"}
    return {"images": [image], "annotations": [annotation]}


@POLYGONS
def test_a_polygon_given_in_python_has_cocos_pixels(polygon):
    for form in ([polygon], {"polygons": [polygon]}):
        assert np.array_equal(pixels(load_mask(form, (WIDTH, HEIGHT))), coco_mask(polygon))


@POLYGONS
def test_a_polygon_sent_to_the_server_has_cocos_pixels(polygon):
    for form in ([polygon], {"polygons": [polygon]}, {"segmentation": [polygon]}):
        mask = Decoder(Limits()).mask(form, (WIDTH, HEIGHT))
        assert np.array_equal(pixels(mask), coco_mask(polygon))


@POLYGONS
def test_a_polygon_of_a_benchmark_has_cocos_pixels(tmp_path, polygon):
    (tmp_path / "own.json").write_text(json.dumps(coco_content(polygon)))
    (sample,) = load_benchmark(tmp_path / "own.json").samples
    assert np.array_equal(coco.decode(sample.mask) > 0, coco_mask(polygon))
    assert np.array_equal(pixels(load_mask(sample.mask, (WIDTH, HEIGHT))), coco_mask(polygon))


@POLYGONS
def test_a_polygon_trained_on_gives_the_inputs_of_cocos_pixels(make, draw_image, polygon):
    processor = make(roi_convention="aligned")[1].image_processor
    ((record, _),) = coco_records(coco_content(polygon))
    image = draw_image(WIDTH, HEIGHT)
    own = processor([image], [record["mask_rles"]])
    expected = processor([image], [[coco_mask(polygon)]])
    assert set(own) == set(expected)
    for name, tensor in expected.items():
        if isinstance(tensor, torch.Tensor):
            assert torch.equal(own[name], tensor), name


@POLYGONS
def test_a_polygon_on_the_command_line_has_cocos_pixels(converted, draw_image, tmp_path, polygon):
    image, masks, captions = (tmp_path / name for name in ("a.png", "in.json", "out.coco.json"))
    draw_image(WIDTH, HEIGHT).save(image)
    masks.write_text(json.dumps(coco_content(polygon)))
    model = ["--model", str(converted("released-region")), "--caption-length", "2"]
    typed = ["--polygon", ",".join(map(str, polygon))]
    command = ["caption", str(image), "--masks", str(masks), *typed, *model]
    assert main([*command, "--captions", str(captions)]) == 0
    annotations = json.loads(captions.read_text())["annotations"]
    assert len(annotations) == 2  # of the file, and as typed
    for annotation in annotations:
        assert np.array_equal(coco.decode(annotation["segmentation"]) > 0, coco_mask(polygon))
