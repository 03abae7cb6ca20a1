"""`perceptiondlm evaluate report`: joins scores, speed and where they come from in one report.

It is written as Markdown for people and as JSON for machines. Every number is traced: the report
names files with their hashes, judge, prompt version, options, hardware, versions and git revision,
as the runs recorded them.
"""

import argparse
from collections.abc import Iterable, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from .environment import run_environment
from .figures import draw_figures, figure_rows
from .files import file_sha256, read_json, run_record_path, write_json, write_text

SECTIONS = (  # (field of the scores, title of its table, title of its first column)
    ("per_region_count", "By regions in an image", "regions in the image"),
    ("per_category", "By category", "category"),
)
SCORED = (  # sections of the scores that the report takes over as they are
    "confidence_intervals",
    "coverage",
    "missing",
    "interference",
    "per_region_count",
    "per_category",
)
THROUGHPUT = "throughput"  # has a table of its own
MEASURED_RUN = (  # what `synthetic` records of its run, besides what it measures
    "model",
    "subfolder",
    "dtype",
    "quantize",
    "device",
    "weights",
    "decoding_options",
    "regions_per_pass",
    "scenes",
    "seed",
    "split",
    "batch_size",
    "scene_kind",
    "more",
    "judge",
)
OF_ONE_KIND = {  # shares that `synthetic` measures on one kind of scenes alone, and their titles
    "interference_rate": "captions with an attribute of another region",
    "interference_by_chance": "as many as wrong values hit by chance",
    "name_accuracy": "names",
    "clear_name_accuracy": "names of things that are clear to see",
    "unseen_style_name_accuracy": "names in an unseen drawing style",
    "unseen_background_name_accuracy": "names on unseen backgrounds",
    "relation_accuracy": "relations",
    "grammatical": "grammatical captions",
    "mixture_rate": "captions that mix wordings",
    "label_accuracy": "labels",
    "region_question_accuracy": "questions about regions",
}
ENVIRONMENT = ("hardware", "versions", "git_revision")
AVERAGES = ("average_positive", "average_negative", "average")


def build_report(
    scores: Mapping | None = None,
    *,
    prediction_run: Mapping | None = None,
    judge_run: Mapping | None = None,
    measurements: Mapping | None = None,
    rows: Sequence[dict] = (),
    row_runs: Mapping[str, Mapping] | None = None,
    sources: Mapping[str, str] | None = None,
) -> dict:
    """Joins what the steps of an evaluation wrote into one object.

    Args:
        scores: what `score` wrote; None for a report of what `synthetic` measured alone.
        prediction_run: the record beside the predictions: checkpoint, options, throughput.
        judge_run: the record beside the answers: judge, prompt version.
        measurements: what `synthetic` measured of the checkpoint.
        rows: measurements for the figures (see `draw_figures`).
        row_runs: by file, what `sweep` or `latency` recorded of the run that gave some rows.
        sources: SHA-256 of each file that went in.

    Raises ValueError for scores of another form, for neither scores nor measurements, and for runs
    of two checkpoints.
    """
    if scores is None and not measurements:
        raise ValueError("expected scores, measurements or both, got neither")
    needed = ("summary", "regions")
    if scores is None:
        scores = dict.fromkeys(needed)
    elif lacking := [name for name in needed if name not in scores or scores[name] is None]:
        raise ValueError(f"expected scores with summary and regions, got none for {lacking}")
    _expect_same_weights(prediction_run or {}, measurements or {})

    return {
        "summary": scores["summary"],
        **{name: scores.get(name) for name in SCORED},
        "prediction_run": prediction_run,
        "judge_run": judge_run,
        "measurements": dict(measurements) if measurements else None,
        "scoring": scores.get("provenance"),
        "rows": list(rows),
        "row_runs": dict(row_runs or {}),
        "sources": dict(sources or {}),
        "environment": run_environment(),
    }


def _expect_same_weights(prediction_run: Mapping, measurements: Mapping):
    """Refuses runs of two checkpoints, told apart by their weights' fingerprints.

    In two dtypes, or quantized and not, one checkpoint has two fingerprints, so those are not
    compared.
    """
    compared = ("dtype", "quantize", "weights")
    (*how, weights), (*other_how, other) = (
        [run.get(name) for name in compared] for run in (prediction_run, measurements)
    )
    if weights and other and how == other_how and weights != other:
        raise ValueError(
            f"expected measurements of the weights that predicted, {weights}, got of {other}"
        )


def write_report(report: Mapping, folder: str | Path, *, title: str) -> Path:
    """Writes `report.json`, the figures and `report.md`; returns the last."""
    folder = Path(folder)
    figures = draw_figures(report["rows"], folder)
    write_json(folder / "report.json", report)
    write_text(folder / "report.md", render_markdown(report, figures, title=title))
    return folder / "report.md"


def render_markdown(report: Mapping, figures: Sequence[Path] = (), *, title: str) -> str:
    """Renders the report as Markdown; figures are linked by name."""
    parts = [
        f"# {title}",
        _summary(report),
        _synthetic(report["measurements"]),
        _efficiency(report),
        _measurements(report["rows"]),
        *(f"![{figure.stem.replace('_', ' ')}]({figure.name})" for figure in figures),
        _interference(report["interference"]),
        *(_groups(report[field], name, column) for field, name, column in SECTIONS),
        _provenance(report),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _summary(report: Mapping) -> str:
    """Renders the averages with their intervals, and what they do not rest on."""
    if report["summary"] is None:
        return ""
    intervals = report["confidence_intervals"]
    header = ["", "%"] + ([f"{intervals['interval_percent']} % interval"] if intervals else [])
    rows = []
    for name in AVERAGES:
        row = [name.replace("_", " "), _percent(report["summary"][name])]
        # Scores from elsewhere may have no intervals.
        rows.append(row + ([" to ".join(map(_percent, intervals[name]))] if intervals else []))

    parts = ["## Scores", markdown_table(header, rows)]
    if coverage := report["coverage"]:
        counts = ", ".join(f"{name.replace('_', ' ')}: {n}" for name, n in coverage.items())
        parts.append(counts[0].upper() + counts[1:] + ".")
    if (report["missing"] or {}).get("regions"):
        verdict = {"wrong": "count as wrong", "drop": "are left out"}[report["missing"]["policy"]]
        parts.append(f"The {len(report['missing']['regions'])} missing regions {verdict}.")
    return "\n\n".join(parts)


def _synthetic(measured: Mapping | None) -> str:
    """Renders what the exact judge of synthetic scenes found, attribute by attribute."""
    if not measured:
        return ""

    shares = {
        "attributes, mean": measured["attribute_accuracy"],
        **measured["per_attribute"],
        "captions right in every attribute": measured["exact_caption_rate"],
        **{title: measured[name] for name, title in OF_ONE_KIND.items() if name in measured},
        f"questions ({measured['questions']})": measured["question_accuracy"],
        **{
            f"questions: {kind.replace('_', ' ')}": found["accuracy"]
            for kind, found in measured["questions_per_kind"].items()
        },
    }

    title = f"## Exact judge, {measured['regions']} regions of {measured['scenes']} scenes\n\n"
    rows = [[name, "" if v is None else _percent(v)] for name, v in shares.items()]
    return title + markdown_table(["", "%"], rows)


def _efficiency(report: Mapping) -> str:
    throughput = (report["prediction_run"] or {}).get("throughput")
    if not throughput:
        return ""

    rows = [
        ["images, regions", f"{throughput['images']}, {throughput['regions']}"],
        ["forward passes", f"{throughput['forwards']}"],
        ["TPF nominal (padding counted)", f"{throughput['nominal_tpf']:.2f}"],
        ["TPF effective (before end of turn)", f"{throughput['effective_tpf']:.2f}"],
        ["seconds generating", f"{throughput['generate_seconds']:.2f}"],
        ["seconds end to end", f"{throughput['end_to_end_seconds']:.2f}"],
        ["effective tokens per second", f"{throughput['tokens_per_second']:.2f}"],
        ["regions per second", f"{throughput['regions_per_second']:.3f}"],
        ["processes", f"{throughput['processes']}"],
    ]
    return "## Efficiency\n\n" + markdown_table(["", "measured"], rows)


def _measurements(rows: Sequence[dict]) -> str:
    if not rows:
        return ""
    fields = list(dict.fromkeys(field for row in rows for field in row))
    body = [[_number(row.get(field, "")) for field in fields] for row in rows]
    return "## Measurements\n\n" + markdown_table(fields, body)


def _interference(interference: Mapping | None) -> str:
    if not interference:
        return ""
    return (
        "## Interference\n\n"
        f"Of {interference['questions']} questions about what lies outside a region,"
        f" {_percent(interference['mentioned_rate'])} % were answered with a mention;"
        f" their score is {_percent(interference['score'])} %"
        f" over {interference['regions']} regions."
    )


def _groups(groups: Mapping | None, title: str, column: str) -> str:
    if not groups:
        return ""
    body = [
        [name, str(group["regions"]), *(_percent(group[average]) for average in AVERAGES)]
        for name, group in groups.items()
    ]
    header = [column, "regions", "positive %", "negative %", "average %"]
    return f"## {title}\n\n" + markdown_table(header, body)


def _provenance(report: Mapping) -> str:
    """Renders all that was recorded about the runs, each flattened to one table."""
    names = {
        "prediction_run": "Prediction",
        "judge_run": "Judge",
        "measurements": "Exact judge",
        "scoring": "Scoring",
        "sources": "Files (SHA-256)",
        "environment": "This report",
    }
    records = {name: dict(report[field] or {}) for field, name in names.items()}
    # What was measured has tables of its own, above.
    records["Exact judge"] = _run_of(records["Exact judge"], MEASURED_RUN)
    runs = report.get("row_runs") or {}
    records |= {f"Measurements in {path}": _run_of(run, run) for path, run in runs.items()}

    parts = ["## Provenance"]
    for name, record in records.items():
        record.pop(THROUGHPUT, None)
        if record.get("environment") == report["environment"]:
            record["environment"] = "as of this report"

        pairs = _flatten(record)
        if pairs:
            parts.append(f"**{name}**\n\n" + markdown_table(["", "recorded"], pairs))
    return "\n\n".join(parts)


def _run_of(record: Mapping, names: Iterable[str]) -> dict:
    """Returns the named parts of a record, those about the machine under `environment`."""
    run = {name: record[name] for name in names if name in record and name not in ENVIRONMENT}
    environment = {name: record[name] for name in ENVIRONMENT if name in record}
    return run | ({"environment": environment} if environment else {})


def _flatten(record: Mapping, prefix: str = "") -> list[list[str]]:
    """Turns a nested record into pairs of a dotted name and a value."""
    pairs = []
    for name, value in record.items():
        if isinstance(value, Mapping):
            pairs += _flatten(value, f"{prefix}{name}.")
        else:
            pairs.append([prefix + name, _number(value)])
    return pairs


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Renders a Markdown table of cells of text."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(_cell(cell) for cell in line) + " |" for line in lines)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _percent(value: float) -> str:
    return f"{100 * value:.2f}"


def _number(value: object) -> str:
    if isinstance(value, list):
        return ", ".join(map(_number, value)) or "none"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def configure(parser: argparse.ArgumentParser):
    """Adds the options of this step."""
    add = parser.add_argument
    add("--scores", help="what score wrote; may be left out with --measurements")
    add("--predictions", help="prediction file; its run record lies beside it")
    add("--answers", help="answer file; its run record lies beside it")
    add("--measurements", help="what `synthetic` wrote for the same checkpoint")
    help_text = "measurements for the figures: what sweep or latency wrote, or a JSON list"
    add("--rows", nargs="+", default=[], help=help_text)
    add("--title", default="Evaluation", help="of the report")
    add("--output", required=True, help="folder for report.md, report.json and figures")


@contextmanager
def _reading(paths: Sequence[str]):
    """Says that one of the files is not what a step wrote, where its content is of another form."""
    try:
        yield
    except (AttributeError, IndexError, KeyError, TypeError) as error:
        names, problem = ", ".join(paths), f"{type(error).__name__}: {error}"
        raise ValueError(
            f"expected what the steps of `evaluate` wrote in {names}, got another form ({problem})"
        ) from error


def run(args: argparse.Namespace) -> int:
    """Writes the report of the files that were given."""
    given = (args.scores, args.predictions, args.answers, args.measurements, *args.rows)
    given = [path for path in given if path]
    with _reading(given):
        print(_write(args, given))
    return 0


def _write(args: argparse.Namespace, given: Sequence[str]) -> Path:
    measured = {path: read_json(path) for path in args.rows}
    scores = read_json(args.scores) if args.scores else None
    judge_run = _run_record(args.answers)

    # Each step recorded the hash of what it was made from.
    scoring = None if scores is None else scores.get("provenance")
    _expect_made_from(args.answers, (scoring or {}).get("answers_sha256"))
    _expect_made_from(args.predictions, (judge_run or {}).get("predictions_sha256"))

    report = build_report(
        scores,
        prediction_run=_run_record(args.predictions),
        judge_run=judge_run,
        measurements=read_json(args.measurements) if args.measurements else None,
        rows=[row for path, content in measured.items() for row in figure_rows(content, path)],
        row_runs={
            path: {name: value for name, value in content.items() if name != "rows"}
            for path, content in measured.items()
            if isinstance(content, dict)
        },
        sources={str(path): file_sha256(path) for path in given},
    )
    return write_report(report, args.output, title=args.title)


def _expect_made_from(path: str | None, recorded: str | None):
    """Refuses a file other than the one whose hash the next step recorded."""
    if path is not None and recorded is not None and file_sha256(path) != recorded:
        raise ValueError(
            f"expected the file that was judged and scored (SHA-256 {recorded[:16]}...), got"
            f" {path} ({file_sha256(path)[:16]}...)"
        )


def _run_record(output: str | None) -> dict | None:
    """Reads the record of the run that wrote a file; None without a file or a record."""
    if output is None or not run_record_path(output).is_file():
        return None
    return read_json(run_record_path(output))
