"""A model appears complete or not at all, whatever happens while it is written."""

import errno
import hashlib
import multiprocessing
import os
import pathlib
import signal
import tempfile
import time

import pytest

from exporters import layout
from exporters.errors import UserError


def write(out, name="m", content="new", force=False):
    with layout.staged(out, name, force) as folder:
        (folder / "1").mkdir()
        (folder / "1" / "model.py").write_text(content)
        layout.write_manifest(folder, {"model": name})


def leftovers(out):
    return [path.name for path in out.iterdir() if path.name.startswith(".")]


def test_writes_and_hashes(tmp_path):
    write(tmp_path)
    manifest = layout.read_manifest(tmp_path / "m")
    digest = hashlib.sha256(b"new").hexdigest()
    assert manifest["files"] == {"1/model.py": {"sha256": digest, "size_bytes": 3}}
    assert manifest["model"] == "m" and manifest["created_utc"].endswith("+00:00")
    assert leftovers(tmp_path) == []
    assert (tmp_path / "m" / "1" / "model.py").stat().st_mode & 0o777 == 0o644


def test_an_exception_leaves_nothing(tmp_path):
    with pytest.raises(RuntimeError), layout.staged(tmp_path, "m") as folder:
        (folder / "config.pbtxt").write_text("x")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def test_refuses_an_existing_target(tmp_path):
    write(tmp_path, content="old")
    with pytest.raises(UserError, match=r"m exists; pass --force"):
        write(tmp_path)
    assert (tmp_path / "m/1/model.py").read_text() == "old"


def test_force_replaces(tmp_path):
    write(tmp_path, content="old")
    write(tmp_path, force=True)
    assert (tmp_path / "m/1/model.py").read_text() == "new"
    assert leftovers(tmp_path) == []


def test_force_replaces_without_exchange(tmp_path, monkeypatch):
    write(tmp_path, content="old")
    monkeypatch.setattr(layout, "_exchange", lambda first, second: False)
    write(tmp_path, force=True)
    assert (tmp_path / "m/1/model.py").read_text() == "new"


def test_a_failed_replacement_keeps_the_old_one(tmp_path):
    write(tmp_path, content="old")
    with pytest.raises(RuntimeError), layout.staged(tmp_path, "m", force=True):
        raise RuntimeError
    assert (tmp_path / "m/1/model.py").read_text() == "old"


@pytest.mark.parametrize("content", [{}, {"thesis.txt": "x"}, {"manifest.json": "{}"}, {"manifest.json": "[1"}])
def test_force_replaces_no_folder_of_others(tmp_path, content):
    (tmp_path / "m").mkdir()
    for name, text in content.items():
        (tmp_path / "m" / name).write_text(text)
    if not content:
        write(tmp_path, force=True)
        assert (tmp_path / "m/1/model.py").read_text() == "new"
        return
    said = r"m was not written by an export .*--force does not replace it"
    with pytest.raises(UserError, match=said), layout.staged(tmp_path, "m", force=True):
        pytest.fail("it was found out after the work")
    assert {path.name: path.read_text() for path in (tmp_path / "m").iterdir()} == content


def test_what_appears_in_the_meantime_is_not_replaced_either(tmp_path):
    with pytest.raises(UserError, match="not written by an export"), layout.staged(tmp_path, "m", force=True):
        (tmp_path / "m").mkdir()
        (tmp_path / "m/thesis.txt").write_text("x")
    assert (tmp_path / "m/thesis.txt").read_text() == "x"


def test_the_old_one_is_put_back_where_the_new_one_cannot_be_renamed(tmp_path, monkeypatch):
    write(tmp_path, content="old")
    monkeypatch.setattr(layout, "_exchange", lambda first, second: False)
    rename = pathlib.Path.rename

    def refuse(self, target):
        if target == tmp_path / "m" and self.name == "m":
            raise OSError(errno.EIO, "input/output error")
        return rename(self, target)

    monkeypatch.setattr(pathlib.Path, "rename", refuse)
    with pytest.raises(OSError, match="input/output"):
        write(tmp_path, force=True)
    assert (tmp_path / "m/1/model.py").read_text() == "old"


def ended_halfway(out, number):
    with layout.staged(out, "m") as folder:
        (folder / "config.pbtxt").write_text("half")
        os.kill(os.getpid(), number)
        time.sleep(5)


def end_halfway(out, number):
    """The exit code of an export that gets the signal `number`."""
    process = multiprocessing.get_context("fork").Process(target=ended_halfway, args=(out, number))
    process.start()
    process.join()
    return process.exitcode


@pytest.fixture(params=["beside", "inside"])
def out(request, tmp_path, monkeypatch):
    """A repository whose exports are staged beside it or, where that is another disk, inside it."""
    if request.param == "inside":
        rename = pathlib.Path.rename

        def other_disk(self, target):
            if self.parent.parent == tmp_path and self.name == "probe":
                raise OSError(errno.EXDEV, "another disk")
            return rename(self, target)

        monkeypatch.setattr(pathlib.Path, "rename", other_disk)
    (tmp_path / "repository").mkdir()
    return tmp_path / "repository"


def test_a_kill_leaves_nothing_to_load_and_is_swept(out):
    end_halfway(out, signal.SIGKILL)
    assert not (out / "m").exists()
    assert len(leftovers(out) + leftovers(out.parent)) == 1
    assert not list(out.glob("*/config.pbtxt"))  # not where Triton looks
    write(out)
    assert leftovers(out) == leftovers(out.parent) == []


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129), (signal.SIGINT, 1)])
def test_an_ordered_end_leaves_nothing(out, number, code):
    assert end_halfway(out, number) == code
    assert list(out.iterdir()) == [] and leftovers(out.parent) == []


def test_a_triton_that_polls_sees_no_staging(tmp_path):
    with layout.staged(tmp_path / "repository", "m"):
        assert list((tmp_path / "repository").iterdir()) == []


def test_a_parent_that_cannot_be_written(tmp_path, monkeypatch):
    make = tempfile.mkdtemp

    def refuse(prefix, dir):
        if dir == tmp_path:
            raise PermissionError(errno.EACCES, "denied")
        return make(prefix=prefix, dir=dir)

    monkeypatch.setattr(layout.tempfile, "mkdtemp", refuse)
    write(tmp_path / "repository")
    assert [path.name for path in (tmp_path / "repository").iterdir()] == ["m"]


def test_handlers_of_others_are_left_alone(tmp_path):
    previous = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        with layout.staged(tmp_path, "m"):
            assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN
            assert signal.getsignal(signal.SIGHUP) is not signal.SIG_DFL
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_DFL
    finally:
        signal.signal(signal.SIGTERM, previous)


def test_only_the_staging_of_the_dead_is_swept(tmp_path):
    (tmp_path / f"{layout.STAGING_PREFIX}dead").mkdir()
    with layout.staged(tmp_path / "a", "m") as living:
        assert not (tmp_path / f"{layout.STAGING_PREFIX}dead").exists()
        write(tmp_path / "b")
        assert living.is_dir()


def write_many(out, content, results):
    for _ in range(20):
        write(out, content=content, force=True)
    results.put(content)


def test_concurrent_exports_do_not_mix(tmp_path):
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    processes = [context.Process(target=write_many, args=(tmp_path, text, results)) for text in ("a", "b")]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert {results.get(timeout=5), results.get(timeout=5)} == {"a", "b"}
    content = (tmp_path / "m/1/model.py").read_text()
    expected = hashlib.sha256(content.encode()).hexdigest()
    assert layout.read_manifest(tmp_path / "m")["files"]["1/model.py"]["sha256"] == expected
    assert leftovers(tmp_path) == []


def test_the_second_of_two_without_force_is_refused(tmp_path):
    with pytest.raises(UserError, match="exists"), layout.staged(tmp_path, "m") as folder:
        (folder / "late").write_text("late")
        write(tmp_path, content="early")
    assert (tmp_path / "m/1/model.py").read_text() == "early"


@pytest.mark.parametrize("name", ["", ".", "..", "../up", "a/b", ".hidden", "a b", 'a"', "a\n", "é", "-x", "x" * 129])
def test_bad_names(name):
    with pytest.raises(UserError, match="bad model name"):
        layout.check_name(name)


def test_unwritable_out(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="--out"):
        write(tmp_path / "file")


def test_missing_and_broken_manifest(tmp_path):
    with pytest.raises(UserError, match="tritonmark export"):
        layout.read_manifest(tmp_path)
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(UserError, match=r"cannot be read .*; move .* away"):
        layout.read_manifest(tmp_path)
