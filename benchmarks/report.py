"""Shows a benchmark's result as a Markdown table and as two plots."""

from pathlib import Path

from ..common.extras import extra
from ..common.files import write_text

START, END = "<!-- benchmark table: start -->", "<!-- benchmark table: end -->"


def table(result: dict) -> str:
    """Renders a Markdown table: a row for each method, number of regions and number of images."""
    machine = result["machine"]
    device = machine.get("gpu") or f"{machine['cpu']}, {machine['threads']} threads"

    def rate(name: str) -> str:
        """Returns a rate of the machine in GFLOP/s."""
        return f"{result['floor'][f'{name}_flops_per_second'] / 1e9:.0f}"

    lines = [
        f"Preset `{result['preset']}`, {result['steps']} steps ({result['budget']} for adaptive"
        f" methods), {result['caption_length']} tokens a caption, median of {result['repeats']},"
        f" {device}, torch {result['versions']['torch']}. Linear layers reach"
        f" {rate('matmul')} GFLOP/s in ours, {rate('default_matmul')} in the published way.",
        "",
        "| method | exact | regions | images | seconds | ratio | forwards | TPF | peak GiB |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|",
    ]

    for row in result["rows"]:
        ratio = f"{row['ratio']:.1f}x" if row["ratio"] else ""
        lines.append(
            f"| {row['method']} | {'yes' if row['exact'] else 'no'} | {row['regions']} |"
            f" {row['images']} | {row['seconds']:.2f} | {ratio} | {row['forwards']} |"
            f" {row['tokens_per_forward']:.1f} | {row['peak_bytes'] / 2**30:.2f} |"
        )
    return "\n".join(lines)


def update_readme(path: Path, result: dict):
    """Replaces what stands between the markers of a README with the table."""
    text = path.read_text()
    if START not in text or END not in text:
        raise ValueError(f"expected the markers {START} and {END} in {path}")
    before, rest = text.split(START)
    write_text(path, f"{before}{START}\n{table(result)}\n{END}{rest.split(END)[1]}")


def draw(result: dict, folder: Path):
    """Draws `latency-PRESET.png` and `floor-PRESET.png` of the rows with one image.

    The first shows seconds and tokens per second against regions, the second the seconds against
    the least that the machine's matmul rate and bandwidth allow.
    """
    with extra("eval"):
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

    folder.mkdir(parents=True, exist_ok=True)
    rows = [row for row in result["rows"] if row["images"] == 1]
    by_method = {}
    for row in rows:
        by_method.setdefault(row["method"], []).append(row)

    for name, size, draw_on in (("latency", (10, 4), _latency), ("floor", (6, 4), _floor)):
        figure = Figure(figsize=size, layout="tight")
        FigureCanvasAgg(figure)  # no window, whatever the user's backend is
        draw_on(figure, by_method)
        figure.savefig(folder / f"{name}-{result['preset']}.png", dpi=120)


def _latency(figure, by_method: dict[str, list[dict]]):
    """Draws seconds, and tokens per second, against regions."""
    left, right = figure.subplots(1, 2)
    for method, rows in by_method.items():
        regions = [row["regions"] for row in rows]
        left.plot(regions, [row["seconds"] for row in rows], marker="o", label=method)
        right.plot(regions, [row["tokens_per_second"] for row in rows], marker="o", label=method)

    for axes, title in ((left, "seconds per image"), (right, "caption tokens per second")):
        axes.set(xlabel="regions", ylabel=title, yscale="log")
        axes.grid(alpha=0.3)
    left.legend(fontsize=8)


def _floor(figure, by_method: dict[str, list[dict]]):
    """Draws measured seconds against the floor, with the line on which both are equal."""
    axes = figure.subplots()
    floors = []
    for method, rows in by_method.items():
        points = [(row["floor_seconds"], row["seconds"]) for row in rows if row["floor_seconds"]]
        if points:
            axes.plot(*zip(*points, strict=True), "o", label=method)
            floors += [floor for floor, _ in points]

    if floors:
        ends = [min(floors), max(floors)]
        axes.plot(ends, ends, "k--", label="the floor")
    axes.set(xlabel="floor, seconds", ylabel="measured, seconds", xscale="log", yscale="log")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
