"""Draws the figures of a report from rows of measurements."""

import io
from collections.abc import Sequence
from pathlib import Path

from ..common.extras import extra
from ..common.files import write_bytes

# file: (fields of a row: x, y...; titles of the axes: x, y...)
FIGURES = {
    "accuracy_seconds.png": (("seconds", "accuracy"), ("seconds end to end", "accuracy (%)")),
    "accuracy_forwards.png": (("forwards", "accuracy"), ("forward passes", "accuracy (%)")),
    "things_forwards.png": (
        ("forwards", "names", "grammatical", "mixtures"),
        ("forward passes", "names right (%)", "sentences of the grammar (%)", "mixtures (%)"),
    ),
    "regions.png": (
        ("regions", "latency", "tokens_per_second"),
        ("regions in an image", "seconds per image", "tokens per second"),
    ),
}
# Shares, drawn in per cent, by the field of a row of `sweep` that they are taken from.
OF_SHAPES = {"accuracy": "attribute_accuracy"}
OF_THINGS = {
    "names": "name_accuracy",
    "grammatical": "grammatical",
    "mixtures": "mixture_rate",
}


def figure_rows(content: object, source: str = "rows") -> list[dict]:
    """Returns rows as `draw_figures` takes them, from a list or from what a step wrote.

    The rows of `latency` are such rows already; those of `sweep` become a line for each rule, with
    the accuracy of the attributes (shapes), or with the names, sentences and mixtures (things).

    Raises ValueError, with the `source`, for anything else.
    """
    rows = content.get("rows") if isinstance(content, dict) else content
    if not isinstance(rows, list):
        raise ValueError(f"{source}: expected a list of rows, got {type(content).__name__}")
    return [_of_sweep(row) if isinstance(row, dict) and "rule" in row else row for row in rows]


def _of_sweep(row: dict) -> dict:
    """Turns a row of `sweep` into one of the figures, labeled by rule, value and verification."""
    value, verify = row.get("value"), row.get("verify")
    shares = OF_THINGS if "name_accuracy" in row else OF_SHAPES
    label = row["rule"] + ("" if value is None else f" {value:g}")
    return {
        "label": label + ("" if verify is None else f" + verify {verify:g}"),
        "budget": row["steps"],
        **{name: row[field] for name, field in shares.items()},
        "seconds": row["seconds"],
        "forwards": row["forwards_per_pass"],
    }


def draw_figures(rows: Sequence[dict], folder: str | Path) -> list[Path]:
    """Draws each figure whose fields some rows have, with a line for each label.

    Args:
        rows: measurements; `label` names a system, and the numbers are `accuracy` (in [-1, 1]),
            `names`, `grammatical` and `mixtures` (shares), `seconds`, `forwards`, `regions`,
            `latency` (seconds per image), `tokens_per_second`.
        folder: where the PNG files go.

    Returns the files drawn. Raises ValueError for a row without a label, or with a field that is
    no number.
    """
    _check_rows(rows)
    folder = Path(folder)
    drawn = []
    for name, (fields, titles) in FIGURES.items():
        usable = [row for row in rows if all(field in row for field in fields)]
        if usable:
            _draw(usable, fields, titles, folder / name)
            drawn.append(folder / name)
    return drawn


def _draw(rows: Sequence[dict], fields: Sequence[str], titles: Sequence[str], file: Path):
    """Draws panels side by side, one for each y field, over a shared x field."""
    with extra("eval"):
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

    x, *ys = fields
    figure = Figure(figsize=(5.2 * len(ys), 3.8), layout="constrained")
    FigureCanvasAgg(figure)  # no window, whatever the user's backend is
    panels = figure.subplots(1, len(ys), squeeze=False)[0]
    for axes, y, title in zip(panels, ys, titles[1:], strict=True):
        for label in dict.fromkeys(row["label"] for row in rows):
            points = sorted((row[x], _scaled(y, row[y])) for row in rows if row["label"] == label)
            axes.plot(*zip(*points, strict=True), marker="o", label=label)
        axes.set_xlabel(titles[0])
        axes.set_ylabel(title)
        axes.grid(alpha=0.3)
    panels[0].legend()  # the lines of all panels are the same

    # Into memory first, so that the file is written whole or not at all
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=150)
    write_bytes(file, drawn.getvalue())


def _scaled(field: str, value: float) -> float:
    return 100 * value if field in OF_SHAPES | OF_THINGS else value


def _check_rows(rows: Sequence[dict]):
    numeric = {field for fields, _ in FIGURES.values() for field in fields}
    for number, row in enumerate(rows):
        if not isinstance(row, dict) or not isinstance(row.get("label"), str):
            raise ValueError(f"row {number}: expected an object with a 'label', got {row!r:.80}")

        for field in numeric & set(row):
            if not isinstance(row[field], int | float):
                raise ValueError(f"row {number}: expected a number for {field}, got {row[field]!r}")
