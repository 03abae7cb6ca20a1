"""Hundreds of kills over the commands that write: nothing is lost, and every next run goes on.

Each trial draws its moment from its seed, so that `-k convert-7` repeats one. SIGKILL goes to the
process group: of every two trials one comes right before an access to the files concerned, one by
the clock. What a trial expects is what a run that nothing disturbs has left.
"""

# ruff: noqa: F811  (fixtures of other modules)

import copy
import hashlib
import json
import random
import shutil
import socket
from pathlib import Path

import pytest
import torch
import yaml
from hub_server import TOKEN, HubServer
from PIL import Image
from safetensors.torch import load_file
from test_evaluation_benchmarks import write_paradlc
from test_judge_runs import CALLS, command
from test_judge_runs import folder as judge_folder  # noqa: F401
from test_judge_server import KEY, letter_of, serving
from training_runs import recipe_values
from trial_processes import KILLED, Forks, run_fresh

pytest.importorskip("openai", reason="the judge needs the package's eval extra")

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parent.parent
VECTORS = Path(__file__).parent / "fixtures" / "vectors"
SOURCE = VECTORS / "released-region"
REPO = "somebody/captioner"

KILLS = {
    "convert": 60,
    "train": 60,
    "sharded": 24,
    "caption": 60,
    "predict": 40,
    "judge": 60,
    "publish": 60,
}
FRESH_KILLS = {"convert": 4, "train": 6, "sharded": 4, "caption": 4, "judge": 4, "publish": 4}
assert sum(KILLS.values()) + sum(FRESH_KILLS.values()) >= 100


def each(name: str, kills: dict = KILLS):
    """Runs a test for every seed of a command."""
    seeds = range(kills[name])
    return pytest.mark.parametrize("seed", seeds, ids=lambda seed: f"{name}-{seed}")


@pytest.fixture(scope="module")
def hub():
    with HubServer() as server:
        yield server


@pytest.fixture(scope="module")
def network(hub, tmp_path_factory) -> dict:
    """Variables with which a process finds the Hub on loopback and the judge's key."""
    return {
        "HF_ENDPOINT": hub.url,
        "HF_TOKEN": TOKEN,
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_OFFLINE": "0",
        "HF_HOME": str(tmp_path_factory.mktemp("home")),
        "OPENAI_API_KEY": KEY,
    }


@pytest.fixture(scope="module")
def forks(network, tmp_path_factory):
    with Forks(tmp_path_factory.mktemp("logs"), **network) as parent:
        yield parent


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of each file below a folder, by its path in it; of captions without their times."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(content(path)).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def content(path: Path) -> bytes:
    if path.name != "captions.jsonl":
        return path.read_bytes()
    records = map(json.loads, path.read_text().splitlines())
    return repr([[record["image"], record["regions"]] for record in records]).encode()


def expect_done(ended):
    assert ended.code == 0, ended.errors


class Moments:
    """Kills a command at moments that a seed draws, in a state made anew for each attempt."""

    def __init__(self, forks: Forks, undisturbed, **options):
        self.forks, self.undisturbed, self.options = forks, undisturbed, options

    def kill(self, seed: int, make, arguments, watched):
        """Runs `arguments(made)` on what `make()` gives until a run is killed; gives that."""
        draw = random.Random(seed)
        seconds, accesses = self.undisturbed.seconds, self.undisturbed.accesses
        while True:
            made = make()
            by_clock = {"after": draw.uniform(0, seconds)}
            moment = by_clock if seed % 2 else {"at": draw.randint(1, accesses)}
            ended = self.forks.run(arguments(made), watched=watched(made), **moment, **self.options)
            if ended.code == KILLED:
                return made
            expect_done(ended)  # it was faster, or its accesses fewer
            seconds, accesses = seconds * 0.8, max(1, accesses - 1)


def kill_fresh(seed: int, seconds: float, make, arguments, **options):
    """The same in fresh interpreters, by the clock."""
    draw = random.Random(1000 + seed)
    while True:
        made = make()
        ended = run_fresh(arguments(made), after=draw.uniform(0.3, 1) * seconds, **options)
        if ended.code == KILLED:
            return made
        expect_done(ended)
        seconds *= 0.8


@pytest.fixture
def place(tmp_path):
    """Makes one new folder after another."""
    count = iter(range(1000))
    return lambda: tmp_path / str(next(count))


# convert.


class Conversion:
    """A conversion over an older one, or where nothing is."""

    def __init__(self, forks: Forks, home: Path):
        self.forks = forks
        for name, options in (("old", ["--dtype", "float16"]), ("new", [])):
            done = self.run(home / name / "out", *options, watched=home / name)
            expect_done(done)
        self.done = done
        self.states = {name: digests(home / name / "out") for name in ("old", "new")}
        self.old = home / "old"

    def run(self, output: Path, *options: str, **moment):
        return self.forks.run(self.arguments(output, *options), program="convert", **moment)

    def arguments(self, output: Path, *options: str) -> list:
        return ["--source", SOURCE, "--output", output, "--force", *options]

    def make(self, folder: Path, over_old: bool) -> Path:
        shutil.copytree(self.old, folder) if over_old else folder.mkdir()
        return folder

    def expect_nothing_lost(self, folder: Path, over_old: bool):
        found = digests(folder / "out")
        if found == self.states["old"] and over_old:
            return
        new = dict(self.states["new"])
        if "provenance.json" not in found:  # which is written beside the finished folder
            new.pop("provenance.json")
        assert found == new or (not over_old and not (folder / "out").exists())


@pytest.fixture(scope="module")
def conversion(forks, tmp_path_factory):
    return Conversion(forks, tmp_path_factory.mktemp("conversion"))


@each("convert")
def test_a_killed_conversion_leaves_the_old_or_the_new_and_is_repeated(
    conversion, forks, place, seed
):
    over_old = seed % 4 < 2
    folder = Moments(forks, conversion.done, program="convert").kill(
        seed,
        lambda: conversion.make(place(), over_old),
        lambda made: conversion.arguments(made / "out"),
        lambda made: made,
    )
    conversion.expect_nothing_lost(folder, over_old)
    expect_done(conversion.run(folder / "out"))
    assert digests(folder / "out") == conversion.states["new"]
    assert [path.name for path in folder.iterdir()] == ["out"]


@each("convert", FRESH_KILLS)
def test_a_fresh_conversion_killed(conversion, place, seed):
    script = (str(ROOT / "convert_checkpoint.py"),)
    folder = kill_fresh(
        seed,
        5,
        lambda: conversion.make(place(), True),
        lambda made: conversion.arguments(made / "out"),
        command=script,
    )
    conversion.expect_nothing_lost(folder, True)
    expect_done(conversion.run(folder / "out"))
    assert digests(folder / "out") == conversion.states["new"]
    assert [path.name for path in folder.iterdir()] == ["out"]


# train.


STEPS = {"max_steps": 6, "save_strategy": "steps", "save_steps": 2, "lr_scheduler_type": "cosine"}


class Training:
    """A run of six steps, in which a checkpoint is saved after every second."""

    def __init__(self, forks: Forks, home: Path, processes: int = 1):
        self.forks, self.processes = forks, processes
        self.variables = SHARDED if processes > 1 else {}
        self.old, self.new = home / "old", home / "new"
        for folder, seed in ((self.old, 1), (self.new, 0)):
            folder.mkdir()
            self.done = self.run(folder, seed=seed, watched=folder)
            expect_done(self.done)
        self.states = [self.state(self.old), self.state(self.new)]

    def run(self, folder: Path, *options: str, seed: int = 0, **moment):
        return self.forks.run(
            self.arguments(folder, *options, seed=seed),
            processes=self.processes,
            **self.fresh_variables(),
            **moment,
        )

    def fresh_variables(self) -> dict:
        if self.processes == 1:
            return {}
        return {**self.variables, "MASTER_PORT": str(free_port())}

    def arguments(self, folder: Path, *options: str, seed: int = 0) -> list:
        size = 4 // self.processes
        trainer = {**STEPS, "seed": seed, "per_device_train_batch_size": size}
        recipe = folder / "recipe.yaml"
        recipe.write_text(yaml.safe_dump(recipe_values(folder / "run", trainer=trainer)))
        return ["train", recipe, *options]

    def state(self, folder: Path) -> dict:
        """Weights of each checkpoint and of the end, by name."""
        files = sorted((folder / "run").rglob("*.safetensors"))
        return {str(f.relative_to(folder)): load_file(f) for f in files if ".saving" not in str(f)}

    def expect_nothing_lost(self, folder: Path, over_old: bool):
        """What there is loads, and is wholly of the old run or of the new."""
        for name, weights in self.state(folder).items():
            assert any(same_weights(weights, state.get(name)) for state in self.states), name
        for checkpoint in (folder / "run").glob("checkpoint-*"):
            json.loads((checkpoint / "trainer_state.json").read_text())
            for file in checkpoint.glob("*.p[tT]*"):
                torch.load(file, weights_only=False)
        if over_old:
            assert self.state(folder).keys() == self.states[0].keys()

    def expect_finished(self, folder: Path):
        """The end is that of an undisturbed run, with its files and no others."""
        found, expected = self.state(folder), self.states[1]
        assert found.keys() == expected.keys()
        assert all(same_weights(weights, expected[name]) for name, weights in found.items())
        assert losses_in(folder) == losses_in(self.new)
        assert digests(folder).keys() == digests(self.new).keys()

    def options_after(self, folder: Path, over_old: bool) -> list[str]:
        """How a user goes on: anew where another run's checkpoints lie, or with what is saved."""
        saved = any((folder / "run").glob("checkpoint-*"))
        return ["--resume"] if saved and not over_old else []


def same_weights(some: dict, others: dict | None) -> bool:
    return (
        others is not None
        and some.keys() == others.keys()
        and all(torch.equal(weight, others[name]) for name, weight in some.items())
    )


def losses_in(folder: Path) -> list[float]:
    state = json.loads((folder / "run" / "checkpoint-6" / "trainer_state.json").read_text())
    return [entry["loss"] for entry in state["log_history"] if "loss" in entry]


@pytest.fixture(scope="module")
def training(forks, tmp_path_factory):
    return Training(forks, tmp_path_factory.mktemp("training"))


def train_and_kill(training: Training, place, seed: int):
    """Half of the runs begin in an empty folder, a quarter over a finished run, and a quarter go on
    from a run whose last checkpoint and final weights are lost."""
    over_old, goes_on = seed % 8 in (2, 3), seed % 8 in (4, 5)

    def make() -> Path:
        folder = place()
        if over_old:
            return Path(shutil.copytree(training.old, folder))
        if not goes_on:
            folder.mkdir()
            return folder
        shutil.copytree(training.new, folder)
        shutil.rmtree(folder / "run" / "checkpoint-6")
        (folder / "run" / "model.safetensors").unlink()
        (folder / "run" / "checkpoint-4" / "scheduler.pt").unlink()
        return folder

    options = ["--resume"] if goes_on else []
    done = training.done
    variables = training.fresh_variables()
    moments = Moments(training.forks, done, processes=training.processes, **variables)
    folder = moments.kill(
        seed, make, lambda made: training.arguments(made, *options), lambda made: made / "run"
    )
    training.expect_nothing_lost(folder, over_old)
    expect_done(training.run(folder, *training.options_after(folder, over_old)))
    training.expect_finished(folder)


@each("train")
def test_a_killed_training_run_goes_on_and_ends_as_if_undisturbed(training, place, seed):
    train_and_kill(training, place, seed)


@each("train", FRESH_KILLS)
def test_a_fresh_training_run_killed(training, place, seed):
    def make() -> Path:
        folder = place()
        folder.mkdir()
        return folder

    folder = kill_fresh(seed, 7, make, training.arguments)
    training.expect_nothing_lost(folder, False)
    expect_done(training.run(folder, *training.options_after(folder, False)))
    training.expect_finished(folder)


# What `accelerate launch` with configs/accelerate/fsdp_cpu.yaml sets.
SHARDED = {
    "ACCELERATE_USE_FSDP": "true",
    "ACCELERATE_MIXED_PRECISION": "no",
    "FSDP_VERSION": "2",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_OFFLOAD_PARAMS": "false",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_TRANSFORMER_CLS_TO_WRAP": "PerceptionDLMDecoderLayer,SiglipEncoderLayer",
    "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
    "WORLD_SIZE": "2",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "127.0.0.1",
}


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@pytest.fixture(scope="module")
def sharded(forks, tmp_path_factory):
    return Training(forks, tmp_path_factory.mktemp("sharded"), processes=2)


@each("sharded")
def test_a_killed_run_of_two_processes_goes_on_and_ends_as_if_undisturbed(sharded, place, seed):
    for checkpoint in ("checkpoint-2", "checkpoint-6"):
        assert (sharded.new / "run" / checkpoint / "pytorch_model_fsdp_0" / "__1_0.distcp").exists()
    train_and_kill(sharded, place, seed)


@each("sharded", FRESH_KILLS)
def test_two_launched_processes_killed(sharded, place, seed):
    def make() -> Path:
        folder = place()
        folder.mkdir()
        return folder

    config = ROOT / "configs" / "accelerate" / "fsdp_cpu.yaml"
    launch = ("-m", "accelerate.commands.launch", "--config_file", str(config))
    launch += ("--main_process_port", "0", "-m", "perceptiondlm.apps.cli")
    folder = kill_fresh(seed, 14, make, sharded.arguments, command=launch)
    sharded.expect_nothing_lost(folder, False)
    expect_done(sharded.run(folder, *sharded.options_after(folder, False)))
    sharded.expect_finished(folder)


# caption.


class Captioning:
    """Captions and drawings of six images, over those of an earlier run."""

    def __init__(self, forks: Forks, model: Path, home: Path):
        self.forks, self.model = forks, model
        self.images = home / "images"
        self.images.mkdir()
        for k in range(6):
            shutil.copy(VECTORS / f"region_{k % 3}.png", self.images / f"{k}.png")
        self.old, self.new = home / "old", home / "new"
        for folder, box in ((self.old, "9,9,40,40"), (self.new, "5,5,60,60")):
            folder.mkdir()
            self.done = forks.run(self.arguments(folder, box), watched=folder)
            expect_done(self.done)
        self.states = digests(self.old), digests(self.new)

    def arguments(self, folder: Path, box: str = "5,5,60,60") -> list:
        results = ["--captions", folder / "captions.jsonl", "--output", folder / "drawn"]
        decoding = ["--caption-length", "4", "--quiet", "--device", "cpu"]
        return ["caption", self.images, "--box", box, "--model", self.model, *results, *decoding]

    def expect_nothing_lost(self, folder: Path):
        found = {name: d for name, d in digests(folder).items() if not is_own(name)}
        assert found.keys() == self.states[0].keys()
        for name, digest in found.items():
            assert digest in (self.states[0][name], self.states[1][name]), name
        partial = folder / "captions.jsonl.partial"
        for line in partial.read_text().splitlines() if partial.exists() else ():
            json.loads(line)
        for drawing in (folder / "drawn").glob("*.png"):
            Image.open(drawing).load()

    def expect_finished(self, folder: Path):
        assert digests(folder) == self.states[1]


def is_own(name: str) -> bool:
    """Whether a file is one that a run makes and clears away."""
    last = Path(name).name
    return last.endswith((".partial", ".tmp", ".lock"))


@pytest.fixture(scope="module")
def captioning(forks, converted, tmp_path_factory):
    return Captioning(forks, converted("released-region"), tmp_path_factory.mktemp("captioning"))


@each("caption")
def test_killed_captioning_leaves_the_old_captions_whole_and_is_repeated(
    captioning, forks, place, seed
):
    folder = Moments(forks, captioning.done).kill(
        seed,
        lambda: Path(shutil.copytree(captioning.old, place())),
        captioning.arguments,
        lambda made: made,
    )
    captioning.expect_nothing_lost(folder)
    expect_done(forks.run(captioning.arguments(folder)))
    captioning.expect_finished(folder)


@each("caption", FRESH_KILLS)
def test_fresh_captioning_killed(captioning, forks, place, seed):
    folder = kill_fresh(
        seed, 7, lambda: Path(shutil.copytree(captioning.old, place())), captioning.arguments
    )
    captioning.expect_nothing_lost(folder)
    expect_done(forks.run(captioning.arguments(folder)))
    captioning.expect_finished(folder)


# evaluate predict.


class Predicting:
    """Captions of ten regions in five images, over an earlier prediction file."""

    def __init__(self, forks: Forks, model: Path, home: Path):
        self.model = model
        self.benchmark = write_paradlc(home / "bench", 5, 2)
        self.new = self.make(home / "new")
        self.done = forks.run(self.arguments(self.new), watched=self.new)
        expect_done(self.done)

    def make(self, folder: Path) -> Path:
        folder.mkdir()
        (folder / "captions.json").write_text('{"from": "an earlier run"}')
        return folder

    def arguments(self, folder: Path) -> list:
        given = ["--benchmark", self.benchmark, "--output", folder / "captions.json"]
        decoding = ["--option", "caption_length=4", "--device", "cpu"]
        return ["evaluate", "predict", "--model", self.model, *given, *decoding]

    def captions(self, folder: Path) -> dict:
        return json.loads((folder / "captions.json").read_text())

    def journalled(self, folder: Path) -> list[str]:
        journals = folder.glob("captions.rank*.journal.jsonl")
        lines = [line for file in journals for line in file.read_bytes().split(b"\n")[:-1]]
        return [key for line in lines for key in json.loads(line).get("captions", {})]


@pytest.fixture(scope="module")
def predicting(forks, converted, tmp_path_factory):
    return Predicting(forks, converted("released-region"), tmp_path_factory.mktemp("predicting"))


@each("predict")
def test_a_killed_prediction_run_goes_on_with_no_region_done_twice(predicting, forks, place, seed):
    folder = Moments(forks, predicting.done).kill(
        seed, lambda: predicting.make(place()), predicting.arguments, lambda made: made
    )
    expected = predicting.captions(predicting.new)
    assert predicting.captions(folder) in ({"from": "an earlier run"}, expected)
    expect_done(forks.run(predicting.arguments(folder)))
    assert predicting.captions(folder) == expected
    assert sorted(predicting.journalled(folder)) == sorted(expected)
    assert digests(folder).keys() == digests(predicting.new).keys()


# evaluate judge.


class Judging:
    """Answers to 18 questions, over an earlier file of answers; `folder` of a test each."""

    def __init__(self, forks: Forks):
        self.forks = forks
        self.done = None

    def arguments(self, folder: Path, url: str) -> list:
        return command(folder, url, "--concurrency", "3")

    def answered(self, folder: Path) -> int:
        cache = folder / "answers.cache.jsonl"
        lines = cache.read_bytes().split(b"\n")[:-1] if cache.exists() else []
        return sum("answer" in json.loads(line) for line in lines)


@pytest.fixture(scope="module")
def judging(forks):
    return Judging(forks)


def judge_and_kill(judging, folder: Path, kill):
    old = '{"from": "an earlier run"}'
    (folder / "answers.json").write_text(old)
    with serving(lambda _, body: letter_of(body)) as server:
        kill(server)
        found = (folder / "answers.json").read_text()
        assert found == old or len(json.loads(found)) == 6
        known, asked = judging.answered(folder), len(server.requests)
        done = judging.forks.run(judging.arguments(folder, server.url))
        expect_done(done)
        assert len(server.requests) - asked == CALLS - known  # none is paid for again
        answers = json.loads((folder / "answers.json").read_text())
        questions = [content["messages"] for content in server.requests]
    assert sum(map(len, answers.values())) == CALLS
    assert judging.answered(folder) == CALLS
    distinct = {json.dumps(messages) for messages in questions}
    letters = [letter(json.loads(text)) for text in distinct]
    found = [answer for row in answers.values() for answer in row]
    assert len(distinct) == CALLS and sorted(letters) == sorted(found)
    left = {path.name for path in folder.iterdir()} - {"bench", "captions.json"}
    assert left == {"answers.json", "answers.run.json", "answers.cache.jsonl"}


def letter(messages) -> str:
    """What the played judge answers to a question."""
    return json.loads(letter_of({"messages": messages}).body)["choices"][0]["message"]["content"]


@each("judge")
def test_a_killed_judge_run_goes_on_and_pays_for_no_answer_twice(
    judging, forks, judge_folder, seed
):
    def kill(server):
        if judging.done is None:
            given = judging.arguments(judge_folder, server.url)
            judging.done = forks.run(given, watched=judge_folder)
            expect_done(judging.done)
        draw = random.Random(seed)
        seconds, accesses = judging.done.seconds, judging.done.accesses
        while True:
            for file in judge_folder.glob("answers.*"):
                if file.name != "answers.json":
                    file.unlink()
            (judge_folder / "answers.json").write_text('{"from": "an earlier run"}')
            clock = {"after": draw.uniform(0, seconds)}
            moment = clock if seed % 2 else {"at": draw.randint(1, accesses)}
            arguments = judging.arguments(judge_folder, server.url)
            ended = forks.run(arguments, watched=judge_folder, **moment)
            if ended.code == KILLED:
                return
            expect_done(ended)
            seconds, accesses = seconds * 0.8, max(1, accesses - 1)

    judge_and_kill(judging, judge_folder, kill)


@each("judge", FRESH_KILLS)
def test_a_fresh_judge_run_killed(judging, judge_folder, network, seed):
    def make() -> Path:
        for file in judge_folder.glob("answers.[cr]*"):
            file.unlink()
        return judge_folder

    def kill(server):
        kill_fresh(seed, 5, make, lambda made: judging.arguments(made, server.url), **network)

    judge_and_kill(judging, judge_folder, kill)


# publish.


class Publishing:
    """A checkpoint of several shards, published over an older one of one file."""

    def __init__(self, forks: Forks, hub: HubServer, home: Path):
        self.forks, self.hub = forks, hub
        for name, options in (("old", []), ("new", ["--max-shard-size", "300KB"])):
            given = ["--source", SOURCE, "--output", home / name, *options]
            expect_done(forks.run(given, program="convert"))
        expect_done(forks.run(["publish", home / "old", REPO]))
        self.before = copy.deepcopy(hub.repositories), dict(hub.large_files)
        self.folder = home / "new"
        expect_done(forks.run(["publish", self.folder, "somebody/earlier"]))  # writes a card
        self.reset()
        finished = Path(shutil.copytree(self.folder, home / "finished"))
        self.done = forks.run(["publish", finished, REPO], watched=finished)
        expect_done(self.done)
        self.trees = self.tree(self.before[0]), self.tree(hub.repositories)
        self.cards = [(f / "README.md").read_bytes() for f in (self.folder, finished)]
        self.files = digests(finished)

    def reset(self):
        """Puts the Hub back to where the old checkpoint is all that it has."""
        with self.hub.lock:
            self.hub.repositories = copy.deepcopy(self.before[0])
            self.hub.large_files = dict(self.before[1])
            self.hub.requests.clear()

    def tree(self, repositories) -> dict[str, str]:
        repository = repositories[REPO]
        tree = repository.trees[repository.resolve("main")]
        return {path: blob.etag for path, blob in tree.items()}

    def make(self, folder: Path) -> Path:
        self.reset()
        return Path(shutil.copytree(self.folder, folder))

    def arguments(self, folder: Path) -> list:
        return ["publish", folder, REPO]

    def expect_nothing_lost_and_go_on(self, folder: Path):
        with self.hub.lock:
            assert self.tree(self.hub.repositories) in self.trees
            stored = set(self.hub.large_files)
            self.hub.requests.clear()
        assert (folder / "README.md").read_bytes() in self.cards
        expect_done(self.forks.run(self.arguments(folder)))
        assert self.tree(self.hub.repositories) == self.trees[1]
        assert not {path.rsplit("/", 1)[-1] for path in self.hub.uploads()} & stored
        assert digests(folder) == self.files


@pytest.fixture(scope="module")
def publishing(forks, hub, tmp_path_factory):
    return Publishing(forks, hub, tmp_path_factory.mktemp("publishing"))


@each("publish")
def test_a_killed_publication_leaves_the_branch_whole_and_sends_nothing_twice(
    publishing, forks, place, seed
):
    folder = Moments(forks, publishing.done).kill(
        seed, lambda: publishing.make(place()), publishing.arguments, lambda made: made
    )
    publishing.expect_nothing_lost_and_go_on(folder)


@each("publish", FRESH_KILLS)
def test_a_fresh_publication_killed(publishing, place, network, seed):
    folder = kill_fresh(seed, 5, lambda: publishing.make(place()), publishing.arguments, **network)
    publishing.expect_nothing_lost_and_go_on(folder)
