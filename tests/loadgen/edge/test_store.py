"""Rows on disk: what is written, what survives a crash, what is refused."""

import errno
import json
import os
import subprocess
import sys
from array import array
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from loadgen.core.record import NEVER, SCHEMA, Outcome, Phase, Record
from loadgen.core.verdict import Audit
from loadgen.edge import scenarios, store
from loadgen.edge.errors import UserError

SCENARIO = scenarios.resolve("server", "phi-2-tiny", "smoke", {"target_qps": 10, "duration_s": 0.1})


def record(seq: int, **changes) -> Record:
    base = {"seq": seq, "query": seq, "sample": seq % 3, "worker": 0, "phase": Phase.MEASURE, "due_ns": seq * 10**8, "asked_out": 2,
                "sent_ns": seq * 10**8 + 5, "first_ns": seq * 10**8 + 100, "done_ns": seq * 10**8 + 300, "tokens_in": 7, "tokens_out": 2,
                "usage_out": 2, "chunk_ns": array("q", [seq * 10**8 + 100, seq * 10**8 + 300]),
                "chunk_tokens": array("i", [1, 1]), "outcome": Outcome.OK}  # fmt: skip
    return Record(**{**base, **changes})


def start(tmp_path: Path, count: int) -> store.RunWriter:
    folder = store.new_folder(tmp_path, ["GPU X", "m", "b-p", "server"], "run")
    return store.RunWriter(folder, {"scenario": SCENARIO.to_json(), "scheduled": count, "run_id": "run"})


def audit(rows) -> Audit:
    return Audit((), 1, len(rows), len(rows), 1.0)


def test_a_record_comes_back_as_it_was(tmp_path):
    failed = record(1, sent_ns=None, first_ns=None, tokens_in=None, tokens_out=0, usage_out=None, chunk_ns=array("q"),
                    chunk_tokens=array("i"), outcome=Outcome.ERROR, error="refused: no")  # fmt: skip
    writer = start(tmp_path, 2)
    writer.write(store.pack([record(0), failed]))
    writer.close()
    run = store.seal(writer.folder, {"run_id": "run"}, SCENARIO, audit)
    table = next(run.tables())
    assert table.schema.names == [c.name for c in SCHEMA]
    assert table.to_pylist()[0]["chunk_ns"] == [100, 300]
    assert table.to_pylist()[1]["sent_ns"] is None
    assert table.to_pylist()[1]["error"] == "refused: no"
    rows = next(run.rows())
    assert rows.sent_ns.tolist() == [5, NEVER]
    assert rows.chunk_offsets.tolist() == [0, 2, 2]
    assert rows.ok.tolist() == [True, False]


def test_sealing_leaves_two_files_and_nothing_is_overwritten(tmp_path):
    writer = start(tmp_path, 1)
    writer.write(store.pack([record(0)]))
    writer.close()
    run = store.seal(writer.folder, {"run_id": "run"}, SCENARIO, audit)
    assert sorted(p.name for p in run.folder.iterdir()) == ["records.parquet", "run.json"]
    assert run.folder.relative_to(tmp_path).parts == ("gpu-x", "m", "b-p", "server", "run")
    assert start(tmp_path, 1).folder.name == "run-2"


def test_a_killed_recorder_loses_no_row_it_was_given(tmp_path):
    code = f"""
import os, signal, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_store import *
writer = start(Path({str(tmp_path)!r}), 100)
for n in range(40):
    writer.write(store.pack([record(n)]))
os.kill(os.getpid(), signal.SIGKILL)
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -9
    folder = next(tmp_path.glob("*/*/*/*/run"))
    run = store.load(folder)
    assert run.document["records"]["rows"] == 40
    assert not run.valid
    assert [r["code"] for r in run.document["verdict"]["reasons"]][:2] == ["cut_off", "missing_rows"]
    assert store.load(folder).document == run.document  # sealed for good


def test_a_torn_last_batch_costs_only_itself(tmp_path):
    writer = start(tmp_path, 3)
    for n in range(3):
        writer.write(store.pack([record(n)]))
    os.truncate(writer.folder / "records.arrows", os.path.getsize(writer.folder / "records.arrows") - 10)
    writer._file.close()
    assert store.load(writer.folder).document["records"]["rows"] == 2


def test_a_run_in_progress_is_not_sealed_by_a_reader(tmp_path):
    code = f"""
import sys, time
sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_store import *
writer = start(Path({str(tmp_path)!r}), 1)
print("ready", flush=True)
time.sleep(30)
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "ready\n"
        with pytest.raises(UserError, match="still being recorded by process"):
            store.load(next(tmp_path.glob("*/*/*/*/run")))
    finally:
        process.kill()
        process.wait()


def test_a_run_that_is_being_sealed_is_not_sealed_again(tmp_path):
    """In accuracy mode that takes seconds; the file of rows stays open for as long, which is what others look at."""
    writer = start(tmp_path, 1)
    writer.write(store.pack([record(0)]))
    writer.close()
    seen = []

    def slow(folder, scenario):
        seen.append(store._alive(os.getpid(), folder))
        return {}, []

    store.seal(writer.folder, {"run_id": "run"}, SCENARIO, audit, slow)
    assert seen == [True] and not store._alive(os.getpid(), writer.folder)


def test_a_full_disk_while_sealing_keeps_the_rows(tmp_path, monkeypatch):
    writer = start(tmp_path, 1)
    writer.write(store.pack([record(0)]))
    writer.close()
    real = store.write_json

    def full(path, document):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(store, "write_json", full)
    with pytest.raises(UserError, match=r"could not seal .*No space left.*rows are safe.*tritonmark report"):
        store.seal(writer.folder, {"run_id": "run"}, SCENARIO, audit)
    assert sorted(p.name for p in writer.folder.iterdir()) == ["records.arrows", "start.json"]
    monkeypatch.setattr(store, "write_json", real)
    assert store.load(writer.folder).document["records"]["rows"] == 1


def test_a_full_disk_while_running_is_remembered(tmp_path):
    writer = start(tmp_path, 1)

    class Full:
        def write_batch(self, batch):
            raise OSError(errno.ENOSPC, "No space left on device")

    writer._stream = Full()
    writer.write(store.pack([record(0)]))
    assert writer.broken == "rows could not be written: No space left on device"


def test_unwritable_results_are_one_clear_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="choose another --results"):
        store.new_folder(tmp_path / "file", ["a"], "run")


def test_damage_is_refused_with_its_reason(tmp_path):
    writer = start(tmp_path, 1)
    writer.write(store.pack([record(0)]))
    writer.close()
    folder = store.seal(writer.folder, {"run_id": "run"}, SCENARIO, audit).folder
    data = bytearray((folder / "records.parquet").read_bytes())
    data[len(data) // 2] ^= 1
    (folder / "records.parquet").write_bytes(data)
    with pytest.raises(UserError, match="changed after the run was sealed"):
        store.load(folder)
    (folder / "records.parquet").unlink()
    with pytest.raises(UserError, match=r"no records\.parquet"):
        store.load(folder)
    (folder / "run.json").write_text("{")
    with pytest.raises(UserError, match="not readable"):
        store.load(folder)
    (folder / "run.json").write_text(json.dumps({"schema": 99}))
    with pytest.raises(UserError, match="has schema 99"):
        store.load(folder)
    with pytest.raises(UserError, match="is not a run"):
        store.load(tmp_path)


def test_folder_names_are_never_paths():
    assert store.slug("../../etc/passwd") == "etc-passwd"
    assert store.slug("NVIDIA H100 80GB HBM3") == "nvidia-h100-80gb-hbm3"
    assert store.slug("..") == "unknown"


def test_row_groups_bound_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(store, "GROUP_VALUES", 10)
    writer = start(tmp_path, 20)
    for n in range(20):
        writer.write(store.pack([record(n)]))
    writer.close()
    run = store.seal(writer.folder, {"run_id": "run"}, SCENARIO, audit)
    assert [len(rows) for rows in run.rows()] == [4, 4, 4, 4, 4]
    assert run.summary["completed"] == 20
    assert np.concatenate([rows.seq for rows in run.rows()]).tolist() == list(range(20))
    assert isinstance(next(run.tables()), pa.Table)
