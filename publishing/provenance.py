"""Records where a checkpoint comes from, in a file beside its weights."""

import os
import shlex
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from ..common.files import write_json
from ..common.json_text import read_optional_json

PROVENANCE = "provenance.json"


@dataclass(frozen=True)
class Provenance:
    """Where a checkpoint comes from.

    Attributes:
        source: Hub id or name of what was converted or trained from.
        revision: its commit on the Hub.
        command: the command that made the folder.
    """

    source: str | None = None
    revision: str | None = None
    command: str | None = None


def read_provenance(folder: Path) -> Provenance:
    """Returns what is recorded in a folder; nothing is known of one without a record."""
    return Provenance(**read_optional_json(folder / PROVENANCE))


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
    write_json(Path(folder) / PROVENANCE, asdict(provenance))


def is_hub_id(name: str | None) -> bool:
    """Tells whether a name has the form owner/name."""
    return name is not None and name.count("/") == 1 and not name.startswith((".", "/", "~"))


def _without_folders(argument: str) -> str:
    """Returns a path's last part, so that a card does not tell how somebody's disk is laid out."""
    if is_hub_id(argument) and not Path(argument).exists():
        return argument
    return Path(argument).name if "/" in argument or "\\" in argument else argument
