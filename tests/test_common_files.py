"""Files that no accident costs: writing, links, modes, locks, and what a kill leaves."""

import json
import os
import signal
import socket
import stat
import sys
import threading
from pathlib import Path

import pytest
from perceptiondlm.common import files
from perceptiondlm.common.files import GrowingFile, only_run, try_lock, write_bytes, write_json
from perceptiondlm.common.folders import OutputExists, clear_unfinished, new_folder
from perceptiondlm.evaluation.files import Journal, read_journal


def names(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def kill_in(work, *arguments):
    """Runs something in a child that it kills, as the system would."""
    child = os.fork()
    if child == 0:
        try:
            work(*arguments)
        finally:
            os._exit(1)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL


def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)


def mode(path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.fixture
def umask():
    old = os.umask(0o027)
    yield 0o027
    os.umask(old)


# One file.


def test_a_new_file_has_the_mode_of_the_umask_and_an_old_one_keeps_its_own(tmp_path, umask):
    write_bytes(tmp_path / "new", b"1")
    assert mode(tmp_path / "new") == 0o640
    for bits in (0o600, 0o664, 0o755):
        (tmp_path / "new").chmod(bits)
        write_bytes(tmp_path / "new", b"2")
        assert mode(tmp_path / "new") == bits


@pytest.mark.parametrize("there", [True, False])
def test_a_link_stays_a_link_and_its_target_is_written(tmp_path, there):
    (tmp_path / "real").mkdir()
    target, link = tmp_path / "real" / "a.json", tmp_path / "link.json"
    if there:
        target.write_text("old")
    link.symlink_to("real/a.json")
    write_json(link, {"a": 1})
    assert link.is_symlink() and json.loads(target.read_text()) == {"a": 1}
    assert names(tmp_path / "real") == ["a.json"]


def make_socket(path):
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))


@pytest.mark.parametrize(
    ("make", "what"),
    [
        (os.mkdir, "a folder"),
        (os.mkfifo, "a pipe"),
        (make_socket, "a socket"),
        (lambda path: path.symlink_to("/dev/null"), "a device"),
        (lambda path: path.symlink_to(path.name), "a link that leads nowhere"),
    ],
)
def test_only_regular_files_are_replaced(tmp_path, monkeypatch, make, what):
    monkeypatch.chdir(tmp_path)  # a socket's name has to be short
    path = tmp_path / "x"
    make(path)
    before = os.lstat(path)
    with pytest.raises(ValueError, match=f"expected a regular file or a new name at .*got {what}"):
        write_bytes(path, b"new")
    assert os.path.samestat(before, os.lstat(path)) and names(tmp_path) == ["x"]


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_kill_while_writing_leaves_the_old_file_and_the_next_run_clears_up(
    tmp_path, monkeypatch, step
):
    path = tmp_path / "a.json"
    write_bytes(path, b"old")
    with monkeypatch.context() as patched:
        patched.setattr(os, step, die)
        kill_in(write_bytes, path, b"new")
    assert path.read_bytes() == b"old"
    assert len(names(tmp_path)) == 2
    with only_run(path):
        assert "a.json" in names(tmp_path) and not list(tmp_path.glob("*.tmp"))
    assert names(tmp_path) == ["a.json"]


def test_clearing_up_leaves_what_others_write_and_own(tmp_path, monkeypatch):
    folder = tmp_path / "drawn"
    (tmp_path / ".drawn.notes.tmp").write_text("mine")

    def look(*_):  # in the middle of a write
        with only_run(folder):
            assert len(list(folder.glob(".*.tmp"))) == 1

    replace = os.replace
    monkeypatch.setattr(os, "replace", lambda *given: (look(), replace(*given)))
    write_bytes(folder / "a.png", b"pixels")
    assert names(folder) == ["a.png"]
    assert names(tmp_path) == [".drawn.notes.tmp", "drawn"]


def test_data_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    events = []
    fsync, replace = os.fsync, os.replace

    def note_sync(handle):
        events.append("folder" if stat.S_ISDIR(os.fstat(handle).st_mode) else "file")
        fsync(handle)

    monkeypatch.setattr(os, "fsync", note_sync)
    monkeypatch.setattr(os, "replace", lambda *given: (events.append("rename"), replace(*given)))
    write_bytes(tmp_path / "a", b"1")
    assert events == ["file", "rename", "folder"]


@pytest.mark.parametrize("name", ["a" * 250 + ".json", "ü" * 120, "\udcff" * 240])
def test_names_as_long_as_a_file_system_takes_are_written(tmp_path, name):
    with only_run(tmp_path / name):
        write_bytes(tmp_path / name, b"1")
    assert names(tmp_path) == [name]


# A result that grows.


def test_a_growing_result_replaces_the_old_one_only_when_it_is_finished(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"old")
    growing = GrowingFile(path)
    assert growing.save(b"part") == tmp_path / "a.jsonl.partial"
    assert path.read_bytes() == b"old"
    growing.finish(b"whole")
    assert names(tmp_path) == ["a.jsonl"] and path.read_bytes() == b"whole"


def test_a_growing_result_is_at_its_place_where_nothing_was(tmp_path):
    growing = GrowingFile(tmp_path / "a.jsonl")
    assert growing.save(b"part") == tmp_path / "a.jsonl"
    growing.save(b"more")
    assert (tmp_path / "a.jsonl").read_bytes() == b"more"


# One run at a time.


def test_a_second_run_is_refused_and_the_lock_goes_with_the_first(tmp_path):
    path = tmp_path / "new" / "a.json"
    with only_run(path, None, tmp_path / "b"):
        with pytest.raises(ValueError, match="expected no other run to write .*a.json"):
            with only_run(path):
                pass
    assert names(tmp_path / "new") == []
    with only_run(path):
        pass


def test_a_link_and_its_target_are_one_output(tmp_path):
    (tmp_path / "link").symlink_to("real")
    with only_run(tmp_path / "real"), pytest.raises(ValueError, match="no other run"):
        with only_run(tmp_path / "link"):
            pass


def test_death_releases_a_lock(tmp_path):
    def hold():
        with only_run(tmp_path / "a"):
            die()

    kill_in(hold)
    assert names(tmp_path) == [".a.lock"]
    with only_run(tmp_path / "a"):
        pass
    assert names(tmp_path) == []


def test_many_threads_never_hold_one_lock_together(tmp_path):
    holders, most, done = [], [], []

    def work():
        while len(done) < 200:
            with try_lock(tmp_path / "lock") as mine:
                if mine:
                    holders.append(1)
                    most.append(len(holders))
                    holders.pop()
                    done.append(1)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(most) == {1} and names(tmp_path) == []


def test_without_locks_in_the_file_system_work_goes_on(tmp_path, monkeypatch):
    def unsupported(*_):
        raise OSError(files.errno.ENOLCK, "No locks available")

    monkeypatch.setattr(files.fcntl, "flock", unsupported)
    with only_run(tmp_path / "a"):
        write_bytes(tmp_path / "a", b"1")
    assert names(tmp_path) == ["a"]


# Journals of several processes.


def test_two_journals_of_one_file_keep_every_record_and_see_each_others(tmp_path):
    path = tmp_path / "j.jsonl"
    with Journal(path) as one, Journal(path) as two:
        for k in range(5):
            one.append({"one": k})
            two.append({"two": k})
        one.refresh()
        assert one.records == two.records
    expected = [{name: k} for k in range(5) for name in ("one", "two")]
    assert read_journal(path) == expected


def test_a_line_that_another_died_in_is_cut_off_before_the_next(tmp_path):
    path = tmp_path / "j.jsonl"
    with Journal(path) as journal:
        journal.append({"a": 1})
        with open(path, "ab") as other:
            other.write(b'{"torn": ')
        journal.append({"b": 2})
    assert read_journal(path) == [{"a": 1}, {"b": 2}]


def test_a_claim_is_free_again_after_its_holders_death(tmp_path):
    def hold():
        with Journal(tmp_path / "j.jsonl").claim("key"):
            die()

    kill_in(hold)
    with Journal(tmp_path / "j.jsonl") as journal:
        with journal.claim("key") as mine, journal.claim("other"):
            assert mine
            with journal.claim("key") as again:
                assert not again
    assert names(tmp_path) == ["j.jsonl"]


# Folders that a conversion makes.


def make(output, content: str, end=None):
    with new_folder(output, force=True) as folder:
        (folder / "weights").write_text(content)
        if end is not None:
            end()


def test_a_killed_conversion_leaves_nothing_after_the_next(tmp_path):
    make(tmp_path / "out", "old")
    kill_in(make, tmp_path / "out", "new", die)
    assert len(names(tmp_path)) == 2 and (tmp_path / "out" / "weights").read_text() == "old"
    make(tmp_path / "out", "newer")
    assert names(tmp_path) == ["out"] and (tmp_path / "out" / "weights").read_text() == "newer"


def test_a_conversion_killed_between_two_renamings_gives_the_old_folder_back(tmp_path, monkeypatch):
    make(tmp_path / "out", "old")
    rename = Path.rename

    def once(self, target):
        rename(self, target)
        die()

    with monkeypatch.context() as patched:
        patched.setattr(files, "_exchange", lambda *_: False)  # as on other systems than Linux
        patched.setattr(Path, "rename", once)
        kill_in(make, tmp_path / "out", "new")
    assert not (tmp_path / "out").exists()
    clear_unfinished(tmp_path / "out")
    assert names(tmp_path) == ["out"] and (tmp_path / "out" / "weights").read_text() == "old"


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux exchanges two names in one step")
def test_a_folder_is_replaced_with_no_moment_without_one(tmp_path, monkeypatch):
    make(tmp_path / "out", "old")
    with monkeypatch.context() as patched:
        patched.setattr(Path, "rename", die)  # right after the new folder is in its place
        kill_in(make, tmp_path / "out", "new")
    assert (tmp_path / "out" / "weights").read_text() == "new"
    clear_unfinished(tmp_path / "out")
    assert names(tmp_path) == ["out"]


def test_a_second_conversion_to_one_folder_is_refused(tmp_path):
    def second():
        with pytest.raises(OutputExists, match="no other run that makes .*out"):
            make(tmp_path / "out", "second")

    make(tmp_path / "out", "first", second)
    assert names(tmp_path) == ["out"] and (tmp_path / "out" / "weights").read_text() == "first"


def test_a_linked_folder_is_replaced_where_it_lies_with_its_mode(tmp_path):
    (tmp_path / "disk").mkdir()
    make(tmp_path / "disk" / "real", "old")
    (tmp_path / "disk" / "real").chmod(0o750)
    (tmp_path / "out").symlink_to("disk/real")
    make(tmp_path / "out", "new")
    assert (tmp_path / "out").is_symlink() and names(tmp_path / "disk") == ["real"]
    assert (tmp_path / "disk" / "real" / "weights").read_text() == "new"
    assert mode(tmp_path / "disk" / "real") == 0o750


def test_the_files_of_a_folder_are_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    synced, fsync = [], os.fsync

    def note(handle):
        synced.append((tmp_path / "out").exists())
        fsync(handle)

    monkeypatch.setattr(os, "fsync", note)
    make(tmp_path / "out", "content")
    assert synced == [False, False, True]  # the file, its folder, then the folder around it


@pytest.mark.parametrize("make_it", [os.mkfifo, lambda path: path.write_text("mine")])
def test_a_conversion_replaces_nothing_but_folders(tmp_path, make_it, converted):
    from perceptiondlm.convert_checkpoint import convert

    make_it(tmp_path / "out")
    with pytest.raises(FileExistsError, match="expected a folder or a new name"):
        convert(converted("released-region"), tmp_path / "out", force=True)
    assert names(tmp_path) == ["out"]
