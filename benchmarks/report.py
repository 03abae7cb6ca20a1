"""A benchmark's result as a Markdown table and as two plots."""

from pathlib import Path

from ..common.extras import extra
from ..common.files import write_text

START, END = "<!-- benchmark table: start -->", "<!-- benchmark table: end -->"


def table(result: dict) -> str:
    """Markdown, one row a method, number of regions and number of images."""
    machine = result["machine"]
    device = machine.get("gpu") or f"{machine['cpu']}, {machine['threads']} threads"

    def rate(name: str) -> str:
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
    """Replaces what stands between the markers of a README by the table."""
    text = path.read_text()
    if START not in text or END not in text:
        raise ValueError(f"expected the markers {START} and {END} in {path}")
    before, rest = text.split(START)
    write_text(path, f"{before}{START}\n{table(result)}\n{END}{rest.split(END)[1]}")


def draw(result: dict, folder: Path):
    """`latency.png`: seconds and tokens a second against regions; `floor.png`: time against the
    least that the machine's matmul rate and bandwidth allow."""
    with extra("eval"):
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt

    folder.mkdir(parents=True, exist_ok=True)
    rows = [row for row in result["rows"] if row["images"] == 1]
    methods = list(dict.fromkeys(row["method"] for row in rows))
    figure, axes = plt.subplots(1, 2, figsize=(10, 4))
    for method in methods:
        own = [row for row in rows if row["method"] == method]
        regions = [row["regions"] for row in own]
        axes[0].plot(regions, [row["seconds"] for row in own], marker="o", label=method)
        axes[1].plot(regions, [row["tokens_per_second"] for row in own], marker="o", label=method)
    for axis, label in zip(axes, ("seconds an image", "caption tokens a second"), strict=True):
        axis.set(xlabel="regions", ylabel=label, yscale="log")
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(folder / f"latency-{result['preset']}.png", dpi=120)

    figure, axis = plt.subplots(figsize=(6, 4))
    for method in methods:
        own = [row for row in rows if row["method"] == method and row["floor_seconds"]]
        if own:
            floors = [row["floor_seconds"] for row in own]
            axis.plot(floors, [row["seconds"] for row in own], "o", label=method)
    least = [row["floor_seconds"] for row in rows if row["floor_seconds"]]
    if least:
        axis.plot([min(least), max(least)], [min(least), max(least)], "k--", label="the floor")
    axis.set(xlabel="floor, seconds", ylabel="measured, seconds", xscale="log", yscale="log")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(folder / f"floor-{result['preset']}.png", dpi=120)
    plt.close("all")
