"""Generates the README of a published checkpoint from the folder that is published."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from huggingface_hub import EvalResult, ModelCardData
from huggingface_hub.utils import tqdm

from ..common.files import file_sha256, only_run, write_text
from ..common.json_text import read_json
from .provenance import Provenance, is_hub_id, read_provenance

GENERATED = "<!-- This card is generated: remove this line to keep your own changes. -->"
TAGS = ("perceptiondlm", "diffusion", "masked-diffusion", "llada", "siglip", "custom_code")
METRICS = (  # (name in a report's summary, name on the card)
    ("average", "Average"),
    ("average_positive", "Positive questions"),
    ("average_negative", "Negative questions"),
)
MEASURED = (  # (name in what `evaluate synthetic` measured, name on the card)
    ("name_accuracy", "Names"),
    ("relation_accuracy", "Relations"),
    ("attribute_accuracy", "Attributes"),
    ("question_accuracy", "Questions about images"),
)
LICENSE = "apache-2.0"  # unless another is named
CARD = "README.md"
STALE = ["*.safetensors", "*.safetensors.index.json"]  # of an earlier upload with other shards
PAPER = "https://arxiv.org/abs/2606.19534"

REGION_SNIPPET = """\
from PIL import Image, ImageDraw
from transformers import AutoModel

model = AutoModel.from_pretrained({source}, trust_remote_code=True, dtype="auto")

image = Image.new("RGB", (320, 240), "white")  # or Image.open("photo.jpg")
draw = ImageDraw.Draw(image)
draw.ellipse((30, 60, 130, 160), fill="red")
draw.rectangle((190, 80, 290, 180), fill="blue")
masks = [{{"box": [30, 60, 131, 161]}}, {{"box": [190, 80, 291, 181]}}]  # or PNG files, arrays, ...

out = model.diffusion_generate(images=image, masks=masks)
for number, caption in enumerate(out.texts[0], 1):
    print(number, caption)"""

QUESTION_SNIPPET = """\
from PIL import Image, ImageDraw
from transformers import AutoModel

model = AutoModel.from_pretrained({source}, trust_remote_code=True, dtype="auto")

image = Image.new("RGB", (320, 240), "white")  # or Image.open("photo.jpg")
ImageDraw.Draw(image).ellipse((110, 70, 210, 170), fill="red")

out = model.diffusion_generate(images=image, prompts="What is in the image?", max_new_tokens=64)
print(out.texts[0][0])"""


def write_card(folder: str | Path, repo_id: str, **options):
    """Writes README.md, unless there is one that was not generated; `options` of `model_card`.

    The provenance is what `provenance.json` in the folder says.
    """
    folder = Path(folder)
    if not writes_card(folder):
        return
    card = model_card(folder, repo_id, **{"provenance": read_provenance(folder), **options})
    with only_run(folder / CARD):
        write_text(folder / CARD, card)


def writes_card(folder: Path) -> bool:
    """Tells whether a folder has no card yet, or a generated one."""
    path = folder / CARD
    return not path.exists() or GENERATED in path.read_text(encoding="utf-8")


def model_card(
    folder: str | Path,
    repo_id: str,
    *,
    revision: str | None = None,
    provenance: Provenance | None = None,
    report: Mapping | None = None,
    base_model: str | list[str] | None = None,
    license: str = LICENSE,
    tags: Sequence[str] = (),
) -> str:
    """Builds the card of the checkpoint in `folder`, as Markdown with a YAML header.

    Args:
        folder: holds `config.json` and the weights, whose checksums the card lists.
        repo_id: where it is published, `revision` the branch when not the main one.
        provenance: its origin; report: what `perceptiondlm evaluate report` (or `score`) wrote.
        base_model: Hub id or ids of what it derives from (default: the provenance's source where
            that is a Hub id).
        license: identifier of the weights' license.
        tags: more of them than its own.
    """
    folder = Path(folder)
    config = read_json(folder / "config.json")
    provenance = provenance or Provenance()
    if base_model is None and is_hub_id(provenance.source):
        base_model = provenance.source
    regions = bool(config["num_region_prompts"])
    name = repo_id.split("/")[-1]
    results = evaluation_results(report) if report else None

    # the header is what the Hub's search and model index read
    header = ModelCardData(
        library_name="transformers",
        pipeline_tag="image-text-to-text",
        base_model=base_model,
        license=license,
        language="en",
        tags=list(dict.fromkeys([*TAGS, *(["region-captioning"] if regions else []), *tags])),
        model_name=name if results else None,
        eval_results=results,
    )

    parts = [
        f"---\n{header.to_yaml()}\n---",
        GENERATED,
        f"# {name}",
        _what_it_is(config, regions),
        _usage(repo_id, revision, regions),
        _evaluation(report),
        _provenance(folder, provenance),
        _limits(config, regions),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _what_it_is(config: Mapping, regions: bool) -> str:
    """Says what the model does, and what it is made of."""
    text, vision = config["text_config"], config["vision_config"]
    does = (
        "It describes several masked regions of an image at once, in one denoising process, and"
        " answers questions about whole images."
        if regions
        else "It answers questions about images."
    )

    rows = [
        f"| language model | {text['num_hidden_layers']} bidirectional layers of width"
        f" {text['hidden_size']} (LLaDA), vocabulary {text['vocab_size']} |",
        f"| vision tower | {vision['num_hidden_layers']} layers of width {vision['hidden_size']}"
        f" (SigLIP), tiles of {vision['image_size']} pixels |",
    ]
    if regions:
        rows.append(
            f"| regions | up to {config['num_region_prompts']} in one sequence (more in several),"
            f" attention layout `{config['region_layout']}` |"
        )

    return (
        f"A multimodal masked-diffusion language model ([PerceptionDLM]({PAPER})). {does}"
        " Text is not written left to right: all positions start masked and are filled over a few"
        " denoising steps.\n\n| part | |\n|---|---|\n" + "\n".join(rows)
    )


def _usage(repo_id: str, revision: str | None, regions: bool) -> str:
    """Shows how to install and run it."""
    source = f'"{repo_id}"' + (f', revision="{revision}"' if revision else "")
    snippet = (REGION_SNIPPET if regions else QUESTION_SNIPPET).format(source=source)
    return (
        '## Use\n\n```bash\npip install torch "transformers>=5.18" pillow\n```\n\n'
        f"```python\n{snippet}\n```\n\n"
        "The modeling code is in this repository, which is why `trust_remote_code=True` is needed;"
        " pass `revision` with a commit to pin what is run. `AutoProcessor.from_pretrained` loads"
        " the processor alone."
    )


def evaluation_results(report: Mapping) -> list[EvalResult]:
    """Returns a report's averages, and its tokens per forward pass, for the Hub's model index.

    A report without scores of a benchmark has what was measured on synthetic scenes in their place.
    """
    if "summary" not in report:
        raise ValueError(f"expected a report with a summary, got one with {sorted(report)[:8]}")
    found, metrics = report["summary"], METRICS
    if found is None:
        found, metrics = report.get("measurements"), MEASURED
    if not isinstance(found, Mapping):
        raise ValueError("expected a report with a summary or measurements, got one with neither")
    dataset, name = _dataset(report)
    common = {
        "task_type": "image-text-to-text",
        "task_name": "Region captioning",
        "dataset_type": dataset,
        "dataset_name": name,
    }

    values = [
        (key, title, round(100 * found[key], 2), "accuracy")
        for key, title in metrics
        if found.get(key) is not None
    ]

    # the model's speed, where the predicting run measured it
    throughput = (report.get("prediction_run") or {}).get("throughput") or {}
    if "nominal_tpf" in throughput:
        title, value = "Tokens per forward, padding counted", round(throughput["nominal_tpf"], 3)
        values.append(("nominal_tpf", title, value, "tokens_per_forward"))
    return [
        EvalResult(**common, metric_type=kind, metric_name=title, metric_value=value)
        for _, title, value, kind in values
    ]


def _dataset(report: Mapping) -> tuple[str, str]:
    """Returns Hub id, or a plain word, and name of the benchmark."""
    if report["summary"] is None:
        return "synthetic", f"{report['measurements']['scenes']} synthetic scenes"
    scoring = report.get("scoring") or report.get("provenance") or {}
    place = str(scoring.get("annotations") or "region-captioning").rstrip("/")
    name = place.split("/")[-1]
    return (place if is_hub_id(place) else name.lower()), name


def _evaluation(report: Mapping | None) -> str:
    """Shows a report's scores; nothing without a report."""
    if not report:
        return ""
    _, name = _dataset(report)
    rows = "\n".join(f"| {r.metric_name} | {r.metric_value} |" for r in evaluation_results(report))
    unit = "shares in per cent" if report["summary"] is None else "questions in per cent"
    judge = (report.get("judge_run") or {}).get("judge")
    model = judge.get("model") if isinstance(judge, Mapping) else judge
    by = f" Judged by {model}." if model else ""
    return f"## Evaluation\n\n{name}, {unit}.{by}\n\n| | |\n|---|---|\n{rows}"


def _provenance(folder: Path, provenance: Provenance) -> str:
    """Says what it was made from, and lists the checksums."""
    lines = []
    if provenance.source:
        revision = f" at revision `{provenance.revision}`" if provenance.revision else ""
        lines.append(f"Made from `{provenance.source}`{revision}.")
    if provenance.command:
        lines.append(f"```bash\n{provenance.command}\n```")
    rows = [f"| `{name}` | `{digest}` |" for name, digest in checksums(folder).items()]
    lines.append("| weights | SHA-256 |\n|---|---|\n" + "\n".join(rows))
    return "## Provenance\n\n" + "\n\n".join(lines)


def checksums(folder: Path) -> dict[str, str]:
    """Returns the SHA-256 of each weight file."""
    files = sorted(folder.glob("*.safetensors"))
    return {f.name: file_sha256(f) for f in tqdm(files, desc="Checksums", disable=len(files) < 2)}


def _limits(config: Mapping, regions: bool) -> str:
    """Says what it cannot do."""
    limits = [
        "Captions and answers can be wrong, and say so with the same confidence as when right; do"
        " not use them where a mistake harms somebody.",
        "It has the biases of the images and texts that it and its parts were trained on.",
        "A caption has a fixed number of positions (`caption_length`, 32 by default): what does not"
        " fit is not said.",
    ]

    if regions:
        limits.append(
            "It describes regions that it is given and finds none by itself; a careless region mask"
            " gives a careless caption."
        )
    if regions and config["region_layout"] == "released":
        limits.append(
            "In this attention layout a caption may depend on the regions that are captioned beside"
            " it, and the prompt is computed anew at every step."
        )
    return "## Limits\n\n" + "\n".join(f"- {line}" for line in limits)
