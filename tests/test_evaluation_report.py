"""Breakdowns, reports and figures: numbers against hand counts, and that each can be traced."""

import hashlib
import json
import os
import subprocess
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from perceptiondlm.apps.cli import main
from perceptiondlm.evaluation import cli as evaluation_cli
from perceptiondlm.evaluation import environment
from perceptiondlm.evaluation.breakdowns import (
    confidence_intervals,
    coverage,
    interference,
    table_by,
)
from perceptiondlm.evaluation.environment import git_revision
from perceptiondlm.evaluation.figures import draw_figures, figure_rows
from perceptiondlm.evaluation.files import Journal, read_journal, write_json, write_text
from perceptiondlm.evaluation.report import build_report, render_markdown
from perceptiondlm.evaluation.scoring import Question, RegionScore, score_benchmark
from PIL import Image

SALIENT = Question("?", ("said", "unsaid"), (-1, 1), "negative", "salient negative")
PART = Question("?", ("said", "unsaid"), (-1, 1), "negative", "negative part")


def region(positive: float, negative: float | None) -> RegionScore:
    return RegionScore(0.0, positive, negative, True, (0,))


def test_interference_counts_questions_about_other_regions_alone():
    questions = {"a": (SALIENT, SALIENT, PART), "b": (SALIENT,), "c": (PART,), "d": (SALIENT,)}
    answers = {
        "a": ["Yes", "said", "unsaid", "said"],
        "b": ["Yes", "unsaid"],
        "c": ["Yes", "said"],
        "d": ["No", "unsaid"],  # not recognized: earns nothing
    }
    found = interference(questions, score_benchmark(questions, answers).regions)
    assert found == {
        "regions": 3,
        "questions": 4,
        "score": pytest.approx((0 + 1 + 0) / 3),
        "mentioned_rate": 1 / 4,
    }


def test_tables_average_each_group():
    regions = {"a": region(1, None), "b": region(0, 0.5), "c": region(0.5, -0.5)}
    assert table_by(regions, {"a": "x", "b": "x", "c": "y"}) == {
        "x": {
            "regions": 2,
            "average_positive": 0.5,
            "average_negative": 0.5,
            "average": 0.5,
        },
        "y": {
            "regions": 1,
            "average_positive": 0.5,
            "average_negative": -0.5,
            "average": 0.0,
        },
    }


def test_coverage_tells_missing_unanswered_and_unmatched_apart():
    questions = {key: (SALIENT, PART) for key in "abc"}
    answers = {"a": ["perhaps", "said", "???"], "b": ["Yes", None]}
    assert coverage(score_benchmark(questions, answers), answers) == {
        "regions": 3,
        "missing_predictions": 1,
        "unanswered_questions": 2,
        "answers_that_fit_no_choice": 2,
        "recognitions_that_fit_no_choice": 1,
    }


def test_intervals_are_those_of_a_plain_bootstrap_over_images():
    draw = np.random.default_rng(3)
    image_of = {str(i): str(i // 3) for i in range(90)}
    regions = {
        key: region(draw.random(), draw.random() if int(key) % 4 else None) for key in image_of
    }
    found = confidence_intervals(regions, image_of, resamples=4000, seed=1)
    averages = []
    for _ in range(4000):
        chosen = draw.integers(0, 30, 30)
        drawn = [regions[str(3 * i + j)] for i in chosen for j in range(3)]
        negatives = [r.negative for r in drawn if r.negative is not None]
        averages.append((np.mean([r.positive for r in drawn]) + np.mean(negatives)) / 2)
    assert found["average"] == pytest.approx(np.percentile(averages, [2.5, 97.5]), abs=0.005)


def test_intervals_depend_on_the_seed_alone():
    regions = {str(i): region(i / 7, i / 9) for i in range(8)}
    image_of = {key: key for key in regions}
    first = confidence_intervals(regions, image_of, seed=1)
    assert first == confidence_intervals(regions, image_of, seed=1)
    assert first != confidence_intervals(regions, image_of, seed=2)


def test_equal_regions_have_intervals_of_no_width():
    found = confidence_intervals(
        {"a": region(0.5, 0.25)} | {"b": region(0.5, 0.25)}, {"a": "1", "b": "2"}
    )
    assert found["average"] == [0.375, 0.375]


def test_nothing_has_intervals_of_zero():
    assert confidence_intervals({}, {})["average"] == [0, 0]
    with pytest.raises(ValueError, match="resamples of 1 or more, got 0"):
        confidence_intervals({}, {}, resamples=0)


SCORES = {
    "summary": {"average_positive": 0.5, "average_negative": 0.25, "average": 0.375},
    "regions": {},
    "confidence_intervals": {
        "average_positive": [0.4, 0.6],
        "average_negative": [0.2, 0.3],
        "average": [0.3, 0.45],
        "interval_percent": 95,
    },
    "interference": {"regions": 3, "questions": 4, "score": 0.125, "mentioned_rate": 0.5},
    "per_category": {
        "a|b": {
            "regions": 2,
            "average_positive": 0.1,
            "average_negative": 0.2,
            "average": 0.15,
        }
    },
}
ROWS = [
    {"label": "joint", "accuracy": 0.6, "seconds": 10, "forwards": 32},
    {"label": "joint", "accuracy": 0.5, "seconds": 5, "forwards": 16},
    {"label": "one by one", "regions": 1, "latency": 1.0, "tokens_per_second": 20.0},
    {"label": "one by one", "regions": 4, "latency": 4.0, "tokens_per_second": 20.0},
]


def test_markdown_shows_scores_intervals_and_groups():
    text = render_markdown(build_report(SCORES), title="A report")
    assert text.startswith("# A report\n")
    assert "| average | 37.50 | 30.00 to 45.00 |" in text
    assert "Of 4 questions about what lies outside a region, 50.00 %" in text
    assert "| a\\|b | 2 | 10.00 | 20.00 | 15.00 |" in text


def test_figures_are_drawn_for_the_rows_that_have_their_numbers(tmp_path):
    drawn = draw_figures(ROWS, tmp_path)
    assert [f.name for f in drawn] == [
        "accuracy_seconds.png",
        "accuracy_forwards.png",
        "regions.png",
    ]
    for file in drawn:
        assert Image.open(file).size[0] > 500
    assert [f.name for f in draw_figures(ROWS[2:], tmp_path)] == ["regions.png"]
    assert draw_figures([], tmp_path) == []


@pytest.mark.parametrize(
    ("row", "message"),
    [({"accuracy": 1}, "with a 'label'"), ({"label": "x", "seconds": "2"}, "number for seconds")],
)
def test_a_row_that_cannot_be_drawn_is_refused(tmp_path, row, message):
    with pytest.raises(ValueError, match=f"row 0: expected .*{message}"):
        draw_figures([row], tmp_path)


def test_scores_without_a_summary_are_refused():
    with pytest.raises(ValueError, match="summary and regions, got none for \\['summary'\\]"):
        build_report({"regions": {}})
    with pytest.raises(ValueError, match="summary and regions, got none for \\['summary'\\]"):
        build_report({"summary": None, "regions": {}}, measurements={"scenes": 2})


def test_a_report_needs_scores_or_measurements(tmp_path, capsys):
    with pytest.raises(ValueError, match="expected scores, measurements or both, got neither"):
        build_report()
    assert main(["evaluate", "report", "--output", str(tmp_path / "report")]) == 2
    assert "got neither" in capsys.readouterr().err


def test_every_number_of_a_report_can_be_traced(tmp_path):
    """The report names files with hashes, judge, prompt version, options and revision."""
    write_json(tmp_path / "scores.json", SCORES)
    write_json(tmp_path / "captions.json", {"a": "b"})
    throughput = {
        **dict.fromkeys(("images", "regions", "forwards", "processes"), 3),
        **dict.fromkeys(("nominal_tpf", "effective_tpf", "tokens_per_second"), 2.5),
        **dict.fromkeys(("generate_seconds", "end_to_end_seconds", "regions_per_second"), 1.5),
    }
    run = {"checkpoint": "tiny", "options": {"steps": 16}, "throughput": throughput}
    write_json(tmp_path / "captions.run.json", run)
    write_json(tmp_path / "answers.json", {})
    write_json(tmp_path / "answers.run.json", {"judge": "j-1", "prompt_version": "p-9"})
    write_json(tmp_path / "rows.json", ROWS)
    files = [
        part
        for name in ("scores", "answers", "rows")
        for part in (f"--{name}", str(tmp_path / f"{name}.json"))
    ]
    predictions = ["--predictions", str(tmp_path / "captions.json")]
    output = tmp_path / "report"
    assert main(["evaluate", "report", *files, *predictions, "--output", str(output)]) == 0
    text = (output / "report.md").read_text()
    for part in ("j-1", "p-9", "options.steps | 16", "tiny", "versions.torch", "git_revision"):
        assert part in text
    assert "| TPF nominal (padding counted) | 2.50 |" in text
    assert "![regions](regions.png)" in text and (output / "regions.png").exists()
    report = json.loads((output / "report.json").read_text())
    assert report["judge_run"]["judge"] == "j-1" and report["rows"] == ROWS
    assert set(report["sources"]) == {
        str(tmp_path / n) for n in ("scores.json", "captions.json", "answers.json", "rows.json")
    }


def test_the_revision_is_the_commit_and_tells_of_changes(tmp_path):
    def git(*arguments):
        identity = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
        subprocess.run(
            ["git", *identity, *arguments], cwd=tmp_path, check=True, capture_output=True
        )

    assert git_revision(tmp_path) is None
    git("init")
    assert git_revision(tmp_path) is None
    (tmp_path / "file").write_text("1")
    git("add", "file")
    git("commit", "-m", "one")
    os.utime(tmp_path / "file", (1, 1))  # git would note it in its index, under a lock
    index = (tmp_path / ".git" / "index").read_bytes()
    clean = git_revision(tmp_path)
    assert len(clean) == 40
    assert (tmp_path / ".git" / "index").read_bytes() == index
    (tmp_path / "file").write_text("2")
    assert git_revision(tmp_path) == clean + "+changes"
    (tmp_path / "inside").mkdir()
    assert git_revision(tmp_path / "inside") is None


def test_a_step_records_the_revision_at_which_it_began(monkeypatch):
    revision, recorded = ["loaded"], []

    def run_step(args) -> int:
        revision[0] = "committed since"
        recorded.append(environment.run_environment()["git_revision"])
        return 0

    monkeypatch.setattr(environment, "git_revision", lambda: revision[0])
    environment.code_revision.cache_clear()
    assert evaluation_cli.run(SimpleNamespace(step="step", run_step=run_step)) == 0
    environment.code_revision.cache_clear()  # of the pretended one
    assert recorded == ["loaded"]


def test_a_journal_keeps_what_was_acknowledged_and_cuts_a_torn_line(tmp_path):
    path = tmp_path / "deep" / "journal.jsonl"
    with Journal(path) as journal:
        journal.append({"a": 1})
        assert read_journal(path) == [{"a": 1}]
    with open(path, "ab") as file:
        file.write(b'{"b": ')
    assert read_journal(path) == [{"a": 1}]
    with Journal(path) as journal:
        journal.append({"c": "é"})
        assert journal.records == [{"a": 1}, {"c": "é"}]
    assert path.read_bytes().count(b"\n") == 2


def test_a_broken_line_inside_a_journal_is_named(tmp_path):
    path = tmp_path / "journal.jsonl"
    path.write_text('{"a": 1}\n{"b"\n{"c": 2}\n')
    with pytest.raises(ValueError, match="line 2 of .*journal.jsonl"):
        Journal(path)
    path.write_text("[1]\n")
    with pytest.raises(ValueError, match="expected an object in line 1"):
        read_journal(path)


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    write_text(tmp_path / "a.txt", "old")
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError, match="full"):
        write_text(tmp_path / "a.txt", "new")
    assert [f.name for f in tmp_path.iterdir()] == ["a.txt"]
    assert (tmp_path / "a.txt").read_text() == "old"


def test_measurements_of_other_steps_are_taken_in_and_traced(tmp_path):
    environment = {"hardware": {}, "versions": {}, "git_revision": "abc"}
    run = {"model": "some/model", "weights": "f00d", "seed": 3, **environment}
    sweep = {"rule": "factor", "value": 1.0, "steps": 8, "attribute_accuracy": 0.5}
    sweep |= {"forwards_per_pass": 4.0, "seconds": 2.0}
    latency = {"label": "together", "regions": 2, "latency": 0.1, "tokens_per_second": 30.0}
    measured = {"regions": 9, "scenes": 2, "attribute_accuracy": 0.75, "exact_caption_rate": 0.25}
    measured |= {"interference_by_chance": 0.0625}
    measured |= {"interference_rate": 0.125, "question_accuracy": 0.5, "questions": 8, **run}
    measured |= {"per_attribute": {"shape": 0.75}, "questions_per_kind": {}}
    averages = dict.fromkeys(("average_positive", "average_negative", "average"), 1.0)
    contents = {
        "scores": {"summary": averages, "regions": {}},
        "measured": measured,
        "sweep": {"rows": [sweep], **run},
        "latency": {"rows": [latency], **run, "seed": 4},
    }
    for name, content in contents.items():
        write_json(tmp_path / f"{name}.json", content)
    files = {name: str(tmp_path / f"{name}.json") for name in contents}
    given = ["--scores", files["scores"], "--measurements", files["measured"]]
    rows = ["--rows", files["sweep"], files["latency"], "--output", str(tmp_path / "report")]
    assert main(["evaluate", "report", *given, *rows]) == 0
    text = (tmp_path / "report" / "report.md").read_text()
    for line in (
        "## Exact judge, 9 regions of 2 scenes",
        "| captions with an attribute of another region | 12.50 |",
        "| as many as wrong values hit by chance | 6.25 |",
        "| factor 1 | 8 | 0.5 | 2 | 4 |",
        f"**Measurements in {files['latency']}**",
        "| weights | f00d |",
        "| environment.git_revision | abc |",
    ):
        assert line in text
    drawn = {path.name for path in (tmp_path / "report").glob("*.png")}
    assert drawn == {"accuracy_seconds.png", "accuracy_forwards.png", "regions.png"}

    # Without scores of a benchmark the rest is the same.
    alone = ["--measurements", files["measured"], *rows[:3], "--output", str(tmp_path / "alone")]
    assert main(["evaluate", "report", *alone]) == 0
    text = (tmp_path / "alone" / "report.md").read_text()
    assert "## Exact judge, 9 regions of 2 scenes" in text and "## Scores" not in text


def test_measurements_of_another_checkpoint_than_predicted_are_refused():
    predicted, measured = ({"dtype": "float32", "weights": name} for name in ("aaaa", "bbbb"))
    with pytest.raises(ValueError, match="weights that predicted, aaaa, got of bbbb"):
        build_report(SCORES, prediction_run=predicted, measurements=measured)


@pytest.mark.parametrize("other", ["captions", "answers"])
def test_files_that_the_scores_do_not_come_from_are_refused(tmp_path, capsys, other):
    files = {name: str(tmp_path / f"{name}.json") for name in ("scores", "captions", "answers")}
    write_json(files["captions"], {"a": "b"})
    write_json(files["answers"], {"a": ["Yes"]})
    sha256 = {n: hashlib.sha256(Path(f).read_bytes()).hexdigest() for n, f in files.items()
              if n != "scores"}  # fmt: skip
    judged = {"judge": "j", "predictions_sha256": sha256["captions"]}
    write_json(tmp_path / "answers.run.json", judged)
    write_json(files["scores"], SCORES | {"provenance": {"answers_sha256": sha256["answers"]}})
    given = ["--scores", files["scores"], "--answers", files["answers"],
             "--predictions", files["captions"], "--output", str(tmp_path / "report")]  # fmt: skip
    assert main(["evaluate", "report", *given]) == 0
    write_json(files[other], {"another": "model's"})
    assert main(["evaluate", "report", *given]) == 2
    assert f"got {files[other]}" in capsys.readouterr().err


def test_rows_that_are_no_list_are_refused(tmp_path, capsys):
    write_json(tmp_path / "scores.json", {"summary": {}, "regions": {}})
    write_json(tmp_path / "rows.json", {"rows": 3})
    given = ["--scores", str(tmp_path / "scores.json"), "--output", str(tmp_path / "report")]
    assert main(["evaluate", "report", *given, "--rows", str(tmp_path / "rows.json")]) == 2
    assert "expected a list of rows, got dict" in capsys.readouterr().err


@pytest.mark.parametrize(
    "content", ["[]", "3", '{"summary": 1, "regions": {}}', '{"provenance": 3}']
)
def test_scores_of_another_form_are_named(tmp_path, content, capsys):
    (tmp_path / "scores.json").write_text(content)
    given = ["--scores", str(tmp_path / "scores.json"), "--output", str(tmp_path / "made")]
    assert main(["evaluate", "report", *given]) == 2
    said = capsys.readouterr().err
    assert "scores.json, got another form" in said and "Traceback" not in said


def test_a_sweep_over_things_has_lines_of_names_sentences_and_mixtures():
    row = {"rule": "fixed", "steps": 2, "seconds": 1.0, "forwards_per_pass": 2.0}
    of_things = {"name_accuracy": 0.7, "grammatical": 0.4, "mixture_rate": 0.2}
    (shapes,) = figure_rows({"rows": [{**row, "attribute_accuracy": 0.9}]})
    (things,) = figure_rows({"rows": [{**row, **of_things, "attribute_accuracy": 0.9}]})
    assert shapes["accuracy"] == 0.9 and not {"names", "grammatical", "mixtures"} & set(shapes)
    assert (things["names"], things["grammatical"], things["mixtures"]) == (0.7, 0.4, 0.2)
    assert "accuracy" not in things


def test_a_report_of_things_draws_them_against_forward_passes(tmp_path):
    shares = {"names": 0.5, "grammatical": 0.6, "mixtures": 0.1}
    rows = [{"label": "fixed", "forwards": n, "seconds": 1.0, **shares} for n in (1, 2)]
    assert [path.name for path in draw_figures(rows, tmp_path)] == ["things_forwards.png"]
