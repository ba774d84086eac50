"""The video family on the load side: rows and metrics, reading of events, scenarios, and a real run on a real server."""

import base64
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from exporters.export import export_model
from loadgen.core import clips
from loadgen.core.metrics import metrics_of, summarise
from loadgen.core.record import Outcome, Phase, Record
from loadgen.core.scenario import Clip, Scenario
from loadgen.core.verdict import Audit, judge
from loadgen.edge import report, report_html, scenarios, store
from loadgen.edge.clients.triton_http import RequestError
from loadgen.edge.clients.triton_video import MAX_SHEET_BYTES, TritonVideo, take_video
from loadgen.edge.clips import pack_clips, read_clips, write_clips
from loadgen.edge.errors import UserError
from loadgen.edge.launch import locust_file_for
from loadgen.edge.samples import PromptLibrary

ROOT = Path(__file__).parents[3]
TINY = "cogvideox-5b-tiny"
JPEG = b"\xff\xd8 a picture"


def record(seq=0, steps=(10, 20, 35), frames=9, start=5, end=60, outcome=Outcome.OK):
    """A row whose times are in ms from its due time: text encoded at `start`, then steps, then the video at `end`."""
    due = seq * 100_000_000
    row = Record(seq, seq, 0, 0, Phase.MEASURE, due, frames)
    row.sent_ns = due
    if outcome is Outcome.OK:
        times = [start, *steps, end]
        row.chunk_ns.extend(due + t * 1_000_000 for t in times)
        row.chunk_tokens.extend([0] * (len(times) - 1) + [frames])
        row.first_ns, row.done_ns, row.tokens_out = row.chunk_ns[0], row.chunk_ns[-1], frames
    row.done_ns = row.done_ns or due + 1_000_000
    row.outcome = outcome
    return row


def rows_of(*records):
    import pyarrow as pa

    return store.to_rows(pa.Table.from_batches([store.pack(list(records))]))


def scenario(name="single_stream", model=TINY, **over) -> Scenario:
    return scenarios.resolve(name, model, overrides={"clip": "steps=3", **over})


def test_stages_are_told_apart():
    rows = rows_of(record(0), record(1, steps=(10, 30, 40), end=70), record(2, outcome=Outcome.ERROR))
    ms = 1_000_000
    assert clips.step_gaps(rows).tolist() == [5 * ms, 10 * ms, 15 * ms, 5 * ms, 20 * ms, 10 * ms]
    assert clips.denoise(rows).tolist() == [30 * ms, 35 * ms]
    assert clips.decode(rows).tolist() == [25 * ms, 30 * ms]
    assert clips.steps(rows) == 6


def test_the_summary_of_a_video_has_its_own_figures_and_none_of_tokens():
    records = [record(seq) for seq in range(10)] + [record(10, outcome=Outcome.TIMEOUT)]
    batches = [rows_of(*records[:4]), rows_of(*records[4:])]
    summary, rows = summarise(batches, scenario())
    assert summary["step_ns"]["p50"] == 10_000_000 and summary["step_ns"]["count"] == 30
    assert summary["denoise_ns"]["p99"] is None, "a failed video is slower than any"
    assert summary["decode_ns"]["p50"] == 25_000_000 and summary["start_ns"]["p50"] == 5_000_000
    window = 0.96  # the tenth is due at 0.9 s and takes 60 ms
    assert summary["frames_per_s"] == pytest.approx(90 / window)
    assert summary["seconds_per_video"] == pytest.approx(window / 10)
    assert (summary["frames_out"], summary["steps"]) == (90, 30)
    assert not [name for name in summary if name.startswith(("tokens_out", "tokens_per", "ttft", "tpot", "itl"))]
    assert set(summary["intervals"]) == {"e2e_ns", "qps", "frames_per_s"}
    names = {m.name for m in metrics_of({"llm"})}
    assert "ttft_ns" in names and not names & {"step_ns", "frames_per_s", "seconds_per_video"}
    verdict = judge(summary, rows, scenario(), Audit((), 1, 11, 11, 1.0))
    assert [r.code for r in verdict.reasons if "differ" in r.code] == []


@pytest.mark.parametrize(
    ("broken", "code"), [(record(1, frames=8), "frames_differ"), (record(1, steps=(10, 20)), "steps_differ")]
)
def test_other_work_than_asked_for_is_invalid(broken, code):
    broken.asked_out = 9
    summary, rows = summarise([rows_of(record(0), broken)], scenario())
    verdict = judge(summary, rows, scenario(), Audit((), 1, 2, 2, 1.0))
    assert code in [r.code for r in verdict.reasons]


def test_a_video_scenario_has_a_clip_and_mlperfs_rules():
    found = scenarios.resolve("single_stream", "cogvideox-5b")
    assert found.clip == Clip(49, 480, 720, 50, 6.0) and found.family == "video"
    assert (found.benchmark, found.percentile, found.salt, found.warmup) == ("wan-2.2-t2v", 0.9, False, 1)
    assert scenarios.resolve("offline", "cogvideox-5b", "mlperf", {"target_qps": 1}).minimums.queries == 248
    assert scenarios.resolve("server", "cogvideox-5b", overrides={"target_qps": 1}).limits.e2e_ns == 20_000_000_000
    changed = scenarios.resolve("single_stream", TINY, overrides={"clip": "steps=8, frames=17,guidance=1,seed=0"}).clip
    assert changed == Clip(17, 32, 48, 8, 1.0, 0)
    assert Scenario.from_json(json.loads(json.dumps(found.to_json()))) == found
    assert scenarios.resolve("single_stream", "phi-2").clip is None


@pytest.mark.parametrize(
    ("model", "over", "message"),
    [
        (TINY, {"clip": "foo=1"}, "--clip has no 'foo'"),
        (TINY, {"clip": "steps=many"}, "--clip is many; it must be a whole number of at least 1"),
        (TINY, {"clip": "guidance=-1"}, "--clip is -1; it must be a number above 0"),
        (TINY, {"ttft_ms": 5}, "--ttft-ms is for language models"),
        (TINY, {"output_tokens": "5"}, "--output-tokens is for language models"),
        ("phi-2-tiny", {"clip": "steps=4"}, "--clip is for video models"),
    ],
)
def test_bad_clips_are_named(model, over, message):
    with pytest.raises(UserError, match=message):
        scenarios.resolve("single_stream", model, overrides=over)


def test_accuracy_is_for_language_models():
    with pytest.raises(UserError, match="accuracy is for language models"):
        scenarios.resolve("accuracy", TINY)


def test_bodies_ask_for_the_clip_and_are_the_same_in_every_run():
    library, again = PromptLibrary("builtin-video", scenario(), "a"), PromptLibrary("builtin-video", scenario(), "b")
    body = json.loads(library.body(3, "id-3"))
    assert body.pop("text_input") == library.texts[3] and body.pop("id") == "id-3"
    assert body == {"num_frames": 9, "height": 32, "width": 48, "seed": 42, "num_inference_steps": 3,
                    "guidance_scale": 6.0, "output": "sheet", "stream": True}  # fmt: skip
    assert library.body(0, "x") == again.body(0, "x") and library.asks(0) == (9, None)
    assert len(library) == 32 and len(set(library.texts)) == 32


def test_the_locust_file_follows_the_model():
    assert locust_file_for(["--model", TINY, "--scenario", "offline"]) == "video.py"
    assert locust_file_for(["--model", "phi-2"]) == locust_file_for([]) == "llm.py"


def take(row, *messages):
    for arrival, message in enumerate(messages, 1):
        take_video(json.dumps(message).encode(), arrival, row)


def final(**more):
    return {"finish_reason": "complete", "num_output_frames": 9, "num_input_tokens": 12, "vae_decode_s": 0.5,
            "video": base64.b64encode(JPEG).decode(), **more}  # fmt: skip


def test_events_become_chunks():
    row = Record(0, 0, 0, 0, Phase.MEASURE, 0, 9)
    take(row, {"step": 0, "steps": 1, "step_s": 0.1}, {"step": 1, "steps": 1, "step_s": 0.2}, final())
    assert list(row.chunk_ns) == [1, 2, 3] and list(row.chunk_tokens) == [0, 0, 9]
    assert (row.first_ns, row.tokens_out, row.usage_out, row.tokens_in) == (1, 9, 9, 12)
    assert row.clip.jpeg == JPEG and row.clip.facts["vae_decode_s"] == 0.5


def test_only_the_first_measured_videos_are_kept():
    for seq, phase, more, kept in (
        (3, Phase.MEASURE, {}, True), (4, Phase.MEASURE, {}, False), (0, Phase.WARMUP, {}, False),
        (0, Phase.MEASURE, {"video": "not base64!"}, False), (0, Phase.MEASURE, {"video": ""}, False),
        (0, Phase.MEASURE, {"video": base64.b64encode(b"\x00 no JPEG").decode()}, False),
        (0, Phase.MEASURE, {"video": base64.b64encode(JPEG + bytes(MAX_SHEET_BYTES)).decode()}, False),
    ):  # fmt: skip
        row = Record(seq, seq, 0, 0, phase, 0, 9)
        take(row, final(**more))
        assert (row.clip is not None) == kept, (seq, more)


@pytest.mark.parametrize(
    ("message", "text"),
    [
        ({"error": "out of memory"}, "server_error: out of memory"),
        ({"finish_reason": "cancelled", "num_output_frames": 0}, "the video ended with 'cancelled'"),
        ({"num_output_frames": -1}, "malformed"),
        ([], "not a JSON object"),
    ],
)
def test_bad_events_fail_the_request(message, text):
    with pytest.raises(RequestError) as caught:
        take(Record(0, 0, 0, 0, Phase.MEASURE, 0, 9), message)
    assert text in caught.value.error


def test_kept_clips_survive_and_a_broken_one_is_passed_over(tmp_path):
    row = Record(1, 1, 0, 0, Phase.MEASURE, 0, 9)
    take(row, final(work="fp8"))
    write_clips(tmp_path, pack_clips([row, Record(2, 2, 0, 0, Phase.MEASURE, 0, 9)], ["a <b>kite</b>"]))
    (tmp_path / "clips/007.json").write_text("{")
    (kept,) = read_clips(tmp_path)
    assert (kept.seq, kept.prompt, kept.sheet.read_bytes()) == (1, "a <b>kite</b>", JPEG)
    assert read_clips(tmp_path / "none") == []


@pytest.fixture(scope="module")
def video_server(tmp_path_factory):
    from exporters.server import TritonServer

    out = tmp_path_factory.mktemp("videos")
    export_model(TINY, out=out)
    with TritonServer(out, log_path=out / "triton.log", ready_timeout_s=120) as running:
        yield running


def locust(server, results, *arguments, file="video.py"):
    command = [sys.executable, "-m", "locust", "-f", str(ROOT / "loadgen" / file), "--host", server.http_url,
               "--model", TINY, "--headless", "--only-summary", "--results", str(results), *arguments]  # fmt: skip
    return subprocess.run(command, capture_output=True, text=True, timeout=90, check=False)


@pytest.mark.live
def test_single_stream_seals_a_run_with_video_figures_and_pictures(video_server, tmp_path):
    done = locust(video_server, tmp_path, "--scenario", "single_stream", "--run-time", "2s", "--clip", "steps=3")
    (folder,) = {path.parent for path in tmp_path.rglob("run.json")}
    run = store.load(folder)
    codes = [r["code"] for r in run.document["verdict"]["reasons"] if not r["code"].startswith("client_")]
    assert codes == [] and done.returncode == (0 if run.valid else 3), done.stdout + done.stderr
    summary = run.summary
    assert summary["completed"] >= 3 and summary["failed"] == 0
    assert summary["steps"] == 3 * summary["completed"] and summary["frames_out"] == 9 * summary["completed"]
    (rows,) = run.rows()
    assert np.diff(rows.chunk_offsets).tolist() == [5] * len(rows)
    parts = summary["start_ns"]["mean"] + summary["denoise_ns"]["mean"] + summary["decode_ns"]["mean"]
    assert parts == pytest.approx(summary["e2e_ns"]["mean"], rel=1e-6), "stages add up to the whole"
    assert run.document["exported"]["work"] == "exact"
    kept = read_clips(folder)
    assert [clip.seq for clip in kept] == list(range(min(4, len(rows))))
    assert kept[0].facts["steps"] == 3 and kept[0].sheet.stat().st_size < 100_000
    assert "contact sheets in" in done.stdout and "TTFT" not in done.stdout and "frames/s" in done.stdout
    page, text = report_html.html([run]), report.markdown([run])
    assert page.count("data:image/jpeg;base64,") == len(kept) and "TTFT" not in page.split("<script")[0]
    assert "s/video" in text and "TPOT" not in text
    detail = (folder / "mlperf_log_detail.txt").read_text()
    assert "token_latencies" not in detail or '"value": false' in detail
    assert "result_90.00_percentile_latency_ns" in detail


@pytest.mark.live
def test_the_wrong_locust_file_says_which_is_right(video_server, tmp_path):
    done = locust(video_server, tmp_path, "--scenario", "single_stream", "--run-time", "1s", file="llm.py")
    assert done.returncode == 2 and "makes video: use loadgen/video.py" in done.stderr


@pytest.mark.live
@pytest.mark.slow
def test_tritonmark_run_offline(video_server, tmp_path):
    command = [sys.executable, "-m", "tritonmark", "run", "offline", "--host", video_server.http_url, "--model", TINY,
               "--target-qps", "4", "--run-time", "1s", "--results", str(tmp_path), "--min-queries", "12"]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=90, check=False)
    (folder,) = {path.parent for path in tmp_path.rglob("run.json")}
    assert done.returncode in (0, 3), done.stderr
    assert store.load(folder).summary["completed"] == 12
    checked = subprocess.run(
        [*command[:3], "check", str(folder)], capture_output=True, text=True, timeout=60, check=False
    )
    assert checked.returncode in (0, 3), checked.stdout + checked.stderr


def test_a_client_of_videos_speaks_of_frames():
    assert TritonVideo("http://127.0.0.1:1", TINY, clock=lambda: 0).counted == "frames"
