"""What was at an output stays until what replaces it is whole and worth it: the commands."""

# ruff: noqa: F401, F811  (fixtures of other modules)

import os
import signal
import threading
from types import SimpleNamespace

import pytest
from perceptiondlm.apps.captioning.captioner import RegionCaptioner
from perceptiondlm.apps.cli import main
from perceptiondlm.common.files import only_run
from perceptiondlm.evaluation import predict as predict_module
from perceptiondlm.evaluation import sweep
from perceptiondlm.evaluation.files import read_json
from perceptiondlm.evaluation.predict import predict
from perceptiondlm.evaluation.scene_kinds import SHAPES
from perceptiondlm.evaluation.synthetic_folder import write_scenes
from test_apps_streams import BOX, model, photos, run
from test_common_files import die, kill_in, names
from test_evaluation_predict import IMAGES, REGIONS, FakeModel, output, samples
from test_judge_runs import CALLS, command, folder
from test_judge_server import letter_of, serving

LOAD_MODEL = "perceptiondlm.evaluation.checkpoint.load_model"


@pytest.fixture
def out(tmp_path):
    path = tmp_path / "captions.jsonl"
    path.write_text("from an earlier run")
    return path


def interrupt_after(count: int, monkeypatch):
    """Ctrl-C when so many images are captioned."""
    call, done = RegionCaptioner.__call__, []

    def interrupted(self, *given, **options):
        if len(done) == count:
            raise KeyboardInterrupt
        done.append(1)
        return call(self, *given, **options)

    monkeypatch.setattr(RegionCaptioner, "__call__", interrupted)


# caption.


def test_a_run_in_which_all_fails_leaves_the_old_captions(run, photos, out):
    assert run(photos, "--box", "5000,5000,5001,5001", "--captions", out) == 1
    assert out.read_text() == "from an earlier run"


def test_an_interrupted_run_leaves_the_old_captions_and_its_own_beside(
    run,
    photos,
    out,
    monkeypatch,
    capsys,
):
    interrupt_after(2, monkeypatch)
    assert run(photos, *BOX, "--captions", out) == 130
    assert out.read_text() == "from an earlier run"
    assert len((out.parent / "captions.jsonl.partial").read_text().splitlines()) == 2
    assert "2 of 4 images done and kept in" in capsys.readouterr().err
    monkeypatch.undo()


def test_a_finished_run_replaces_the_captions_and_clears_up(run, photos, out):
    (out.parent / "captions.jsonl.partial").write_text("of an interrupted run")
    assert run(photos, *BOX, "--captions", out, "--quiet") == 0
    assert len(out.read_text().splitlines()) == 4
    assert names(out.parent) == ["captions.jsonl", "photos"]


def test_a_kill_while_captions_are_written_leaves_the_old_ones(
    run,
    photos,
    out,
    monkeypatch,
):
    monkeypatch.setattr(os, "replace", die)
    kill_in(run, photos, *BOX, "--captions", out)
    assert out.read_text() == "from an earlier run"


@pytest.mark.parametrize("option", ["--captions", "--output", "--animate"])
def test_a_second_run_on_one_output_is_refused(run, photos, tmp_path, option, capsys):
    path = tmp_path / ("c.jsonl" if option == "--captions" else "drawn")
    with only_run(path):
        assert run(photos, *BOX, option, path) == 2
    assert "expected no other run to write" in capsys.readouterr().err
    assert names(tmp_path) == ["photos"]


@pytest.mark.parametrize("option", ["--captions", "--output"])
def test_what_is_read_is_never_written(run, photos, tmp_path, option, capsys):
    masks = tmp_path / "masks.json"
    masks.write_text("[[5, 5, 60, 60]]")
    image = sorted(photos.iterdir())[0]
    written = masks if option == "--captions" else image
    before = written.read_bytes()
    assert run(image, "--masks", masks, option, written) == 2
    assert "one of them" in capsys.readouterr().err
    assert written.read_bytes() == before


def test_drawings_never_replace_masks_in_a_folder(run, photos, tmp_path, capsys):
    from PIL import Image

    (tmp_path / "masks").mkdir()
    for photo in photos.iterdir():
        size = Image.open(photo).size
        Image.new("L", size, 255).save(tmp_path / "masks" / f"{photo.stem}.png")
    assert run(photos, "--masks", tmp_path / "masks", "--output", tmp_path / "masks") == 2
    assert "one of them" in capsys.readouterr().err


@pytest.mark.parametrize("place", ["/dev/null", "/dev/stdout"])
def test_a_device_is_not_replaced(run, photos, place, capsys):
    before = os.stat(place)
    assert run(photos, *BOX, "--captions", place, "--format", "json") == 2
    assert os.path.samestat(before, os.stat(place))


# evaluate.


def test_a_restart_that_fails_can_be_undone(samples, output):
    def go(fake, **options):
        return predict(fake, "processor", samples, output, progress=False, **options)

    go(FakeModel())
    journal = output.parent / "captions.rank0.journal.jsonl"
    done, first = journal.read_bytes(), output.read_bytes()
    for _ in range(2):  # a second one does not lose what the first has set aside
        with pytest.raises(KeyboardInterrupt):
            go(FakeModel(fail_at=1), restart=True)
        aside = journal.with_name(journal.name + ".old")
        assert aside.read_bytes() == done and output.read_bytes() == first
    go(FakeModel(), restart=True)
    assert names(output.parent) == ["captions.json", journal.name]


def test_a_second_prediction_run_is_refused_but_not_a_second_process(
    samples,
    output,
    monkeypatch,
    capsys,
):
    monkeypatch.setattr(LOAD_MODEL, lambda *_, **named: (FakeModel(), "processor"))
    bench = samples[0].image_path.parent.parent
    given = ["evaluate", "predict", "--benchmark", str(bench), "--output", str(output)]
    given += ["--model", "some/model", "--device", "cpu"]
    with only_run(output):
        assert main(given) == 2
        assert "expected no other run to write" in capsys.readouterr().err
        monkeypatch.setenv("RANK", "1")
        assert main(given) == 0


def test_a_sweep_that_ends_early_leaves_the_old_one(tmp_path, monkeypatch):
    path = tmp_path / "sweep.json"
    path.write_text("from an earlier run")
    fake = SimpleNamespace(decoding_defaults={})
    monkeypatch.setattr(sweep, "load_checkpoint", lambda args: (fake, None))
    monkeypatch.setattr(sweep, "scene_record", lambda *_: {})
    monkeypatch.setattr(sweep, "held_out_scenes", lambda *_: [])
    monkeypatch.setattr(sweep, "summary_line", lambda _: "")
    monkeypatch.setattr(sweep, "measurements", lambda *_: dict.fromkeys(SHAPES.swept, 1))
    rows = iter([None])

    def describe(*_, **__):
        try:
            return next(rows)
        except StopIteration:
            raise KeyboardInterrupt from None

    monkeypatch.setattr(sweep, "describe_scenes", describe)
    given = ["evaluate", "sweep", "--model", "m", "--scenes", "1", "--output", str(path)]
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        raise SystemExit(main(given))
    assert path.read_text() == "from an earlier run"
    assert len(read_json(tmp_path / "sweep.json.partial")["rows"]) == 1


def test_scenes_replace_scenes_alone_and_whole(tmp_path, monkeypatch):
    bench = tmp_path / "bench"
    write_scenes(bench, range(1), progress=False)
    before = (bench / "qa.json").read_text()

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", full)
        with pytest.raises(OSError, match="No space left"):
            write_scenes(bench, range(5, 7), progress=False)
    assert (bench / "qa.json").read_text() == before and names(tmp_path) == ["bench"]
    write_scenes(bench, range(5, 7), progress=False)
    assert len(names(bench / "images")) == 2
    (bench / "captions.json").write_text("mine")
    with pytest.raises(FileExistsError, match="scenes alone"):
        write_scenes(bench, range(1), progress=False)
    assert (bench / "captions.json").read_text() == "mine"


# judge.


def test_two_judges_at_once_share_a_cache_and_pay_once(folder):
    codes = []

    def judge(name: str, url: str):
        output = ["--output", str(folder / f"{name}.json"), "--cache", str(folder / "shared.jsonl")]
        codes.append(main([*command(folder, url, "--concurrency", "3"), *output]))

    with serving(lambda _, body: letter_of(body)) as server:
        threads = [threading.Thread(target=judge, args=(n, server.url)) for n in ("one", "two")]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert codes == [0, 0] and server.answered == CALLS
    assert read_json(folder / "one.json") == read_json(folder / "two.json")
    assert not [name for name in names(folder) if name.startswith(".")]


def test_what_a_dead_judge_was_asking_another_asks(folder):
    from perceptiondlm.evaluation.benchmarks import load_benchmark
    from perceptiondlm.evaluation.files import Journal
    from perceptiondlm.evaluation.judge import Endpoint, JudgePrompt, plan_calls

    benchmark = load_benchmark(folder / "bench")
    request = {"temperature": 0, "max_tokens": 300}
    endpoint = Endpoint(None, "judge-1", request=request)
    captions = read_json(folder / "captions.json")
    first = next(plan_calls(benchmark, captions, JudgePrompt("text"), endpoint))

    def die_asking():
        with Journal(folder / "answers.cache.jsonl").claim(first.key):
            os.kill(os.getpid(), signal.SIGKILL)

    kill_in(die_asking)
    with serving(lambda _, body: letter_of(body)) as server:
        assert main(command(folder, server.url)) == 0
        assert server.answered == CALLS
