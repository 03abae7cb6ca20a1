"""Absurd command lines, requests and training records: each works or is refused as documented.

As in `test_fuzz`, every trial draws from its own seed. A command ends with a documented exit code
and no traceback, a request with an answer or a refusal, and a bad record is named by its line while
the others of its file are used.
"""

import argparse
import copy
import importlib
import json
import random
import re
import shutil
from pathlib import Path

import datasets
import httpx
import pytest
import yaml
from perceptiondlm.apps.captioning.captioner import RegionCaptioner
from perceptiondlm.apps.cli import COMMANDS, main
from perceptiondlm.apps.serving import arguments
from perceptiondlm.apps.serving.pool import WorkerPool
from perceptiondlm.conversion.command import argument_parser
from perceptiondlm.conversion.command import main as convert_main
from perceptiondlm.evaluation.cli import STEPS
from perceptiondlm.training.conversations import ConversationSamples
from perceptiondlm.training.datasets import FileDataset, StreamDataset
from perceptiondlm.training.recipe import ConversationData, RegionData
from perceptiondlm.training.regions import RegionSamples
from PIL import Image
from test_evaluation_benchmarks import write_paradlc
from training_runs import recipe_values

VECTORS = Path(__file__).parent / "fixtures" / "vectors"
BOX = {"box": [5, 5, 30, 30]}
# Trials of each door in the default run, and in the slow one.
TRIALS = {
    "caption": (2, 1000), "publish": (3, 400), "serve": (0, 400), "web": (0, 200),
    "train": (0, 600), "convert": (2, 400), "judge": (0, 400), "predict": (0, 300),
    "score": (2, 300), "report": (0, 300), "synthetic": (0, 150), "sweep": (0, 100),
    "latency": (0, 100), "requests": (0, 4000), "records": (1, 100),
}  # fmt: skip


def trials(name: str):
    """Runs a test for a door with the seeds of the default run and, marked slow, the others."""
    quick, all_of_them = TRIALS[name]
    slow = pytest.param(range(quick, all_of_them), marks=pytest.mark.slow, id=f"{name}-thousands")
    few = pytest.param(range(quick), id=f"{name}-few")
    return pytest.mark.parametrize("seeds", [few, slow] if quick else [slow])


# Command lines.


BAD = [
    "", " ", "-1", "0", "1", "2", "3", "0.5", "-0.5", "1e400", "nan", "inf", "x", "ä", "null", "[]",
    "{}", '{"a": 1}', "nowhere", "nowhere/x.json", "/", ".", "..", "-", "--", "--x", "\ud800", "\0",
    "a" * 300, "a" * 5000, "image.png", "text.txt", "empty.json", "list.json", "bench", "model",
    "/dev/null", "file:///etc/passwd", "http://127.0.0.1:1/a.png", "somebody/model", "cpu",
    "cuda:9",
]  # fmt: skip
# What makes sense, so that trials get beyond the first check.
GOOD = {
    "pictures": ["image.png", "images", "image.*"],
    "masks": ["mask.png", "list.json", "coco.json", "masks"],
    "label_maps": ["mask.png"],
    "box": ["1,1,20,20", "5,5,9,9"],
    "polygon": ["1,1,20,1,20,20"],
    "captions": ["new.json", "new.jsonl", "new.txt"],
    "output": ["new.png", "new.json", "made"],
    "animate": ["new.gif", "new.webp"],
    "own_output": ["made", "new.json"],
    "question": ["What is it?"],
    "caption_length": ["2"],
    "max_new_tokens": ["2"],
    "steps": ["1", "2"],
    "model": ["model"],
    "device": ["cpu"],
    "dtype": ["auto", "float32"],
    "benchmark": ["bench"],
    "annotations": ["bench"],
    "predictions": ["captions.json"],
    "answers": ["answers.json"],
    "scores": ["scores.json"],
    "measurements": ["scores.json"],
    "rows": ["scores.json"],
    "base_url": ["http://127.0.0.1:1/v1"],
    "source": ["model"],
    "folder": ["model"],
    "repo_id": ["somebody/model"],
    "limit": ["1"],
    "option": ["caption_length=2", "steps=1"],
    "regions": ["1", "1,2"],
    "repeats": ["1"],
    "port": ["0", "8000"],
    "recipe": ["recipe.yaml"],
}
# What would take long, reach out or never end.
FEW = ["1", "1", "1", "0", "-1", "x"]
FIXED = {
    "attempts": ["1"],
    "first_delay": ["0"],
    "timeout": ["1"],
    "scenes": FEW,
    "own_scenes": FEW,
    "compile": None,
    "open": None,
}


def parser_of(name: str) -> argparse.ArgumentParser:
    """The parser of a command, of a step of `evaluate`, or of the converter."""
    if name == "convert":
        return argument_parser()
    module = STEPS[name][0] if name in STEPS else COMMANDS[name][0]
    parser = argparse.ArgumentParser()
    importlib.import_module(module).configure(parser)
    return parser


def drawn_arguments(draw: random.Random, parser: argparse.ArgumentParser) -> list[str]:
    """An argument for each position and for some options, required ones nearly always."""
    words: list[str] = []
    for action in parser._actions:
        if isinstance(action, (argparse._HelpAction, argparse._SubParsersAction)):
            continue
        is_option = bool(action.option_strings)
        wanted = 0.97 if action.required else 0.12 if is_option else 0.8
        wanted = 0.6 if action.dest in ("box", "model", "device", "caption_length") else wanted
        # `latency` has an option of the same name as the files of `caption`
        fixed = action.dest in FIXED or action.option_strings == ["--pictures"]
        few = FIXED.get(action.dest, FEW)
        if few is None or (not fixed and draw.random() > wanted):
            continue
        values = [draw.choice(few)] if fixed else values_of(draw, action)
        words += [draw.choice(action.option_strings)] if is_option else []
        words += [] if action.nargs == 0 else values
    return words if draw.random() > 0.05 else [*words, draw.choice(BAD)]


def values_of(draw: random.Random, action: argparse.Action) -> list[str]:
    many = action.nargs in ("+", "*") or isinstance(action.nargs, int)
    return [value_of(draw, action) for _ in range(draw.randint(1, 3) if many else 1)]


def value_of(draw: random.Random, action: argparse.Action) -> str:
    if draw.random() < 0.25:
        return draw.choice(BAD)
    if action.choices:
        return str(draw.choice(list(action.choices)))
    if action.dest in GOOD:
        return draw.choice(GOOD[action.dest])
    if action.dest == "overrides":
        return drawn_override(draw)
    return draw.choice(BAD[:12] if action.type in (int, float) else BAD)


OVERRIDES = (
    "model.vocab_size", "model.max_tiles", "model.dtype", "model.config", "model.tokenizer",
    "model.zero_residuals", "model.local_layers", "model.checkpoint", "model.attn_implementation",
    "data.kind", "data.files", "data.scenes", "data.scene_sets", "data.region_share",
    "data.regions_per_sample", "data.questions_per_sample", "data.caption_length", "data.streaming",
    "data.max_new_tokens", "data.eval_scenes", "data.cache", "data.fresh", "masking.t_low",
    "masking.t_high", "masking.complementary", "masking.loss_weighting", "masking.full_mask_share",
    "masking.eval_levels", "parameters.muon", "parameters.frozen", "parameters.learning_rates",
    "parameters.permute_prompts", "lora", "lora.r", "lora.target_modules", "save_code", "trainer",
    "trainer.max_steps", "trainer.learning_rate", "trainer.optim", "trainer.lr_scheduler_type",
    "trainer.warmup_steps", "trainer.eval_strategy", "trainer.save_strategy", "trainer.save_steps",
    "trainer.per_device_train_batch_size", "trainer.max_grad_norm", "trainer.weight_decay",
    "trainer.bf16", "trainer.seed", "trainer.adam_beta1", "trainer.logging_steps", "nonsense",
    "trainer.save_total_limit", "trainer.gradient_accumulation_steps", "trainer.report_to",
)  # fmt: skip


def drawn_override(draw: random.Random) -> str:
    values = [
        *BAD[:24],
        "true",
        "false",
        "none",
        "uniform",
        "adamw_torch",
        "steps",
        "[0.5]",
        "1e-3",
    ]
    return f"{draw.choice(OVERRIDES)}={draw.choice(values)}"


@pytest.fixture(scope="module")
def files(converted, tmp_path_factory) -> Path:
    """A folder of files of every kind that a command may be given."""
    folder = tmp_path_factory.mktemp("files")
    (folder / "images").mkdir()
    for name in ("image.png", "images/a.png", "images/b.png"):
        shutil.copy(VECTORS / "region_0.png", folder / name)
    mask = Image.new("L", Image.open(VECTORS / "region_0.png").size)
    mask.paste(255, (3, 3, 30, 30))
    (folder / "masks").mkdir()
    for name in ("mask.png", "masks/image.png"):
        mask.save(folder / name)
    bench = write_paradlc(folder / "bench", 2, 1)
    keys = list(json.loads((bench / "qa.json").read_text()))
    contents = {
        "text.txt": "no JSON",
        "empty.json": "{}",
        "list.json": "[[1, 1, 20, 20]]",
        "coco.json": '{"images": [{"id": 1, "file_name": "image.png"}], "annotations": []}',
        "captions.json": json.dumps(dict.fromkeys(keys, "a dog")),
        "answers.json": json.dumps({key: ["A", "A", "A"] for key in keys}),
        "scores.json": '{"summary": {"average": 0.5}}',
        "recipe.yaml": yaml.safe_dump(
            {**recipe_values(Path("run")), "data": {"kind": "synthetic", "scenes": 8}}
        ),
    }
    for name, text in contents.items():
        (folder / name).write_text(text)
    recipe = recipe_values(Path("run"), trainer={"max_steps": 1}, data={"scenes": 8})
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    shutil.copytree(converted("released-region"), folder / "model")
    return folder


@pytest.fixture
def place(files, tmp_path, monkeypatch):
    """The working folder of a trial, with those files; what it needs from outside is not there."""
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    numbers = iter(range(10**6))

    def make() -> Path:
        folder = shutil.copytree(files, tmp_path / str(next(numbers)))
        monkeypatch.chdir(folder)
        return folder

    return make


@pytest.fixture
def quick_model(load, monkeypatch):
    """`caption` and the servers with a model that is loaded once; the servers end before they
    listen."""
    model, processor = load("released-region")

    def from_pretrained(name, *, subfolder, revision, device, dtype, **options):
        if name not in (None, "model"):
            raise ValueError(f"expected a model, got {name!r}")
        return RegionCaptioner(model, processor, **options)

    monkeypatch.setattr(RegionCaptioner, "from_pretrained", from_pretrained)
    monkeypatch.setattr(WorkerPool, "warm_up", lambda _: None)  # their folder is gone soon
    load_engine = arguments.load_engine

    def refuse(args):
        load_engine(args).close(drain=False)
        raise ValueError("expected a refusal, got none")

    monkeypatch.setattr(arguments, "load_engine", refuse)


CODES = {"caption": (0, 1, 2), "publish": (1, 2), "convert": range(13)}


def run_command(name: str, seed: int, capsys):
    """Runs what a seed draws; a wrong end is an AssertionError with the command line."""
    words = drawn_arguments(random.Random(f"{name}{seed}"), parser_of(name))
    prefix = [] if name == "convert" else ["evaluate", name] if name in STEPS else [name]
    try:
        code = convert_main(words) if name == "convert" else main([*prefix, *words])
    except SystemExit as error:
        code = error.code
        assert code == 2, (name, seed, words, code)  # argparse's
    except BaseException as error:
        raise AssertionError(f"{name} {seed} {words}") from error
    said = capsys.readouterr().err
    assert code in CODES.get(name, (0, 1, 2)), (name, seed, words, code, said)
    assert "Traceback" not in said, (name, seed, words, said)
    assert code == 0 or said.strip() or name in STEPS, (name, seed, words)


def command_test(name: str):
    @trials(name)
    def test(seeds, place, quick_model, capsys):
        for seed in seeds:
            folder = place()
            run_command(name, seed, capsys)
            shutil.rmtree(folder)

    return test


test_captions_arguments = command_test("caption")
test_publishs_arguments = command_test("publish")
test_serves_arguments = command_test("serve")
test_the_web_pages_arguments = command_test("web")
test_trainings_arguments = command_test("train")
test_the_converters_arguments = command_test("convert")
test_predicts_arguments = command_test("predict")
test_judges_arguments = command_test("judge")
test_scores_arguments = command_test("score")
test_reports_arguments = command_test("report")
test_synthetics_arguments = command_test("synthetic")
test_sweeps_arguments = command_test("sweep")
test_latencys_arguments = command_test("latency")


# Requests.


@pytest.fixture(scope="module")
def server(load):
    pytest.importorskip("fastapi", reason="the endpoint needs the package's apps extra")
    from perceptiondlm.apps.serving.limits import Limits
    from serving import served

    limits = Limits(pixels=500_000, masks=8, caption_length=16, new_tokens=16, steps=16)
    with served(RegionCaptioner(*load("released-region")), limits=limits) as (address, _):
        with httpx.Client(base_url=address, timeout=60) as client:
            yield client


def plain_requests() -> list[dict]:
    from serving import image_part, text_part, user

    image = image_part(Image.new("RGB", (40, 30), "red"))
    common = {"model": "tester", "steps": 1, "temperature": 0.0, "seed": 1, "stop": ["x"]}
    regions = {**common, "messages": user(image), "masks": [BOX, [1, 2, 8, 9]], "caption_length": 2}
    question = {**common, "messages": user(image, text_part("What?")), "max_tokens": 2}
    system = [{"role": "system", "content": "Be short."}, *question["messages"]]
    return [regions, question, {**question, "messages": system, "stream": True}]


def any_json(draw: random.Random, depth: int = 0):
    kind = draw.randrange(9 if depth < 3 else 6)
    if kind < 3:
        return draw.choice([0, 1, -1, 2, 17, 2**31, 2**63, 10**30, 0.5, -0.5, 1e308, True, False])
    if kind == 3:
        return draw.choice(
            ["", "a", "tester", "\ud800", "\0", "é" * 40, "data:image/png;base64,AA"]
        )
    if kind == 4:
        return None
    if kind == 5:
        return draw.choice(
            [BOX, {"polygons": [[1, 1, 9, 1, 9, 9]]}, {"size": [30, 40], "counts": "x"}]
        )
    if kind == 6:
        return [any_json(draw, depth + 1) for _ in range(draw.randrange(4))]
    names = ("type", "text", "url", "role", "content", "masks", "box", "x", "image_url")
    return {draw.choice(names): any_json(draw, depth + 1) for _ in range(draw.randrange(3))}


def places_in(value, path: tuple = ()) -> list[tuple]:
    """The path of every part of a JSON value."""
    items = value.items() if isinstance(value, dict) else []
    items = enumerate(value) if isinstance(value, list) else items
    return [path, *(found for key, part in items for found in places_in(part, (*path, key)))]


def changed(draw: random.Random, value):
    """A JSON value in which some parts are others, gone, doubled or new."""
    value = copy.deepcopy(value)
    for _ in range(draw.choice((1, 1, 1, 2, 4))):
        paths = [path for path in places_in(value) if path]
        if not paths:
            break
        *way, last = draw.choice(paths)
        parent = value
        for key in way:
            parent = parent[key]
        change = draw.randrange(6)
        if change == 0:
            del parent[last]
        elif change == 1 and isinstance(parent, list):
            parent.append(copy.deepcopy(parent[last]))
        elif change == 2 and isinstance(parent, dict):
            names = ("x", "masks", "task", "stream", "cfg_scale")
            parent[draw.choice(names)] = copy.deepcopy(any_json(draw))
        else:
            parent[last] = copy.deepcopy(any_json(draw))
    return value


@trials("requests")
def test_any_request_is_answered_or_refused(seeds, server):
    for seed in seeds:
        draw = random.Random(seed)
        body = json.dumps(changed(draw, draw.choice(plain_requests()))).encode()
        if draw.random() < 0.1:
            body = bytearray(body)
            for _ in range(draw.randint(1, 5)):
                body[draw.randrange(len(body))] = draw.randrange(256)
        answer = server.post("/v1/chat/completions", content=bytes(body))
        assert answer.status_code < 500, (seed, body, answer.text)
        if answer.status_code != 200:
            assert set(answer.json()["error"]) == {"message", "type", "param", "code"}, seed
        elif answer.headers["content-type"].startswith("text/event-stream"):
            assert answer.text.rstrip().endswith("data: [DONE]"), (seed, answer.text)
            assert "model_failed" not in answer.text, (seed, body, answer.text)


# Training records.


RECORDS = {
    "regions": {
        "image": "good.png",
        "mask_rles": [BOX, {"size": [40, 40], "counts": [0, 1600]}, [[1, 1, 9, 1, 9, 9]]],
        "captions": ["a star", "a red box", "all"],
    },
    "conversations": {
        "image": "good.png",
        "conversations": [
            {"from": "human", "value": "<image>\nWhat?"},
            {"from": "gpt", "value": "A star."},
            {"from": "human", "value": "Where?"},
            {"from": "gpt", "value": "Here."},
        ],
    },
}  # fmt: skip
A_FILE = 20  # records, of which the first is good


def drawn_line(draw: random.Random, good: dict) -> bytes:
    if draw.random() < 0.1:
        return draw.randbytes(draw.randint(1, 60)).replace(b"\n", b"").replace(b"\r", b"") or b"x"
    if draw.random() < 0.1:
        value = any_json(draw)
    else:
        value = changed(draw, good)
    line = json.dumps(value).encode()
    return line if draw.random() < 0.95 else line[: draw.randrange(1, len(line) + 1)]


@pytest.fixture
def maker_of(make):
    _, processor = make()
    makers = {
        "regions": lambda files: RegionSamples(
            processor, RegionData(files=files, caption_length=6), seed=0, permute_prompts=False
        ),
        "conversations": lambda files: ConversationSamples(
            processor, ConversationData(files=files)
        ),
    }
    return lambda kind, files: makers[kind](files)


@pytest.mark.parametrize("kind", RECORDS)
@trials("records")
def test_any_record_is_used_or_named_by_its_line(
    seeds, kind, maker_of, tmp_path, monkeypatch, caplog
):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
    Image.effect_noise((40, 40), 50).convert("RGB").save(tmp_path / "good.png")
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nno image")
    for seed in seeds:
        draw = random.Random(seed)
        good = RECORDS[kind]
        lines = [json.dumps(good).encode(), *(drawn_line(draw, good) for _ in range(A_FILE - 1))]
        path = tmp_path / f"{kind}{seed}.jsonl"
        path.write_bytes(b"\n".join(lines) + b"\n")
        caplog.clear()
        named = lines_named(caplog, path, seed, maker_of(kind, [str(path)]))
        assert 1 not in named
        for number, line in enumerate(lines, 1):  # what no reader could make anything of
            if not is_object(line):
                assert number in named or not line.strip(), (seed, number, line)
        path.unlink()


def lines_named(caplog, path: Path, seed: int, maker) -> set[int]:
    """Numbers of the lines that are named as broken, by index and, alike, in a stream."""
    found = []
    for make_set in (by_index, by_stream):
        caplog.clear()
        make_set(path, maker)
        said = [r.getMessage() for r in caplog.records if "skipped a broken" in r.getMessage()]
        places = [re.search(r"record, (.*), line (\d+): .", line) for line in said]
        assert all(place and place[1] == str(path) for place in places), (seed, said)
        found.append([int(place[2]) for place in places])
        assert len(set(found[-1])) == len(found[-1]), (seed, said)
    assert set(found[0]) == set(found[1]), seed
    return set(found[0])


def by_index(path: Path, maker):
    samples = FileDataset([str(path)], maker, max_broken_share=1.0)
    for k in range(len(samples)):
        samples[k]


def by_stream(path: Path, maker):
    stream = StreamDataset([str(path)], maker, max_broken_share=1.0, buffer=1)
    for _ in stream._epoch(0):
        pass


def is_object(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False
