"""The submission tree. With TRITONMARK_SUBMISSION_TOOLS (the folder tools/submission of a checkout of
mlcommons/inference) the official checker judges good and spoiled trees; docs/mlperf.md says how."""

import json
import os
import re
import subprocess
import sys
from array import array
from pathlib import Path

import pytest
from click.testing import CliRunner
from simulated_run import simulate

from loadgen.core.record import Answer, Outcome, Phase, Record
from loadgen.core.verdict import Audit
from loadgen.edge import comparison, scenarios, store
from loadgen.edge.accuracy import AnswerWriter, pack_answers
from loadgen.edge.check_cli import check
from loadgen.edge.errors import UserError
from loadgen.edge.mlperf_log import write_accuracy_logs, write_logs
from loadgen.edge.submission import (
    LOADED_SAMPLES,
    MAY_BE_EMPTY,
    MUST_SAY,
    SAME_FACTS,
    parse_accuracy,
    submission,
    system_facts,
    write_tree,
)

SYSTEM = {
    "status": "available", "system_name": "Simulated machine", "system_type": "datacenter",
    "host_processors_per_node": "1", "host_memory_configuration": "1 x 8 GB", "host_storage_capacity": "1 TB",
    "host_storage_type": "NVMe", "host_networking": "N/A", "host_network_card_count": "1",
    "host_networking_topology": "N/A", "cooling": "air", "operating_system": "Linux", "other_software_stack": "none",
}  # fmt: skip
TOOLS = os.environ.get("TRITONMARK_SUBMISSION_TOOLS")
LOG = "results/Simulated_machine/phi-2/Server/performance/run_1/mlperf_log_detail.txt"


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    """A synthetic Server run of MLPerf length: 600 s of simulated rows."""
    return simulate(tmp_path_factory.mktemp("full") / "run", mlperf("server"))


def mlperf(name: str, **over):
    return scenarios.resolve(name, "phi-2", "mlperf", {"target_qps": 5, **over})


@pytest.fixture
def system(tmp_path):
    path = tmp_path / "system.json"
    path.write_text(json.dumps(SYSTEM))
    return path


@pytest.fixture
def accuracy(tmp_path, full):
    """The files of an accuracy run; the scores are invented, which the open division's checker does not mind."""
    folder = tmp_path / "accuracy-run"
    write_accuracy_logs(full, folder, ((i, i, b"\x07\0\0\0" * 8, 8) for i in range(13_368)))
    scores = "{'rouge1': 30.0, 'rouge2': 10.0, 'rougeL': 20.0, 'rougeLsum': 25.0, 'gen_len': 100, 'gen_num': 13368}\n"
    (folder / "accuracy.txt").write_text(scores)
    return folder


def tree(tmp_path, runs, system, **options) -> tuple[Path, list[str]]:
    missing = write_tree(runs, out=tmp_path / "tree", submitter="Us", system=system, **options)
    return tmp_path / "tree" / "open" / "Us", missing


def test_the_tree_has_every_file_the_checker_opens(tmp_path, full, system, accuracy):
    root, missing = tree(tmp_path, [full], system, accuracy={"": accuracy})
    assert missing == []
    files = {str(p.relative_to(root)) for p in root.rglob("*") if p.is_file()}
    here = "results/Simulated_machine/phi-2/Server/"
    assert files >= {"systems/Simulated_machine.json", "model_mapping.json", "src/README.md", here + "user.conf",
                     here + "README.md", here + "measurements.json", here + "performance/run_1/mlperf_log_summary.txt",
                     LOG, here + "accuracy/accuracy.txt", here + "accuracy/mlperf_log_accuracy.json",
                     here + "accuracy/mlperf_log_detail.txt"}  # fmt: skip
    facts = json.loads((root / "systems/Simulated_machine.json").read_text())
    assert facts.keys() >= {*MUST_SAY, *MAY_BE_EMPTY} and len({*MUST_SAY, *MAY_BE_EMPTY, "division", "submitter"}) == 35
    assert facts["host_processor_model_name"] == "sim" and "not an MLPerf result" in facts["sw_notes"]
    assert json.loads((root / "model_mapping.json").read_text()) == {"phi-2": "llama3.1-8b"}
    measured = json.loads((root / here / "measurements.json").read_text())
    assert measured["weight_data_types"] == "fp16" and all(measured.values())
    assert "min_duration = 600000" in (root / here / "user.conf").read_text()


def test_the_accuracy_log_is_cut_and_its_hash_kept(tmp_path, full, system, accuracy):
    digest = store.sha256(accuracy / "mlperf_log_accuracy.json")
    root, _ = tree(tmp_path, [full], system, accuracy={"server": accuracy})
    copied = root / "results/Simulated_machine/phi-2/Server/accuracy"
    assert (copied / "mlperf_log_accuracy.json").stat().st_size <= 10 * 1024
    assert re.findall(r"^hash=(\w+)$", (copied / "accuracy.txt").read_text(), re.MULTILINE) == [digest]
    assert (accuracy / "mlperf_log_accuracy.json").stat().st_size > 10 * 1024


def test_nothing_about_accuracy_is_made_up(tmp_path, full, system):
    root, missing = tree(tmp_path, [full], system)
    assert not (root / "results/Simulated_machine/phi-2/Server/accuracy").exists()
    assert len(missing) == 3 and "accuracy/accuracy.txt (no --accuracy folder was given)" in missing[0]
    assert all("the checker will reject" in line for line in missing)


def test_what_is_short_of_mlperf_is_listed(tmp_path, system):
    smoke = scenarios.resolve("server", "phi-2", "smoke", {"target_qps": 50, "schedule_seed": 7})
    _, missing = tree(tmp_path, [simulate(tmp_path / "run", smoke, library=20)], system)
    text = "\n".join(missing)
    assert "600 s" in text and "20 prompts" in text and "seeds are not those of v6.1" in text


def test_refusals_come_before_anything_is_written(tmp_path, full, system):
    failed = simulate(tmp_path / "failed", mlperf("server"), failed=2)
    closed = simulate(tmp_path / "closed", scenarios.resolve("concurrency", "phi-2"), count=0)
    for runs, options, why in (
        ([failed], {}, "INVALID: failed_error"),
        ([full, full], {}, "two runs of phi-2 Server"),
        ([closed], {}, "no MLPerf"),
        ([full], {"submitter": "../x"}, "names a folder"),
    ):
        with pytest.raises(UserError, match=why):
            write_tree(runs, **{"out": tmp_path / "tree", "submitter": "Us", "system": system} | options)
    assert not (tmp_path / "tree").exists()
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree" / "x").write_text("")
    with pytest.raises(UserError, match="nothing is overwritten"):
        tree(tmp_path, [full], system)
    with pytest.raises(UserError, match="is no folder"):
        parse_accuracy(("server=/nowhere/at/all",))


def test_a_system_description_that_says_too_little(tmp_path, full):
    path = tmp_path / "system.toml"
    path.write_text('status = "available"\n')
    with pytest.raises(UserError, match="must say what could not be probed: system_name, host_processors_per_node"):
        system_facts(path, [full], "Us", "open")
    path.write_text("\n".join(f'{k} = "{v}"' for k, v in (SYSTEM | {"status": "soon"}).items()))
    with pytest.raises(UserError, match="status is 'soon'; choose one of: available"):
        system_facts(path, [full], "Us", "open")
    with pytest.raises(UserError, match="cannot read"):
        system_facts(tmp_path / "none.json", [full], "Us", "open")


def test_command_line_and_check_of_the_tree(tmp_path, full, system, accuracy):
    out = tmp_path / "tree"
    arguments = [str(full.folder), "--out", str(out), "--submitter", "Us", "--system", str(system)]
    done = CliRunner().invoke(submission, [*arguments, "--accuracy", f"Server={accuracy}"])
    assert done.exit_code == 0 and "not an MLPerf result" in done.output
    checked = CliRunner().invoke(check, [str(out), "--round", "v6.1"])
    assert checked.exit_code == 0 and "2 checked, 2 VALID" in checked.output
    assert CliRunner().invoke(submission, [*arguments[:2], str(tmp_path / "other"), *arguments[3:]]).exit_code == 3


def official(tmp_path) -> tuple[bool, str]:
    command = [sys.executable, "-m", "submission_checker.main", "--input", str(tmp_path / "tree"), "--version", "v6.1"]
    done = subprocess.run([*command, "--csv", str(tmp_path / "summary.csv")], cwd=TOOLS, capture_output=True, text=True,
                          timeout=100)  # fmt: skip
    return done.returncode == 0 and "submission looks OK" in done.stderr, done.stderr


def spoil(path: Path, key: str, value: str) -> None:
    text = path.read_text()
    spoiled = re.sub(rf'("key": "{re.escape(key)}", "value": )[^,]+', rf"\g<1>{value}", text)
    assert spoiled != text
    path.write_text(spoiled)


needs_checker = pytest.mark.skipif(
    not TOOLS, reason="TRITONMARK_SUBMISSION_TOOLS names no checkout of mlcommons/inference"
)


@needs_checker
def test_the_official_checker_accepts_every_scenario(tmp_path, full, system, accuracy):
    interactive, single = mlperf("interactive"), mlperf("single_stream")
    runs = [full, simulate(tmp_path / "i", interactive), simulate(tmp_path / "s", single, count=2500),
            simulate(tmp_path / "o", mlperf("offline"), ttft_ms=8e5)]  # fmt: skip
    tree(tmp_path, runs, system, accuracy={"": accuracy})
    accepted, text = official(tmp_path)
    assert accepted and "Results=4, NoResults=0" in text, text[-3000:]


@needs_checker
@pytest.mark.parametrize(
    ("key", "value", "why"),
    [
        ("early_stopping_met", "false", "Early stopping condition was not met"),
        ("effective_schedule_rng_seed", "7", "schedule_rng_seed is wrong"),
        ("effective_min_duration_ms", "10000", "Test duration less than 600s"),
        ("result_first_token_99.00_percentile_latency_ns", "2000000001", "Failed extra check for TTFT and TPOT"),
        ("result_time_per_output_token_99.00_percentile_ns", "100000000", "Failed extra check for TTFT and TPOT"),
        ("effective_performance_sample_count", "20", "performance_sample_count, found 20"),
    ],
)
def test_the_official_checker_rejects_a_spoiled_log(tmp_path, full, system, accuracy, key, value, why):
    root, _ = tree(tmp_path, [full], system, accuracy={"": accuracy})
    spoil(root / LOG, key, value)
    accepted, text = official(tmp_path)
    assert not accepted and why in text, text[-3000:]


@needs_checker
@pytest.mark.parametrize(
    ("scenario", "options", "why"),
    [
        (mlperf("server", duration_s=20), {}, "Test duration less than 600s"),
        (mlperf("server", schedule_seed=7), {}, "schedule_rng_seed is wrong"),
        (mlperf("server"), {"ttft_ms": 3000}, "Early stopping condition was not met"),
        (mlperf("server"), {"failed": 1}, "Early stopping condition was not met"),
        (mlperf("server"), {"library": 20}, "performance_sample_count, found 20"),
    ],
)
def test_the_official_checker_rejects_a_run_that_falls_short(tmp_path, system, accuracy, scenario, options, why):
    """The same from the rows up: nothing in the log was edited."""
    run = simulate(tmp_path / "run", scenario, **options)
    write_logs(run)
    tree(tmp_path, [run], system, accuracy={"": accuracy}, allow_invalid=True)
    accepted, text = official(tmp_path)
    assert not accepted and why in text, text[-3000:]


def accuracy_run(folder: Path, count: int, *, references: bool = True, ended: str | None = None, **facts) -> store.Run:
    """A sealed accuracy run whose answers are its references."""
    prompts = folder.parent / f"{folder.name}.jsonl"
    rows = [{"prompt": f"p{i}"} | ({"output": "two words"} if references else {}) for i in range(count)]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    scenario = scenarios.sized(scenarios.resolve("accuracy", "phi-2", overrides={"prompts": str(prompts)}), count)
    folder.mkdir()
    writer, answers = store.RunWriter(folder, {}), AnswerWriter(folder)
    records = []
    for i in range(count):
        record = Record(i, i, i, 0, Phase.MEASURE, 0, 2)
        record.outcome, record.answer = Outcome.OK, Answer(["two words"], array("i", [1, 2]))
        record.sent_ns, record.first_ns, record.done_ns, record.tokens_in, record.tokens_out = 1, 2, 3, 1, 2
        record.usage_out, record.chunk_ns, record.chunk_tokens = 2, array("q", [2, 3]), array("i", [1, 1])
        records.append(record)
    writer.write(store.pack(records))
    answers.write(pack_answers(records))
    writer.close()
    answers.close()
    document = {"model": "phi-2", "backend": "b", "precision": "fp16", "weights": "w", "prompts": {"count": count}}
    audit = Audit((), 1, count, count, 1.0, ended=ended)
    return store.seal(folder, document | facts, scenario, lambda rows: audit, comparison.assess)


def test_a_sealed_accuracy_run_is_taken_over(tmp_path, full, system):
    same = {key: full.document.get(key) for key in SAME_FACTS}
    run = accuracy_run(tmp_path / "good", 13_368, **same)
    root, missing = tree(tmp_path, [full], system, accuracy={"": run.folder})
    assert missing == []
    text = (root / "results/Simulated_machine/phi-2/Server/accuracy/accuracy.txt").read_text()
    assert "'rouge1': '100.0'" in text and "'gen_num': 13368" in text and re.search(r"^hash=\w{64}$", text, re.M)
    assert "13368 prompts of" in (root / "results/Simulated_machine/phi-2/Server/README.md").read_text()


@pytest.mark.parametrize(
    ("count", "options", "why"),
    [
        (3, {}, "answers 3 prompts; llama3.1-8b has 13368"),
        (3, {"references": False}, "none of its prompts have a reference answer"),
        (3, {"ended": "stopped"}, "is INVALID: cut_off"),
    ],
)
def test_an_accuracy_run_that_cannot_stand_there_is_said(tmp_path, full, system, count, options, why):
    run = accuracy_run(tmp_path / "run", count, **options)
    root, (line,) = tree(tmp_path, [full], system, accuracy={"": run.folder})
    assert line.startswith("Server: accuracy (") and why in line
    assert not (root / "results/Simulated_machine/phi-2/Server/accuracy").exists()


def test_accuracy_of_another_model_or_no_accuracy_run_is_said(tmp_path, full, system, monkeypatch):
    monkeypatch.setitem(LOADED_SAMPLES, "llama3.1-8b", 2)
    same = {key: full.document.get(key) for key in SAME_FACTS}
    run = accuracy_run(tmp_path / "run", 2, **same | {"precision": "int3"})
    _, lines = tree(tmp_path, [full], system, accuracy={"": run.folder})
    assert "has precision int3, the run" in lines[0]
    missing = write_tree([full], out=tmp_path / "two", submitter="Us", system=system, accuracy={"": full.folder})
    assert "it is a server run: make one with `tritonmark run accuracy`" in missing[0]
