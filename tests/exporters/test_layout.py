"""A model appears complete or not at all, whatever happens while it is written."""

import hashlib
import multiprocessing
import os
import signal

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


def killed_halfway(out):
    with layout.staged(out, "m") as folder:
        (folder / "config.pbtxt").write_text("half")
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_kill_leaves_nothing_to_load_and_is_swept(tmp_path):
    process = multiprocessing.get_context("fork").Process(target=killed_halfway, args=(tmp_path,))
    process.start()
    process.join()
    assert not (tmp_path / "m").exists()
    assert len(leftovers(tmp_path)) == 1
    assert not list(tmp_path.glob("*/config.pbtxt"))  # not where Triton looks
    write(tmp_path)
    assert leftovers(tmp_path) == []


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
    with pytest.raises(UserError, match="--force"):
        layout.read_manifest(tmp_path)
