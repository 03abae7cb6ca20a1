"""Writes files so that no accident costs one: whole or not at all, by one run at a time.

What stands at a path stays until its successor is complete and on the disk. Only regular files are
replaced; a symbolic link stays one, and its target is replaced; modes are kept, and new files get
those of the umask.
"""

import contextlib
import ctypes
import errno
import glob
import hashlib
import json
import os
import re
import secrets
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from .json_text import encode_json

try:
    import fcntl
except ImportError:  # Windows: nothing keeps two runs apart there
    fcntl = None

NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS)  # from file systems that know none
AT_FDCWD, RENAME_EXCHANGE = -100, 2  # of Linux's renameat2
BLOCK = 1 << 22  # bytes that are hashed at once
UNFINISHED = re.compile(r"\..+\.[0-9a-f]{16}\.tmp")
KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFLNK: "a link that leads nowhere",
}


def file_to_replace(path: str | Path) -> Path:
    """Returns the regular file that writing to `path` would replace or make, links followed.

    Raises ValueError where something else stands, PermissionError for a read-only file.
    """
    target = Path(os.path.realpath(path))
    try:
        found = os.stat(path)
    except FileNotFoundError:
        return target
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        found = os.lstat(path)

    # a link such as /dev/stdout may lead to what has no path of its own
    is_target = target.exists() and os.path.samestat(found, os.stat(target))  # not, say, a pipe's
    if not stat.S_ISREG(found.st_mode) or not is_target:
        kind = KINDS.get(stat.S_IFMT(found.st_mode), "something else")
        raise ValueError(f"expected a regular file or a new name at {path}, got {kind}")
    if not os.access(target, os.W_OK):
        raise PermissionError(f"expected a file that may be written at {path}")
    return target


@contextmanager
def writing(path: str | Path) -> Iterator[BinaryIO]:
    """Gives a file to write that takes the name `path` when it is complete and on the disk.

    It is a temporary file beside it, which is removed if the block raises.
    """
    target = file_to_replace(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{_short(target)}.{secrets.token_hex(8)}.tmp")

    # the file is locked, so that no other run takes it for one that was left unfinished
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
    try:
        with os.fdopen(os.open(temporary, flags, 0o666), "wb") as file:  # the umask has its say
            lock_handle(file.fileno())  # tells that its writer lives
            yield file
            file.flush()
            _keep_owner_and_mode(target, file.fileno())
            os.fsync(file.fileno())
            if fcntl is None:
                file.close()  # Windows renames no open file
            os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)  # gone, if it has been renamed

    sync_folder(target.parent)


def write_bytes(path: str | Path, data: bytes):
    """Writes a whole file or nothing: a temporary file beside it, synced, then renamed."""
    with writing(path) as file:
        file.write(data)


def write_text(path: str | Path, text: str):
    """Writes a text as UTF-8, whole or not at all."""
    write_bytes(path, text.encode("utf-8"))


def write_json(path: str | Path, content):
    """Writes JSON in one piece; floats keep every bit."""
    write_bytes(path, json_bytes(content))


def json_bytes(content) -> bytes:
    """Encodes JSON as `write_json` writes it."""
    return encode_json(json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def file_sha256(path: str | Path) -> str:
    """Returns the SHA-256 of a file's bytes, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()


def sync_folder(folder: Path):
    """Makes a renaming in a folder outlast a power cut, where the file system can."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def replace_folder(new: Path, target: Path, aside: Path):
    """Moves a whole folder to `target`, where an old one is, which goes to another name beside.

    Linux exchanges the two in one step. Elsewhere there is a moment at which nothing is at
    `target`, and the next run has to put `aside` back.
    """
    if _exchange(new, target):
        new.rename(aside)
        return
    target.rename(aside)
    try:
        new.rename(target)
    except OSError:
        aside.rename(target)
        raise


def _exchange(one: Path, other: Path) -> bool:
    """Exchanges two names in one step; False where the system or the file system cannot."""
    if sys.platform != "linux":
        return False
    rename = getattr(ctypes.CDLL(None), "renameat2", None)  # not in every C library
    names = AT_FDCWD, os.fsencode(one), AT_FDCWD, os.fsencode(other)
    return rename is not None and rename(*names, RENAME_EXCHANGE) == 0


class GrowingFile:
    """A result that is saved while it grows, for a run that may end at any moment.

    Where a file stood already when the run began, states are saved beside it, as `NAME.partial`,
    and only `finish` replaces it.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.existed = file_to_replace(path).exists()
        self.partial = self.path.with_name(self.path.name + ".partial")

    def save(self, data: bytes) -> Path:
        """Saves an unfinished state; returns where."""
        path = self.partial if self.existed else self.path
        write_bytes(path, data)
        return path

    def finish(self, data: bytes):
        """Puts the finished result in its place."""
        write_bytes(self.path, data)
        if self.existed:
            self.partial.unlink(missing_ok=True)


# One run at a time.


@contextmanager
def only_run(*outputs: str | Path | None) -> Iterator[None]:
    """Keeps files and folders for this run alone; clears away what a killed one left unfinished.

    Each is guarded by a lock on `.NAME.lock` beside it, which the system releases when the process
    ends, however it ends. Raises ValueError where another run holds one.
    """
    with contextlib.ExitStack() as held:
        # of two names of one output, one lock
        for target in dict.fromkeys(Path(os.path.realpath(o)) for o in outputs if o is not None):
            if not held.enter_context(try_lock(lock_path(target))):
                raise ValueError(f"expected no other run to write {target}, got one under way")
            _remove_unfinished(target)
        yield


def lock_path(target: Path) -> Path:
    """Returns where the lock of an output lies."""
    return target.with_name(f".{_short(target)}.lock")


@contextmanager
def try_lock(path: Path) -> Iterator[bool]:
    """Locks a file of this name, which exists only meanwhile; gives False where another has it."""
    handle = _open_locked(path)
    try:
        yield handle is not None
    finally:
        if handle is not None:
            # removed before it is released, so that nobody else's goes
            path.unlink(missing_ok=True)
            os.close(handle)


def _open_locked(path: Path) -> int | None:
    """Opens and locks a file of this name; None where another has it."""
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except FileNotFoundError:  # the folder went between the two calls
            continue

        try:
            if not lock_handle(handle):
                os.close(handle)
                return None
            if _is_same_file(handle, path):
                return handle
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)  # its holder removed it between the two calls: try anew


@contextmanager
def locked(file) -> Iterator[None]:
    """Holds the lock of an open file, when others have let it go."""
    lock_handle(file.fileno(), wait=True)
    try:
        yield
    finally:
        if fcntl is not None:
            fcntl.flock(file.fileno(), fcntl.LOCK_UN)


def lock_handle(handle: int, wait: bool = False) -> bool:
    """Locks an open file; False where another has it. Where there are no locks all are free."""
    if fcntl is None:
        return True
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError as error:
        if error.errno in NO_LOCKS:
            return True
        if isinstance(error, BlockingIOError):
            return False
        raise
    return True


def _is_same_file(handle: int, path: Path) -> bool:
    with contextlib.suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(handle), os.stat(path))
    return False


def _remove_unfinished(target: Path):
    """Removes what killed writers left of this output, or in it if it is a folder."""
    inside = target.iterdir() if target.is_dir() else ()
    beside = target.parent.glob(f".{glob.escape(_short(target))}.*.tmp")
    for path in [*inside, *beside]:
        if UNFINISHED.fullmatch(path.name):
            with try_lock(path):  # removes it, unless its writer lives
                pass


def _short(path: Path) -> str:
    """Returns the name, or its beginning and a hash, so that there is room for what is added."""
    if len(os.fsencode(path.name)) <= 200:
        return path.name
    return f"{path.name[:32]}-{hashlib.sha256(os.fsencode(path.name)).hexdigest()[:16]}"


def _keep_owner_and_mode(target: Path, handle: int):
    """Gives a new file the owner and the mode of the file that it is to replace."""
    if fcntl is None or not target.exists():
        return
    old = target.stat()
    with contextlib.suppress(PermissionError):
        os.fchown(handle, old.st_uid, old.st_gid)
    os.fchmod(handle, stat.S_IMODE(old.st_mode))
