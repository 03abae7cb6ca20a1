"""Publishing a checkpoint folder on the Hub: complete, with a card, in one commit.

All large files are uploaded before the one commit that refers to them, so a failure at any point
leaves the branch as it was, and trying again sends only what is not there yet.
"""

import argparse
import glob
import json
import logging
import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from huggingface_hub import CommitInfo, HfApi
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import httpx
from transformers.dynamic_module_utils import get_relative_imports

from ..common.json_text import read_json as read_report
from ..conversion.files import ADAPTER_FILE, adapter_error
from ..evaluation.checkpoint import folder_fingerprint
from .card import (
    CARD,
    LICENCE,
    PROVENANCE,
    STALE,
    Provenance,
    is_hub_id,
    read_json,
    write_card,
    writes_card,
)

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
    licence: str = LICENCE,
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
        base_model, licence: see `model_card`.
        message: of the commit.
        token: of the Hub (default: the one of `hf auth login`, or HF_TOKEN).

    Raises ValueError for a folder that would not load by itself or a report of other weights,
    FileNotFoundError where there is no such folder, and huggingface_hub's errors where the Hub
    refuses or cannot be reached.
    """
    folder = Path(folder)
    if not is_hub_id(repo_id):
        raise ValueError(f"expected a repository as owner/name, got {repo_id!r}")
    check_complete(folder)
    if report is not None:
        expect_report_of(folder, report)
    branch = revision or MAIN
    write_card(
        folder,
        repo_id,
        revision=None if branch == MAIN else branch,
        report=report,
        base_model=base_model,
        licence=licence,
    )
    files = model_files(folder)
    left = sorted(path.name for path in folder.iterdir() if path.name not in files)
    if left:
        logger.warning("not sent, as no part of a model: %s", ", ".join(left))
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
    """Raises ValueError unless the folder loads by itself: code, weights, processor, license;
    FileNotFoundError where there is none."""
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
        raise ValueError(f"expected a licence text in {folder / 'LICENSE'}, found it empty")


def expect_report_of(folder: Path, report: Mapping):
    """Refuses a report that is not, or would not get onto the card, of a folder's weights.

    A report's runs name the weights that they measured. One of scores alone names none, which is
    said in a warning.
    """
    if not isinstance(report, Mapping):
        raise ValueError(f"expected a report's JSON object, got a {type(report).__name__}")
    if not writes_card(folder):
        raise ValueError(f"expected no report for a card of one's own, {folder / 'README.md'}")
    runs = [report.get(name) or {} for name in ("prediction_run", "measurements")]
    runs = [run for run in runs if run.get("weights")]
    for run in runs:
        own = folder_fingerprint(folder, run.get("dtype", "float32"))
        if run["weights"] != own:
            name = run.get("checkpoint") or run.get("model")
            raise ValueError(
                f"expected a report of the weights in {folder} ({own}), got one of {name}"
                f" ({run['weights']})"
            )
    if not runs:
        logger.warning("the report does not say which weights it is of: it goes on the card as is")


def missing_files(folder: Path) -> list[str]:
    """Names of what a self-contained checkpoint lacks."""
    auto_map = _auto_map(folder)
    needed = ["config.json", "processor_config.json", "tokenizer.json", "LICENSE"]
    if auto_map:
        needed += [f"auto_map entry for {name}" for name in CLASSES if name not in auto_map]
    needed += sorted(_modules(folder, _entry_modules(folder)))
    needed += weight_names(folder)
    return [name for name in needed if not (folder / name).is_file()]


def model_files(folder: Path) -> list[str]:
    """Names of the files of a folder that belong to its model.

    Raises ValueError for one that is a link to a place outside the folder, which would publish
    what lies there; the links of the Hub's own cache are taken.
    """
    names = {*MODEL_FILES, *weight_names(folder), *_modules(folder, _entry_modules(folder))}
    if (folder / CONVERTER).is_file():
        names |= _modules(folder, {CONVERTER})
    present = sorted(name for name in names if (folder / name).is_file())
    if (folder / INDEX).is_file():
        present.append(INDEX)

    home = folder.resolve()
    blobs = home.parents[1] / "blobs" if home.parent.name == "snapshots" else home
    for name in present:
        target = (folder / name).resolve()
        if target.parent not in (home, blobs):
            raise ValueError(f"expected only files of {folder}, got {name}, a link to {target}")
    return present


INDEX = "model.safetensors.index.json"


def weight_names(folder: Path) -> list[str]:
    """Names of the files that hold a folder's weights."""
    index = read_json(folder / INDEX)
    return sorted(set(index.get("weight_map", {}).values())) or ["model.safetensors"]


def _auto_map(folder: Path) -> dict[str, str]:
    return {
        **read_json(folder / "processor_config.json").get("auto_map", {}),
        **read_json(folder / "config.json").get("auto_map", {}),
    }


def _entry_modules(folder: Path) -> set[str]:
    """Names of the modules that a folder's auto classes are in."""
    return {f"{name.split('.')[0]}.py" for name in _auto_map(folder).values()}


def _modules(folder: Path, named: set[str]) -> set[str]:
    """The modules named and all that they import from beside them."""
    found: set[str] = set()
    while new := named - found:
        found |= new
        present = [folder / name for name in new if (folder / name).is_file()]
        named = {f"{name}.py" for file in present for name in get_relative_imports(file)}
    return found


def write_provenance(
    folder: str | Path, source: str | Path, source_folder: Path, argv: Sequence[str]
):
    """Records beside the weights what a checkpoint was made from, and how.

    Args:
        folder: the checkpoint.
        source: Hub id or folder, as the user named it; of a folder only its name is recorded.
        source_folder: where its files lie; for a Hub id, the snapshot in the Hub's cache.
        argv: the command and its arguments.
    """
    is_snapshot = source_folder.resolve().parent.name == "snapshots"
    is_local = Path(source).exists()
    provenance = Provenance(
        source=Path(os.path.abspath(source)).name if is_local else str(source),
        revision=source_folder.resolve().name if is_snapshot else None,
        command=shlex.join(_without_folders(argument) for argument in argv),
    )
    content = json.dumps(provenance.to_dict(), indent=1) + "\n"
    (Path(folder) / PROVENANCE).write_text(content, encoding="utf-8")


def _without_folders(argument: str) -> str:
    """A path's last part: where things lay on somebody's disk is nobody's business."""
    if is_hub_id(argument) and not Path(argument).exists():
        return argument
    return Path(argument).name if "/" in argument or "\\" in argument else argument


# The command.


def hub_id(text: str) -> str:
    """An argument of the form owner/name."""
    if not is_hub_id(text):
        raise argparse.ArgumentTypeError(f"expected owner/name, got {text!r}")
    return text


def add_push_options(parser):
    """Options of publishing after a conversion; `parser` may be a group."""
    parser.add_argument(
        "--push-to-hub", type=hub_id, metavar="OWNER/NAME", help="publish the output on the Hub"
    )
    _add_card_options(parser)


def _add_card_options(parser):
    parser.add_argument("--private", action="store_true", default=None, help="make it private")
    parser.add_argument("--revision", help="branch to publish on (default: main)")
    parser.add_argument(
        "--report", type=Path, help="report.json of `perceptiondlm evaluate report`, for the card"
    )
    parser.add_argument("--base-model", action="append", help="Hub id it derives from; repeatable")
    parser.add_argument("--licence", default=LICENCE, help="default: %(default)s")


def configure(parser: argparse.ArgumentParser):
    """Adds the arguments to the `publish` parser."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.description = (
        "Publishes a converted or trained checkpoint on the Hub, with a generated model card, in"
        "\none commit. Log in first with `hf auth login`, or set HF_TOKEN. If it fails, run it"
        "\nagain: what is uploaded already is not sent twice."
    )
    parser.epilog = "exit codes: 0 published, 1 the Hub refused or was out of reach, 2 usage"
    parser.add_argument("folder", type=Path, help="checkpoint folder")
    parser.add_argument("repo_id", type=hub_id, metavar="owner/name", help="repository on the Hub")
    _add_card_options(parser)


def run(args: argparse.Namespace) -> int:
    """Publishes; prints the commit's address."""
    return push_from(args, args.folder, args.repo_id)


def push_from(args: argparse.Namespace, folder: Path, repo_id: str) -> int:
    """Publishes as the options of `add_push_options` say; returns an exit code."""
    try:
        report = None if args.report is None else read_report(args.report)
        commit = push_folder(
            folder,
            repo_id,
            private=args.private,
            revision=args.revision,
            report=report,
            base_model=args.base_model,
            licence=args.licence,
        )
    except HfHubHTTPError as error:  # an OSError too, but not the user's mistake
        return _fail(1, error, publish_command(args, folder, repo_id))
    except (ValueError, FileNotFoundError) as error:
        return _fail(2, error)
    except (OSError, RuntimeError, httpx.HTTPError) as error:  # the last: out of reach
        return _fail(1, error, publish_command(args, folder, repo_id))
    print(commit.commit_url)
    return 0


def publish_command(args: argparse.Namespace, folder: Path, repo_id: str) -> str:
    """The command that publishes `folder` with the same options."""
    words = ["perceptiondlm", "publish", str(folder), repo_id]
    if args.private:
        words.append("--private")
    for option, default in (("revision", None), ("report", None), ("licence", LICENCE)):
        if getattr(args, option) != default:
            words += [f"--{option}", str(getattr(args, option))]
    for name in args.base_model or ():
        words += ["--base-model", name]
    return shlex.join(words)


def _fail(code: int, error: Exception, retry: str | None = None) -> int:
    cause = f" ({error.__cause__})" if error.__cause__ else ""
    print(f"error: {error}{cause}", file=sys.stderr)
    if retry is not None:
        print(f"to go on: {retry}", file=sys.stderr)
    return code
