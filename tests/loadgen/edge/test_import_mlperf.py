"""Published results: every row read, normalised, and the medians of the published rounds found again.

The published files (v4.1, v5.1, v6.0) are not part of the project: TRITONMARK_MLPERF_DATA names a folder that has them
as inference_v5.1_summary_results.json and so on; data/mlperf of a folder beside the project is looked at too.
"""

import json
import os
from functools import cache
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

from loadgen.cli import cli
from loadgen.edge.errors import UserError
from loadgen.edge.import_mlperf import medians, read

BESIDE = sorted(Path(__file__).parents[4].glob("*/data/mlperf/inference_v*_summary_results.json"))
DATA = Path(os.environ.get("TRITONMARK_MLPERF_DATA", BESIDE[0].parent if BESIDE else "no published files"))
COUNTS = {"v4.1": 937, "v5.1": 1448, "v6.0": 520}
published = pytest.mark.skipif(not DATA.is_dir(), reason="no published MLPerf files; set TRITONMARK_MLPERF_DATA")
ROW = {"ID": "6.0-0001", "Submitter": "S", "Availability": "available", "Category": "closed", "Suite": "datacenter", "System": "x",
       "Platform": "8xGPU", "Model": "llama2-70b-99", "Scenario": "offline", "Nodes": 2, "Accelerator": "GPU", "a#": "4",
       "version": "v6.0", "weight_data_types": "FP8", "Performance_Result": 800.0, "Performance_Units": "Tokens/s"}  # fmt: skip


@cache
def rows(round_):
    return read(DATA / f"inference_{round_}_summary_results.json")


def write(path, *changes):
    path.write_text(json.dumps([ROW | c for c in changes]))
    return path


@published
@pytest.mark.parametrize("round_", COUNTS)
def test_every_row_is_read(round_):
    found = rows(round_)
    assert len(found) == COUNTS[round_]
    assert {r.round for r in found} == {round_} and {r.kind for r in found} == {"published"}
    assert all(r.scenario in ("Offline", "Server", "Interactive", "SingleStream", "MultiStream") for r in found)


@published
@pytest.mark.parametrize(
    ("round_", "model", "scenario", "accelerator", "median"),
    [("v4.1", "llama2-70b-99", "Offline", "NVIDIA H100-SXM-80GB", 3018), ("v4.1", "llama2-70b-99", "Server", "NVIDIA H100-SXM-80GB", 2699),
     ("v4.1", "llama2-70b-99", "Offline", "NVIDIA H100-PCIe-80GB", 1160), ("v4.1", "llama2-70b-99", "Offline", "NVIDIA H100-NVL-94GB", 1985),
     ("v4.1", "llama2-70b-99", "Offline", "NVIDIA H200-SXM-141GB", 3913), ("v4.1", "llama2-70b-99", "Offline", "NVIDIA GH200 Grace Hopper Superchip 144GB", 4076),
     ("v4.1", "mixtral-8x7b", "Offline", "NVIDIA H100-SXM-80GB", 6554), ("v4.1", "stable-diffusion-xl", "Offline", "NVIDIA H100-SXM-80GB", 2.04),
     ("v5.1", "llama2-70b-99", "Offline", "NVIDIA H200-SXM-141GB", 4376), ("v5.1", "llama2-70b-99", "Server", "NVIDIA H200-SXM-141GB", 4156),
     ("v5.1", "llama2-70b-99", "Interactive", "NVIDIA B200-SXM-180GB", 7485), ("v5.1", "llama3.1-8b", "Interactive", "NVIDIA B200-SXM-180GB", 12863),
     ("v5.1", "llama3.1-8b", "Offline", "NVIDIA H100-SXM-80GB", 5777), ("v5.1", "llama3.1-405b", "Server", "NVIDIA H200-SXM-141GB", 36.9),
     ("v5.1", "llama2-70b-99", "Offline", "NVIDIA B200-SXM-180GB", 12690), ("v6.0", "llama2-70b-99", "Offline", "NVIDIA B300-SXM-270GB", 13703),
     ("v6.0", "llama3.1-8b", "Server", "NVIDIA B200-SXM-180GB", 16330), ("v6.0", "llama2-70b-99", "Interactive", "NVIDIA RTX PRO 6000 Blackwell Server Edition", 781),
     ("v6.0", "gpt-oss-120b", "Server", "NVIDIA GB300", 14169), ("v6.0", "gpt-oss-120b", "Offline", "NVIDIA H200-SXM-141GB", 3585)],
)  # fmt: skip
def test_medians_of_the_published_rounds(round_, model, scenario, accelerator, median):
    found = {(m["model"], m["scenario"], m["accelerator"]): m for m in medians(rows(round_))}
    assert found[model, scenario, accelerator]["median"] == pytest.approx(median, rel=2.5e-3)


@published
def test_known_traps_of_the_published_files():
    v6 = [r for r in rows("v6.0") if r.platform.startswith("87x")]
    assert v6 and {r.accelerators for r in v6} == {87}
    interactive = [r for r in rows("v5.1") if r.model == "llama3.1-8b" and r.scenario == "Interactive"]
    assert {r.unit for r in interactive} == {"Tokens/s"} and all(r.corrected for r in interactive)
    assert any(r.repeats == "llama2-70b-99" for r in rows("v5.1") if r.model == "llama2-70b-99.9")
    assert all(r.per_accelerator is None for r in rows("v6.0") if r.unit.startswith("Latency"))


def test_a_row_is_normalised_by_all_its_accelerators(tmp_path):
    row = read(write(tmp_path / "f.json", {}))[0]
    assert (row.accelerators, row.per_accelerator, row.scenario, row.precision) == (8, 100.0, "Offline", "fp8")


def test_a_count_in_the_platforms_name_wins_over_whole_nodes(tmp_path):
    path = write(
        tmp_path / "f.json",
        {"Platform": "87xMI355X", "Nodes": 11, "a#": 8, "Total Accelerators": 88, "Performance_Result": 870},
    )
    row = read(path)[0]
    assert (row.accelerators, row.per_accelerator, row.corrected) == (87, 10.0, "listed as 88 accelerators")


def test_systems_without_accelerators_and_latencies_have_no_figure_per_accelerator(tmp_path):
    path = write(tmp_path / "f.json", {"a#": "", "Accelerator": ""}, {"Performance_Units": "Latency (s)"})
    assert [r.per_accelerator for r in read(path)] == [None, None]
    assert medians(read(path)) == []


def test_a_run_under_two_model_names_counts_once(tmp_path):
    path = write(
        tmp_path / "f.json", {"Model": "llama2-70b-99.9"}, {}, {"Model": "llama2-70b-99.9", "Performance_Result": 700.0}
    )
    found = read(path)
    assert [r.repeats for r in found] == ["llama2-70b-99", "", ""]
    assert [(m["model"], m["results"]) for m in medians(found)] == [("llama2-70b-99", 1), ("llama2-70b-99.9", 1)]


def test_large_open_and_edge_systems_are_no_part_of_a_median(tmp_path):
    path = write(tmp_path / "f.json", {"Nodes": 4}, {"Category": "open"}, {"Suite": "edge"})
    assert medians(read(path)) == [] and len(medians(read(path), at_most=16)) == 1


@pytest.mark.parametrize(
    ("text", "wrong"), [("{", "not JSON"), ("[]", "not a list"), ('[{"ID": "x"}]', "result 1: has no 'Submitter'")]
)
def test_other_files_are_refused_in_one_line(tmp_path, text, wrong):
    (tmp_path / "f.json").write_text(text)
    with pytest.raises(UserError, match=wrong):
        read(tmp_path / "f.json")
    path = write(tmp_path / "g.json", {}, {"Performance_Result": "fast"})
    with pytest.raises(UserError, match="result 2"):
        read(path)
    with pytest.raises(UserError, match="cannot read"):
        read(tmp_path / "none.json")


def test_the_command_writes_all_three_forms(tmp_path):
    path = write(tmp_path / "f.json", {}, {"Submitter": "T"})
    run = CliRunner().invoke
    table = run(cli, ["import", "mlperf", str(path)]).output
    assert "PUBLISHED by MLCommons, not measured here: 2 results" in table and "llama2-70b-99" in table
    as_json = json.loads(run(cli, ["import", "mlperf", str(path), "--format", "json"]).output)
    assert [r["submitter"] for r in as_json] == ["S", "T"] and {r["kind"] for r in as_json} == {"published"}
    done = run(cli, ["import", "mlperf", str(path), "--format", "parquet", "--out", str(tmp_path / "o.parquet")])
    assert done.exit_code == 0 and pq.read_table(tmp_path / "o.parquet").num_rows == 2
    refused = run(cli, ["import", "mlperf", str(path), "--format", "parquet"])
    assert isinstance(refused.exception, UserError)
