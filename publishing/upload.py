"""Uploads a checkpoint folder to the Hub: complete, with a card, in one commit.

All large files are uploaded before the one commit that refers to them, so a failure at any point
leaves the branch as it was, and trying again sends only what is not there yet.
"""

import glob
import logging
from collections.abc import Mapping
from pathlib import Path

from huggingface_hub import CommitInfo, HfApi
from transformers.dynamic_module_utils import get_relative_imports

from ..common.fingerprints import files_fingerprint
from ..common.json_text import read_optional_json
from ..common.loading import ADAPTER_FILE, adapter_error
from ..conversion.files import weight_files
from .card import CARD, LICENSE, STALE, write_card, writes_card
from .provenance import PROVENANCE, is_hub_id

logger = logging.getLogger(__name__)

CLASSES = ("AutoConfig", "AutoModel", "AutoProcessor")
MAIN = "main"

# What belongs to a model, beside its weights and modules; nothing else of a folder is sent.
MODEL_FILES = (
    "LICENSE",
    CARD,
    PROVENANCE,
    "added_tokens.json",
    "chat_template.jinja",
    "config.json",
    "generation_config.json",
    "merges.txt",
    "preprocessor_config.json",
    "processor_config.json",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
)
CONVERTER = "convert_checkpoint.py"


def push_folder(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    report: Mapping | None = None,
    base_model: str | list[str] | None = None,
    license: str = LICENSE,
    message: str | None = None,
    token: str | None = None,
) -> CommitInfo:
    """Publishes a checkpoint folder as `repo_id`, making the repository and branch if need be.

    A model card is written into the folder first, unless somebody's own is there.

    Args:
        folder: what `convert_checkpoint.py` or training made.
        repo_id: owner/name.
        private: of a new repository (None: the owner's default).
        revision: branch to publish on (default: main).
        report: the evaluation report for the card, of these very weights.
        base_model, license: see `model_card`.
        message: of the commit.
        token: of the Hub (default: the one of `hf auth login`, or HF_TOKEN).

    Raises ValueError for a folder that would not load by itself or a report of other weights,
    FileNotFoundError where there is no such folder, and huggingface_hub's errors where the Hub
    refuses or cannot be reached.
    """
    folder = Path(folder)
    if not is_hub_id(repo_id):
        raise ValueError(f"expected a repository as owner/name, got {repo_id!r}")

    # what is wrong with the folder is said before the Hub is asked for anything
    check_complete(folder)
    if report is not None:
        expect_report_of(folder, report)

    # the card is one of the files that are sent
    branch = revision or MAIN
    write_card(
        folder,
        repo_id,
        revision=None if branch == MAIN else branch,
        report=report,
        base_model=base_model,
        license=license,
    )

    files = model_files(folder)
    left = sorted(path.name for path in folder.iterdir() if path.name not in files)
    if left:
        logger.warning("not sent, as no part of a model: %s", ", ".join(left))

    # large files go up first, then one commit that refers to them
    api = HfApi(token=token)
    api.create_repo(repo_id, private=private, exist_ok=True)
    if branch != MAIN:
        api.create_branch(repo_id, branch=branch, exist_ok=True)
    return api.upload_folder(
        repo_id=repo_id,
        folder_path=folder,
        revision=branch,
        commit_message=message or f"Upload {repo_id.split('/')[-1]}",
        allow_patterns=[glob.escape(name) for name in files],
        delete_patterns=STALE,
    )


def check_complete(folder: Path):
    """Raises ValueError unless the folder loads by itself: code, weights, processor, license.

    Raises FileNotFoundError where there is none.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"expected a checkpoint's folder, got {folder}, which is none")
    if (folder / ADAPTER_FILE).exists():
        raise adapter_error(folder)
    missing = missing_files(folder)
    if missing:
        raise ValueError(
            f"expected a complete checkpoint in {folder}, found no {', '.join(missing)}: make one"
            " with convert_checkpoint.py"
        )
    if (folder / "LICENSE").stat().st_size == 0:
        raise ValueError(f"expected a license text in {folder / 'LICENSE'}, found it empty")


def expect_report_of(folder: Path, report: Mapping):
    """Refuses a report that is not, or would not get onto the card, of a folder's weights.

    A report's runs name the weights that they measured. One of scores alone names none, which is
    said in a warning.
    """
    if not isinstance(report, Mapping):
        raise ValueError(f"expected a report's JSON object, got a {type(report).__name__}")
    if not writes_card(folder):
        raise ValueError(f"expected no report for a card of one's own, {folder / 'README.md'}")

    # the run that predicted captions, and the one of `evaluate synthetic`
    runs = [report.get(name) or {} for name in ("prediction_run", "measurements")]
    runs = [run for run in runs if run.get("weights")]
    for run in runs:
        own = files_fingerprint(folder, weight_files(folder), run.get("dtype", "float32"))
        if run["weights"] != own:
            name = run.get("checkpoint") or run.get("model")
            raise ValueError(
                f"expected a report of the weights in {folder} ({own}), got one of {name}"
                f" ({run['weights']})"
            )

    if not runs:
        logger.warning("the report does not say which weights it is of: it goes on the card as is")


def missing_files(folder: Path) -> list[str]:
    """Lists what a self-contained checkpoint lacks."""
    auto_map = _auto_map(folder)
    needed = ["config.json", "processor_config.json", "tokenizer.json", "LICENSE"]
    if auto_map:
        needed += [f"auto_map entry for {name}" for name in CLASSES if name not in auto_map]

    # entries that the Auto classes need, and the modules that they are in
    needed += sorted(_modules(folder, _entry_modules(folder)))
    needed += weight_names(folder)
    return [name for name in needed if not (folder / name).is_file()]


def model_files(folder: Path) -> list[str]:
    """Lists the files of a folder that belong to its model.

    Raises ValueError for one that is a link to a place outside the folder, which would publish
    what lies there; the links of the Hub's own cache are taken.
    """
    names = {*MODEL_FILES, *weight_names(folder), *_modules(folder, _entry_modules(folder))}
    if (folder / CONVERTER).is_file():
        names |= _modules(folder, {CONVERTER})
    present = sorted(name for name in names if (folder / name).is_file())
    if (folder / INDEX).is_file():
        present.append(INDEX)

    # a snapshot's files are links to the blobs of its own cache
    home = folder.resolve()
    blobs = home.parents[1] / "blobs" if home.parent.name == "snapshots" else home
    for name in present:
        target = (folder / name).resolve()
        if target.parent not in (home, blobs):
            raise ValueError(f"expected only files of {folder}, got {name}, a link to {target}")
    return present


INDEX = "model.safetensors.index.json"


def weight_names(folder: Path) -> list[str]:
    """Lists the files that hold a folder's weights."""
    index = read_optional_json(folder / INDEX)
    return sorted(set(index.get("weight_map", {}).values())) or ["model.safetensors"]


def _auto_map(folder: Path) -> dict[str, str]:
    """Returns the classes that the Auto classes of transformers are told to load."""
    return {
        **read_optional_json(folder / "processor_config.json").get("auto_map", {}),
        **read_optional_json(folder / "config.json").get("auto_map", {}),
    }


def _entry_modules(folder: Path) -> set[str]:
    """Returns the modules that a folder's Auto classes are in."""
    return {f"{name.split('.')[0]}.py" for name in _auto_map(folder).values()}


def _modules(folder: Path, named: set[str]) -> set[str]:
    """Returns the modules named and all that they import from beside them."""
    found: set[str] = set()
    while new := named - found:
        found |= new
        present = [folder / name for name in new if (folder / name).is_file()]
        named = {f"{name}.py" for file in present for name in get_relative_imports(file)}
    return found
