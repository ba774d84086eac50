"""Comparisons of sealed runs with planted speeds: what is recovered, what is refused and what is marked."""

import io
import json
import math
import re
from dataclasses import replace

import pytest
from click.testing import CliRunner
from grid import COMPILER, HARDWARE, grid, one
from rich.console import Console

from loadgen.cli import cli
from loadgen.core.compare import BORROWED, REPEATS, WITHIN
from loadgen.edge import compare_report, compare_report_html, compare_text, store
from loadgen.edge.compare import load_runs, tables
from loadgen.edge.errors import UserError

HOLE = (("A100", "vllm"),)


def build(runs, baseline=None, prices=None, allow_unlike=False, **more):
    return compare_report.build(runs, tables(runs, allow_unlike), baseline, prices or {}, "EUR", **more)


def gains(c, figure):
    return {x.cell: x.gain for x in c.tables[0][2] if x.figure.label == figure}


def invoke(*arguments):
    return CliRunner().invoke(cli, ["compare", *map(str, arguments)])


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return grid(tmp_path_factory.mktemp("grid"), HOLE, repeats=3)


def test_planted_gains_are_recovered_and_the_oldest_eager_cell_is_the_baseline(whole):
    c = build(whole)
    table, baseline, _ = c.tables[0]
    assert baseline.label == "A100 SXM 80 GB · torch-eager bf16" and len(baseline.repeats) == 3
    assert len(table.cells) == 8
    found = gains(c, "tokens/s")
    for name, gpu in (("H100 SXM", "H100"), ("H200 SXM", "H200")):
        for backend in ("torch-eager", "torch-compile"):
            gain = found[f"{name} · {backend} bf16"]
            assert gain.low < HARDWARE[gpu] * COMPILER[backend] < gain.high
            assert gain.separable and gain.basis == REPEATS
    assert {x.figure.label for x in c.tables[0][2]} >= {"tokens/s", "TTFT p50", "TPOT p99", "E2E p50"}
    assert gains(c, "E2E p50")["H200 SXM · vllm bf16"].ratio == pytest.approx(2.2 * 2.5 * 1.2, rel=0.08)


def test_the_grid_takes_gains_apart_and_leaves_holes(whole):
    c = build(whole)
    view = c.views[0]
    assert view.grid.holes == [("A100 SXM 80 GB", "vllm")]
    assert view.gains.hardware["H200 SXM"].ratio == pytest.approx(2.2, rel=0.03)
    assert view.gains.compiler["torch-compile"].ratio == pytest.approx(1.5, rel=0.03)
    assert view.gains.compiler["vllm"] is None
    by = {h: view.gains.by_generation[h, "vllm"] for h in view.grid.hardware}
    assert by["A100 SXM 80 GB"] is None
    assert by["H200 SXM"].ratio / by["H100 SXM"].ratio == pytest.approx(1.2, rel=0.03)
    assert (
        "Compiler gain of vllm over torch-eager by generation: A100 SXM 80 GB not measured, H100 SXM 2.5" in c.headline
    )
    assert "vllm on A100 SXM 80 GB was not measured" in c.headline


def test_a_baseline_can_be_chosen_by_words_or_run(whole):
    assert build(whole, "h100 compile").tables[0][1].label == "H100 SXM · torch-compile bf16"
    run = whole[-1]
    assert run.document["run_id"] in build(whole, run.document["run_id"]).tables[0][1].run_ids
    assert run.document["run_id"] in build(whole, str(run.folder)).tables[0][1].run_ids
    with pytest.raises(UserError, match="no cell is --baseline 'gtx'; choose words of one of: A100"):
        build(whole, "gtx")


def test_equal_speeds_are_not_separable(tmp_path):
    runs = [one(tmp_path, "H100", b, r, speed=1.0, scatter=0.02) for b in ("torch-eager", "vllm") for r in range(3)]
    c = build(runs)
    gain = gains(c, "tokens/s")["H100 SXM · vllm bf16"]
    assert gain.low < 1 < gain.high and not gain.separable
    assert "not separable" in compare_text.markdown(c) and "not separable" in c.headline


def test_single_runs_have_intervals_of_their_own_and_say_so(tmp_path):
    runs = [one(tmp_path, "H100", b, count=400) for b in ("torch-eager", "vllm")]
    c = build(runs)
    assert gains(c, "tokens/s")["H100 SXM · vllm bf16"].basis == WITHIN
    assert any("one run each" in n for n in c.notes)
    mixed = build([*runs, one(tmp_path, "H100", "vllm", 1, count=400)])
    assert gains(mixed, "tokens/s")["H100 SXM · vllm bf16"].basis == BORROWED


def test_one_schedule_is_paired_and_another_is_not(tmp_path):
    common = {"name": "server", "target_qps": 20, "duration_s": 0.1, "min_queries": 200, "count": None}
    runs = [one(tmp_path, "H100", b, **common) for b in ("torch-eager", "vllm")]
    lines = {x.figure.label: x for x in build(runs).tables[0][2]}
    assert lines["E2E p50"].paired and lines["E2E p50"].gain.separable
    assert "tokens/s" not in lines  # the schedule sets it
    assert "‖" in compare_text.markdown(build(runs))
    seeded = [runs[0], one(tmp_path / "b", "H100", "vllm", schedule_seed=5, **common)]
    with pytest.raises(UserError, match="seeds: "):
        build(seeded)


@pytest.mark.parametrize(("change", "named"), [({"output_tokens": "16"}, "output tokens: "), ({"input_tokens": "64"}, "input tokens: 128 or 64"),
                         ({"duration_s": 0.2}, "duration: "), ({"document": {"weights": "hub"}}, "weights: "),
                         ({"document": {"prompts": {"sha256": "other"}}}, "prompts: ")])  # fmt: skip
def test_unlike_runs_are_refused_by_name_or_marked(tmp_path, change, named):
    runs = [one(tmp_path, "H100", "torch-eager"), one(tmp_path, "H100", "vllm", **change)]
    with pytest.raises(UserError, match=re.escape(named)):
        build(runs)
    c = build(runs, allow_unlike=True)
    assert (
        "UNLIKE RUNS" in c.marks[0]
        and "UNLIKE RUNS" in compare_text.markdown(c)
        and "UNLIKE RUNS" in compare_report_html.html(c)
    )
    assert compare_report.document(c)["marks"] == c.marks


def test_what_may_matter_is_named(tmp_path):
    hot = {
        "hardware": {
            "label": "x",
            "gpus": [{"name": "NVIDIA H100 80GB HBM3", "memory_mib": "81559", "power_limit_w": "350.00"}],
        }
    }
    runs = [one(tmp_path, "H100", "torch-eager"), one(tmp_path, "H100", "vllm", document=hot)]
    notes = " ".join(build(runs).notes)
    assert "H100 SXM ran with several power limits (350.00 or 700.00 W)" in notes and "driver differs" in notes


def test_other_code_behind_one_backend_is_named(tmp_path):
    exported = [{"model": "phi-2", "tp": "1", "seed": "0", "code": code} for code in ("aa11", "bb22", "aa11")]
    runs = [
        one(tmp_path, gpu, backend, document={"exported": about})
        for (gpu, backend), about in zip(
            [("A100", "torch-compile"), ("H100", "torch-compile"), ("H100", "torch-eager")], exported, strict=True
        )
    ]
    notes = " ".join(build(runs).notes)
    assert "single stream: torch-compile was served by different code (aa11 or bb22)" in notes
    assert "torch-eager was served" not in notes


def test_a_gpu_at_its_power_limit_is_named(tmp_path):
    devices = [{"device": "gpu0", "throttled": {"sw_power_cap": share}} for share in (0.05, 0.6)]
    runs = [one(tmp_path, "H100", b, document={"telemetry": {"devices": [d]}})
            for b, d in zip(("torch-eager", "vllm"), devices, strict=True)]  # fmt: skip
    held = [n for n in build(runs).notes if "power limit" in n]
    assert len(held) == 1 and "H100 SXM · vllm bf16 was held back by its power limit in up to 60% of samples" in held[0]


def test_other_models_and_loads_are_other_tables(tmp_path):
    runs = [one(tmp_path, "H100", b, name="concurrency", concurrency=c, count=64)
            for c in (8, 16, 1) for b in ("torch-eager", "vllm")]  # fmt: skip
    c = build(runs)
    assert [t.load for t, _, _ in c.tables] == ["concurrency 1", "concurrency 8", "concurrency 16"]
    with pytest.raises(UserError, match=r"nothing to compare: .*only H100 SXM · torch-eager"):
        build([runs[0]])


def test_precisions_are_compared_but_not_mixed_in_a_grid(tmp_path):
    runs = [
        one(tmp_path, "H100", "vllm"),
        one(tmp_path / "8", "H100", "vllm", speed=6.0, document={"precision": "fp8"}),
        one(tmp_path, "H100", "torch-eager"),
    ]
    c = build(runs)
    assert "H100 SXM · vllm fp8" in gains(c, "tokens/s")
    assert [v.precision for v in c.views] == ["bf16"]


def test_invalid_runs_are_refused_or_marked(tmp_path):
    runs = [one(tmp_path, "H100", "torch-eager"), one(tmp_path, "H100", "vllm", failed=2)]
    folders = [r.folder for r in runs]
    with pytest.raises(UserError, match=r"vllm.* is INVALID: .*--allow-invalid"):
        load_runs(folders)
    c = build(load_runs(folders, allow_invalid=True))
    assert c.marks == [f"INVALID RUNS compared on request: {runs[1].document['run_id']}"]


def test_tampered_and_truncated_runs_are_refused_with_the_reason(tmp_path):
    run = one(tmp_path, "H100", "torch-eager")
    file = run.folder / "run.json"
    document = json.loads(file.read_text())
    sealed = file.read_text()
    document["summary"]["tokens_per_s"] *= 2
    file.write_text(json.dumps(document))
    with pytest.raises(UserError, match=r"run\.json was changed after the run was sealed"):
        load_runs([run.folder])
    del document["seal"]  # as of a run from before: then its rows speak
    document["summary"]["completed"] += 1
    file.write_text(json.dumps(document))
    other = one(tmp_path, "H100", "vllm")
    with pytest.raises(UserError, match=r"run\.json says completed 41, its rows are 40"):
        build(load_runs([run.folder, other.folder]))
    file.write_text(sealed[: len(sealed) // 2])
    with pytest.raises(UserError, match="not readable"):
        load_runs([run.folder])
    file.write_text(sealed)
    rows = run.folder / "records.parquet"
    rows.write_bytes(rows.read_bytes()[:-100])
    with pytest.raises(UserError, match="changed after the run was sealed"):
        load_runs([run.folder])


def test_files_beside_the_rows_are_sealed_too(tmp_path):
    run = one(tmp_path, "H100", "torch-eager")
    (run.folder / "extra.bin").write_bytes(b"1")
    document = json.loads((run.folder / "run.json").read_text())
    document["files"] = {"extra.bin": store.sha256(run.folder / "extra.bin")}
    document["seal"] = store.digest(document)
    (run.folder / "run.json").write_text(json.dumps(document))
    store.verify_all(store.load(run.folder))
    (run.folder / "extra.bin").write_bytes(b"2")
    with pytest.raises(UserError, match=r"extra\.bin was changed"):
        load_runs([run.folder])
    (run.folder / "extra.bin").unlink()
    with pytest.raises(UserError, match=r"extra\.bin is missing"):
        load_runs([run.folder])


def test_cost_is_at_the_limit_and_break_even_between_gpus_of_one_backend(tmp_path):
    common = {"name": "server", "duration_s": 0.1, "min_queries": 200, "count": None}
    runs = [one(tmp_path, g, "vllm", target_qps=q, **common) for g, q in (("H100", 10), ("H100", 20), ("H200", 20))]
    runs.append(one(tmp_path, "H200", "vllm"))
    c = build(runs, prices={"h100-sxm": 3.0})
    rows = {r["cell"]: r for r in compare_report.cost_rows(c) if r["slo"] != "no latency limit"}
    h100, h200 = rows["H100 SXM · vllm bf16"], rows["H200 SXM · vllm bf16"]
    assert h100["load"] == "server 20 /s" and "TTFT ≤ 2000" in h100["slo"]
    assert h100["cost"] == pytest.approx(1e6 / h100["per_s"] / 3600 * 3.0)
    assert h200["cost"] is None and h200["break_even"] == pytest.approx(3.0 * h200["per_s"] / h100["per_s"])


def test_energy_stands_in_lines_and_costs(tmp_path):
    runs = [one(tmp_path, "H100", b, r) for b in ("torch-eager", "vllm") for r in range(2)]
    powered = []
    for run in runs:
        joules = 10.0 if "vllm" in run.document["run_id"] else 30.0
        summary = run.summary | {"energy_joules": joules, "mean_power_watts": 500.0,
                                 "tokens_per_joule": run.summary["tokens_out"] / joules * (1 + 0.001 * int(run.document["run_id"][-1]))}  # fmt: skip
        powered.append(replace(run, document=run.document | {"summary": summary}))
    c = build(powered)
    gain = gains(c, "tokens/J")["H100 SXM · vllm bf16"]
    assert gain.ratio == pytest.approx(3) and gain.separable
    row = compare_report.cost_rows(c)[0]
    assert row["joules_each"] == pytest.approx(30.0 / (40 * 32)) and row["per_joule"] == pytest.approx(40 * 32 / 30.0)
    assert row["per_s_per_watt"] == pytest.approx(row["per_s"] / 500)


def test_every_form_names_the_runs(whole, tmp_path):
    c = build(whole)
    ids = [r.document["run_id"] for r in whole]
    out = io.StringIO()
    compare_text.text(c, Console(file=out))
    document = compare_report.document(c)
    json.dumps(document, allow_nan=False)
    page = compare_report_html.html(c)
    for run_id in ids:
        assert (
            run_id in out.getvalue()
            and run_id in compare_text.markdown(c).replace("\\", "")
            and f'id="run-{run_id}"' in page
        )
    assert {r["run"] for r in document["runs"]} == set(ids)
    assert document["grids"][0]["holes"] == [["A100 SXM 80 GB", "vllm"]]
    cell = document["grids"][0]["cells"][0]
    figures = [r.summary["tokens_per_s"] for r in whole if r.document["run_id"] in cell["runs"]]
    assert cell["value"] == pytest.approx(math.prod(figures) ** (1 / 3))
    assert "not measured" in page and "one pass over 5.30 GB" in page


def test_what_users_wrote_cannot_break_out_of_the_page(tmp_path):
    evil = {"backend": '<script>alert("x")</script>|', "weights": "hub"}
    runs = [
        one(tmp_path, "H100", "torch-eager", document={"weights": "hub"}),
        one(tmp_path / "b", "H100", "vllm", document=evil),
    ]
    c = build(runs)
    assert "<script>alert" not in compare_report_html.html(c) and "<script>" not in compare_text.markdown(c)


def test_published_results_stand_apart_and_marked(whole):
    published = [{"kind": "published", "round": "v5.1", "model": "llama2-70b-99", "scenario": "Offline", "accelerator": "NVIDIA H200",
                  "results": 3, "min": 1.0, "median": 2.0, "max": 3.0, "unit": "Tokens/s"}]  # fmt: skip
    c = build(whole, published=published)
    text = compare_text.markdown(c)
    assert "PUBLISHED by MLCommons, not measured here" in text
    assert not any(x.cell.startswith("NVIDIA") for _, _, lines in c.tables for x in lines)


def test_the_command(tmp_path):
    grid(tmp_path / "runs", repeats=1)
    done = invoke(tmp_path / "runs", "--baseline", "h100 eager", "--format", "json")
    assert json.loads(done.output)["tables"][0]["baseline"] == "H100 SXM · torch-eager bf16"
    page = tmp_path / "c.html"
    assert invoke(tmp_path / "runs", "--format", "html", "--out", page).exit_code == 0 and page.stat().st_size > 1e6
    assert "How far from physics" in invoke(tmp_path / "runs").output
    assert isinstance(invoke(tmp_path).exception, type(None))
    refused = invoke(tmp_path / "runs", "--baseline", "tpu")
    assert isinstance(refused.exception, UserError)
    listed = CliRunner().invoke(cli, ["gpus"]).output
    assert "h100-sxm" in listed and "3350" in listed
