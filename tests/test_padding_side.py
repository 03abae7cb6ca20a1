"""Tokenizers say that prompts are padded on the left, so that pipelines can batch."""

import copy
import json
import subprocess
import sys
from pathlib import Path

import pytest
from perceptiondlm.convert_checkpoint import convert
from perceptiondlm.image_processing_perceptiondlm import PerceptionDLMImageProcessor
from perceptiondlm.processing_perceptiondlm import PerceptionDLMProcessor
from perceptiondlm.training.tokenizer import train_tokenizer

ROOT = Path(__file__).resolve().parents[1]
QUESTIONS = ["What?", "How many objects are on the table of the picture?", "Who is it, and why?"]

ASK = """
import json, sys
from transformers import pipeline

pipe = pipeline("image-text-to-text", model=sys.argv[1], trust_remote_code=True)
chats = [[{"role": "user", "content": [{"type": "text", "text": q}]}] for q in sys.argv[2:]]
for size in (1, 3):
    answers = pipe(text=chats, batch_size=size, max_new_tokens=6, return_full_text=False)
    print(json.dumps([answer[0]["generated_text"] for answer in answers]))
"""


def side_of(folder: Path) -> str:
    return json.loads((folder / "tokenizer_config.json").read_text())["padding_side"]


@pytest.mark.parametrize(
    "name", ["released-region", "released-base", "released-llava", "wide/released-region"]
)
def test_a_converted_tokenizer_pads_on_the_left(converted, name):
    assert side_of(converted(name)) == "left"


def test_the_embedded_tokenizer_pads_on_the_left(tmp_path):
    assert side_of(ROOT / "tiny") == "left"
    assert side_of(convert(ROOT / "tiny", tmp_path / "own")) == "left"


def test_a_tokenizer_from_scratch_pads_on_the_left(tmp_path):
    train_tokenizer(["a red circle"], 400).save_pretrained(tmp_path)
    assert side_of(tmp_path) == "left"


@pytest.fixture
def older(make, tmp_path):
    """A checkpoint saved when the tokenizer still said that it pads on the right."""
    model, processor = make()
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"padding_side": "right"}))
    return tmp_path


def test_an_older_tokenizer_is_set_right(older, tmp_path):
    processor = PerceptionDLMProcessor.from_pretrained(older, trust_remote_code=True)
    assert processor.tokenizer.padding_side == "left"
    processor.save_pretrained(tmp_path / "again")
    assert side_of(tmp_path / "again") == "left"


def test_a_pipeline_answers_alike_one_by_one_and_in_batches(older):
    command = [sys.executable, "-c", ASK, str(older), *QUESTIONS]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    alone, together = map(json.loads, done.stdout.splitlines()[-2:])
    assert alone == together and len(alone) == len(QUESTIONS)


def test_the_tokenizer_that_a_processor_is_made_of_stays_as_it_is(tokenizer):
    given = copy.copy(tokenizer)
    given.padding_side = "right"
    processor = PerceptionDLMProcessor(PerceptionDLMImageProcessor(), given)
    assert given.padding_side == "right"
    assert processor.tokenizer.padding_side == "left"
