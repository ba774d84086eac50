"""Accuracy mode: every prompt once, answers kept and compared; against the fake and, live, the real Triton."""

import json
import re
import subprocess
import sys
import time
from array import array
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rows import make_rows

from exporters.export import export_model
from exporters.server import TritonServer
from loadgen.core.metrics import summarise
from loadgen.core.record import Answer, Outcome, Phase, Record
from loadgen.core.rouge import rouge
from loadgen.core.scenario import Kind
from loadgen.core.verdict import Audit, judge
from loadgen.edge import accuracy, comparison, report, report_html, scenarios, store
from loadgen.edge.errors import UserError

LLM = str(Path(__file__).parents[3] / "loadgen" / "llm.py")


def write_reference(path: Path, answers: list[list[int]]) -> Path:
    return write_lines(path, [{"prompt": f"p{i}", "token_ids": a} for i, a in enumerate(answers)])


def write_lines(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def command(url: str, model: str, results: Path, *more: str) -> list[str]:
    return [sys.executable, "-m", "locust", "-f", LLM, "--headless", "--only-summary", "--host", url, "--model", model,
            "--scenario", "accuracy", "--results", str(results), *more]  # fmt: skip


def run(url: str, model: str, results: Path, *more: str) -> tuple[int, store.Run]:
    done = subprocess.run(command(url, model, results, *more), stdin=subprocess.DEVNULL, capture_output=True, text=True,
                          timeout=90)  # fmt: skip
    folders = [path.parent for path in results.rglob("run.json")]
    assert len(folders) == 1, done.stdout + done.stderr
    return done.returncode, store.load(folders[0])


def keep(folder: Path, answers: dict[int, tuple[str, list[int]]]) -> None:
    """Answers as a run writes them: sample → text, token ids; in order of completion."""
    records = []
    for seq, (sample, (text, ids)) in enumerate(answers.items()):
        record = Record(seq, seq, sample, 0, Phase.MEASURE, 0, 3)
        record.outcome, record.answer = Outcome.OK, Answer([text], array("i", ids))
        records.append(record)
    writer = accuracy.AnswerWriter(folder)
    writer.write(accuracy.pack_answers(records))
    writer.close()


def scenario(size: int, **over):
    return scenarios.sized(scenarios.resolve("accuracy", "fake", overrides=over), size)


def test_a_reference_brings_prompts_and_length(tmp_path):
    path = str(write_reference(tmp_path / "r.jsonl", [[1, 2, 3]] * 5))
    resolved = scenario(5, reference=path)
    assert (resolved.kind, resolved.prompts, resolved.output_tokens, resolved.salt) == (Kind.OFFLINE, path, "3", False)
    assert (resolved.minimums.queries, resolved.minimums.duration_ns) == (5, 0)


@pytest.mark.parametrize("over", [{"min_agreement": 0.5}, {"reference": "/nowhere.jsonl"}])
def test_half_a_reference_is_refused(over):
    with pytest.raises(UserError):
        scenarios.resolve("accuracy", "fake", overrides=over)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ('{"prompt": "a", "token_ids": [1]}\n\n{"prompt": "b"}', "line 3: expected an object with prompt"),
        ('{"prompt": "a", "token_ids": []}', "line 1: expected a prompt"),
        ('{"prompt": "a", "token_ids": [1.5]}', "line 1: expected a prompt"),
        ('{"prompt": "a", "token_ids": [99999999999]}', "line 1: expected an object"),
        ('{"prompt": "a", "token_ids": [1]}\n{"prompt": "a", "token_ids": [2]}', "line 2: this prompt has other"),
        ("[1]", "line 1: expected an object"),
        ("", "is empty"),
    ],
)
def test_a_broken_reference_is_refused_by_line(tmp_path, lines, message):
    (tmp_path / "r.jsonl").write_text(lines)
    with pytest.raises(UserError, match=message):
        accuracy.read_reference(tmp_path / "r.jsonl")


def test_a_reference_is_matched_by_prompt_and_not_by_line(tmp_path):
    """Lines in another order, one that no prompt asks for, and a line separator inside a prompt."""
    prompts = write_lines(tmp_path / "p.jsonl", [{"prompt": "one"}, {"prompt": "two\u2028too"}, {"prompt": "three"}])
    rows = [("other", 9), ("three", 3), ("two\u2028too", 2), ("one", 1)]
    path = write_lines(tmp_path / "r.jsonl", [{"prompt": p, "token_ids": [i, i]} for p, i in rows])
    resolved = scenario(3, reference=str(path), prompts=str(prompts))
    comparison.check(resolved, ["one", "two\u2028too", "three"])
    keep(tmp_path, {2: ("c", [3, 3]), 0: ("a", [1, 1]), 1: ("b", [2, 9])})
    facts, reasons = comparison.assess(tmp_path, resolved)
    assert (facts["equal"], facts["samples"], facts["token_agreement"], reasons) == (2, 3, 5 / 6, [])
    assert facts["divergence"]["earliest"] == 1


def test_a_prompt_without_a_reference_or_with_a_salt_is_refused_before_the_run(tmp_path):
    path = write_reference(tmp_path / "r.jsonl", [[1], [2]])
    with pytest.raises(UserError, match=r"has no answer to prompt 2 \('elsewhere'\)"):
        comparison.check(scenario(2, reference=str(path)), ["p0", "elsewhere"])
    with pytest.raises(UserError, match="--salt on changes the prompts"):
        comparison.check(scenario(2, reference=str(path), salt="on"), ["p0", "p1"])


def test_an_unanswered_prompt_counts_as_an_empty_answer(tmp_path):
    rows = [{"prompt": f"p{i}", "token_ids": [1, 2], "output": "two words"} for i in range(4)]
    resolved = scenario(4, reference=str(write_lines(tmp_path / "r.jsonl", rows)))
    keep(tmp_path, {0: ("two words", [1, 2]), 3: ("two", [1, 9])})
    facts, _ = comparison.assess(tmp_path, resolved)
    assert (facts["answers"], facts["samples"], facts["equal"]) == (2, 4, 1)
    assert facts["token_agreement"] == 3 / 8
    assert facts["rouge"]["rouge1"] == pytest.approx((1 + 2 / 3) / 4) and facts["rouge"]["samples"] == 4


def test_a_reference_that_is_gone_at_the_end_is_a_reason_and_no_crash(tmp_path):
    path = write_reference(tmp_path / "r.jsonl", [[1]])
    resolved = scenario(1, reference=str(path))
    path.unlink()
    keep(tmp_path, {0: ("a", [1])})
    facts, reasons = comparison.assess(tmp_path, resolved)
    assert facts["answers"] == 1 and "cannot read" in facts["not_compared"]
    assert [r.code for r in reasons] == ["accuracy"]


def test_answers_are_kept_and_compared(fake_triton, tmp_path):
    fake_triton.plan({"ttft_ms": 5, "itl_ms": 2, "output_ids": [7, 8, 9]})
    reference = write_reference(tmp_path / "r.jsonl", [[7, 8, 9]] * 5 + [[7, 1, 9]])
    code, sealed = run(fake_triton.url, "fake", tmp_path / "results", "--reference", str(reference),
                       "--min-agreement", "0.95")  # fmt: skip
    seen = sealed.summary["accuracy"]
    assert (seen["equal"], seen["samples"], seen["divergence"]["earliest"]) == (5, 6, 1)
    assert code == 3 and [r["code"] for r in sealed.document["verdict"]["reasons"]] == ["accuracy"]
    kept = pq.read_table(sealed.folder / accuracy.NAME)
    assert sorted(kept["sample"].to_pylist()) == list(range(6)) and kept["token_ids"][0].as_py() == [7, 8, 9]
    (rows,) = sealed.rows()
    issued = dict(zip(rows.seq.tolist(), rows.sample.tolist(), strict=True))
    logged = json.loads((sealed.folder / "mlperf_log_accuracy.json").read_text())
    assert {entry["token_count"] for entry in logged} == {3}
    assert {entry["seq_id"]: entry["qsl_idx"] for entry in logged} == issued  # LoadGen's order of issue
    assert not (sealed.folder / accuracy.STREAM).exists() and not (sealed.folder / comparison.SCORES).exists()
    assert "none of its prompts have a reference answer" in comparison.why_no_scores(sealed)
    assert "5 of 6 answers equal the reference" in report.markdown([sealed])
    page = report_html.html([sealed])
    assert "accuracy: 5 of 6 answers equal the reference; token agreement 88.89 %" in page


def test_scores_are_written_as_mlperfs_checker_reads_them(fake_triton, tmp_path):
    """Patterns: ACC_PATTERN of MLCommons' submission checker, v6.1."""
    fake_triton.plan({"ttft_ms": 2, "itl_ms": 1, "output_ids": [7, 8], "text": "word. "})
    rows = [{"prompt": f"p{i}", "output": "Word of it. And more!"} for i in range(5)]
    prompts = write_lines(tmp_path / "p.jsonl", rows)
    code, sealed = run(fake_triton.url, "fake", tmp_path / "results", "--prompts", str(prompts), "--output-tokens", "2")
    assert code == 0 and comparison.why_no_scores(sealed) is None
    text = (sealed.folder / "accuracy.txt").read_text()
    first, _, figures, _ = text.split("\n")
    assert "written by Tritonmark" in first and "not an MLPerf result" in first
    patterns = {"rouge1": r".*'rouge1':\s+'?([\d.]+)'?.*", "rouge2": r".*'rouge2':\s+'?([\d.]+)'?.*",
                "rougeL": r".*'rougeL':\s+'?([\d.]+)'?.*", "rougeLsum": r".*'rougeLsum':\s+'?([\d.]+)'?.*",
                "gen_len": r".*'gen_len':\s([\d.]+).*",
                "tokens_per_sample": r".*'tokens_per_sample':\s([\d.]+).*"}  # fmt: skip
    read = {name: float(re.match(pattern, figures)[1]) for name, pattern in patterns.items()}
    assert not any(re.match(pattern, first) for pattern in patterns.values())
    answers = [row["text"] for row in accuracy.answers(sealed.folder)]
    expected = rouge(answers[0], rows[0]["output"])
    assert answers == [answers[0]] * 5 and expected["rouge1"] > 0
    assert {k: read[k] for k in expected} == {k: round(100 * v, 4) for k, v in expected.items()}
    assert (read["gen_len"], read["tokens_per_sample"]) == (5 * len("word.\nword."), 2.0)
    assert "'gen_num': 5" in figures
    assert f"ROUGE 1 {100 * expected['rouge1']:.2f}" in report_html.html([sealed])


def test_answers_without_ids_are_no_proof(fake_triton, tmp_path):
    fake_triton.plan({"ttft_ms": 5, "itl_ms": 2})
    reference = write_reference(tmp_path / "r.jsonl", [[7, 8, 9]] * 4)
    code, sealed = run(fake_triton.url, "fake", tmp_path / "results", "--reference", str(reference), "--processes", "2")
    assert code == 3 and [r["code"] for r in sealed.document["verdict"]["reasons"]] == ["accuracy"]


def test_a_killed_run_keeps_its_answers_and_their_comparison(fake_triton, tmp_path):
    fake_triton.plan({"ttft_ms": 20, "itl_ms": 2, "output_ids": [7, 8, 9], "server": {"capacity": 1}})
    reference = write_reference(tmp_path / "r.jsonl", [[7, 8, 9]] * 2000)
    words = command(fake_triton.url, "fake", tmp_path / "results", "--reference", str(reference))
    process = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        folder = wait_for_answers(tmp_path / "results", 20)
    finally:
        process.kill()
        process.wait()
    with (folder / accuracy.STREAM).open("ab") as stream:
        stream.write(b"\xff\xff\xff\xff\x10")  # a torn batch
    sealed = store.load(folder)
    seen = sealed.summary["accuracy"]
    assert "cut_off" in [r["code"] for r in sealed.document["verdict"]["reasons"]]
    assert 20 <= seen["answers"] == seen["equal"] < seen["samples"] == 2000
    assert len(list(accuracy.answers(folder))) == seen["answers"]
    assert seen["answers"] == sealed.summary["completed"]
    assert "answers equal the reference" in report.markdown([sealed])


def wait_for_answers(results: Path, count: int) -> Path:
    for _ in range(300):
        for stream in results.rglob(accuracy.STREAM):
            if sum(t.num_rows for t in accuracy._tables(stream)) >= count:
                return stream.parent
        time.sleep(0.1)
    raise AssertionError("no answers were written")


def test_a_disk_without_room_is_said_in_one_line(tmp_path):
    with pytest.raises(UserError, match=r"cannot write answers to .*nowhere: No such file"):
        accuracy.AnswerWriter(tmp_path / "nowhere")
    (tmp_path / accuracy.STREAM).symlink_to("/dev/full")
    writer = accuracy.AnswerWriter(tmp_path)
    batch = pa.RecordBatch.from_pylist([{"sample": 1}], schema=accuracy.ANSWERS).serialize().to_pybytes()
    for _ in range(2):  # after a hole the stream would be torn: nothing more is tried
        writer.write(batch)
        assert writer.broken.startswith("answers could not be written: ") and "No space left" in writer.broken
    writer.close()


def test_what_is_short_of_mlperfs_library_needs_prompts_and_no_time(tmp_path):
    resolved = scenario(5, prompts="builtin")
    summary, rows = summarise([make_rows([{"due": 0, "chunks": [5, 9], "tokens": [1, 1]}])], resolved)
    lacking = judge(summary, rows, resolved, Audit((), 1, 1, 1, 1.0)).lacking
    assert [(r.code, r.advice) for r in lacking] == [("min_queries", "give --prompts the whole library")]
    assert "prompts (had 1)" in lacking[0].limit


@pytest.mark.live
def test_the_real_server_equals_plain_generate(tmp_path):
    folder = export_model("phi-2-tiny", out=tmp_path / "models", reference=16)
    assert "reference.jsonl" in json.loads((folder / "manifest.json").read_text())["files"]
    lines = (folder / "reference.jsonl").read_text().splitlines()
    spoiled = tmp_path / "spoiled.jsonl"
    first = json.loads(lines[0])
    first["token_ids"][3] += 1
    spoiled.write_text("\n".join([json.dumps(first), *lines[1:]]) + "\n")
    with TritonServer(tmp_path / "models", models=["phi-2-tiny"], log_path=tmp_path / "log") as server:
        whole = ("--min-agreement", "1")
        reference = str(folder / "reference.jsonl")
        code, good = run(server.http_url, "phi-2-tiny", tmp_path / "good", "--reference", reference, *whole)
        assert (code, good.summary["accuracy"]["equal"]) == (0, 16)
        assert good.summary["accuracy"]["rouge"]["rougeLsum"] == 1.0
        code, bad = run(server.http_url, "phi-2-tiny", tmp_path / "bad", "--reference", str(spoiled), *whole)
    assert code == 3 and [r["code"] for r in bad.document["verdict"]["reasons"]] == ["accuracy"]
