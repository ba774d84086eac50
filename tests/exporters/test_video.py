"""The video family: catalogue, export, runtime files, and the real tritonserver with cogvideox-5b-tiny."""

import base64
import concurrent.futures
import io
import json
import math
import shutil
import socket
import time
import types
import urllib.error
import urllib.request

import numpy as np
import pytest

from exporters import registry
from exporters.catalogue import check_parameters, find_model
from exporters.errors import UserError
from exporters.export import export_model
from exporters.video_reference import MIN_PSNR_DB, prompt_distance, read_references, video_agreement

TINY = "cogvideox-5b-tiny"


@pytest.fixture(scope="session")
def videos(tmp_path_factory):
    """A model repository with cogvideox-5b-tiny, eager, with two reference clips."""
    out = tmp_path_factory.mktemp("videos")
    export_model(TINY, out=out, reference=2)
    return out


@pytest.fixture(scope="session")
def video_server(videos, tmp_path_factory):
    from exporters.server import TritonServer

    log = tmp_path_factory.mktemp("video-log") / "triton.log"
    with TritonServer(videos, log_path=log, ready_timeout_s=120) as running:
        yield running


def post(server, endpoint="generate_stream", model=TINY, **fields):
    """Responses of one request, errors included."""
    request = urllib.request.Request(f"{server.http_url}/v2/models/{model}/{endpoint}", json.dumps(fields).encode())
    try:
        body = urllib.request.urlopen(request, timeout=120).read()
    except urllib.error.HTTPError as error:
        body = error.read()
    if not body.startswith(b"data:"):
        return [json.loads(body)]
    return [json.loads(event.removeprefix(b"data:")) for event in body.split(b"\n\n") if event.strip()]


def frames_of(answer):
    shape = (answer["num_output_frames"], answer["height"], answer["width"], 3)
    return np.array(answer["frames"], dtype=np.uint8).reshape(shape)


def test_there_are_three_backends():
    assert registry.backends_of("video") == ["tensorrt", "torch-compile", "torch-eager"]


@pytest.mark.parametrize("name", ["cogvideox-5b", TINY])
def test_parameters_are_counted_right(name):
    model = find_model(name)
    check_parameters(model)
    parts = [model.parts[part]["parameters"] for part in ("transformer", "vae", "text_encoder")]
    assert model.parameters == sum(parts)
    if name == "cogvideox-5b":
        assert parts == [5_570_283_072, 215_583_907, 4_762_310_656]


def test_another_architecture_is_refused():
    model = find_model(TINY)
    parts = {**model.parts, "vae": {**model.parts["vae"], "parameters": 1}}
    with pytest.raises(UserError, match="its vae has 219,435 parameters here, 1 in the catalogue"):
        check_parameters(type(model)(**{**model.__dict__, "parts": parts}))


def test_an_export_says_what_it_is(videos):
    folder = videos / TINY
    manifest = json.loads((folder / "manifest.json").read_text())
    assert (manifest["family"], manifest["work"], manifest["weights"]) == ("video", "exact", "synthetic")
    assert "not T5's" in manifest["source"]["tokenizer"]
    assert {"1/weights/transformer/config.json", "reference_video.npz"} <= set(manifest["files"])
    from google.protobuf import text_format
    from tritonclient.grpc import model_config_pb2

    config = text_format.Parse((folder / "config.pbtxt").read_text(), model_config_pb2.ModelConfig())
    assert config.model_transaction_policy.decoupled
    assert {i.name for i in config.input} >= {"text_input", "seed", "num_frames", "guidance_scale", "output"}
    assert config.parameters["tritonmark.work"].string_value == "exact"


def test_equal_exports_are_equal_and_another_seed_is_not(tmp_path):
    from exporters.layout import hash_files

    one, same, other = (hash_files(export_model(TINY, out=tmp_path, name=f"seed-{n}", seed=seed) / "1")
                        for n, seed in enumerate((0, 0, 1)))  # fmt: skip
    weights = "weights/transformer/diffusion_pytorch_model.safetensors"
    assert one == same and other[weights] != one[weights]


def test_the_real_model_is_exported_without_its_weights(tmp_path):
    folder = export_model("cogvideox-5b", out=tmp_path)
    settings = json.loads((folder / "1/settings.json").read_text())
    assert settings["draw_on_load"] and settings["precision"] == "bf16"
    assert sum(path.stat().st_size for path in folder.rglob("*")) < 1e6


def test_a_local_folder_round_trips_and_a_wrong_one_is_refused(videos, tmp_path):
    weights = videos / TINY / "1/weights"
    folder = export_model(TINY, weights=str(weights), out=tmp_path / "a")
    assert json.loads((folder / "manifest.json").read_text())["source"] == {"kind": "local", "folder": "weights"}
    with pytest.raises(UserError, match=r"no transformer there; pass .* a folder of CogVideoXPipeline"):
        export_model(TINY, weights=str(tmp_path), out=tmp_path / "b")
    with pytest.raises(UserError, match="the transformer of these weights has num_layers 2 and not 42 as cogvideox-5b"):
        export_model("cogvideox-5b", weights=str(weights), out=tmp_path / "b")
    with pytest.raises(UserError, match="not on the hub"):
        export_model(TINY, weights="hub", out=tmp_path / "b")
    assert not list((tmp_path / "b").glob("*"))


@pytest.mark.parametrize(
    ("part", "values", "message"),
    [
        (
            "vae",
            {"block_out_channels": [8, 16, 16, 32]},
            r"the vae of these weights has block_out_channels\[3\] 32 and",
        ),
        ("text_encoder", {"d_ff": 64}, "the text_encoder of these weights has d_ff 64 and not 128"),
    ],
)
def test_weights_of_another_size_are_refused(videos, tmp_path, part, values, message):
    source = shutil.copytree(videos / TINY / "1/weights", tmp_path / "source")
    file = source / part / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))
    with pytest.raises(UserError, match=message):
        export_model(TINY, weights=str(source), out=tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def test_the_disk_is_looked_at_before_weights_are_written(videos, tmp_path, monkeypatch):
    monkeypatch.setattr("exporters.disk.shutil.disk_usage", lambda folder: types.SimpleNamespace(free=1e6))
    with pytest.raises(UserError, match=r"cogvideox-5b-tiny in fp32 needs 2\.4 MB, the disk of --out has 1\.0 MB free"):
        export_model(TINY, weights=str(videos / TINY / "1/weights"), out=tmp_path)


def test_psnr():
    black, white = np.zeros((1, 2, 2, 3), np.uint8), np.full((1, 2, 2, 3), 255, np.uint8)
    assert video_agreement(black, black) == math.inf
    assert video_agreement(black, white) == pytest.approx(0)
    assert video_agreement(black, black + 1) == pytest.approx(20 * math.log10(255))
    with pytest.raises(ValueError, match="cannot be compared"):
        video_agreement(black, black[:, :1])


def settings_of(name=TINY):
    return {**find_model(name).runtime}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "text_input is missing"),
        ({"num_frames": 5}, "num_frames is 5; it must be 8 k + 1"),
        ({"num_frames": 0}, "num_frames is 0"),
        ({"height": 40}, "height is 40; it must be a positive multiple of 16"),
        ({"width": -16}, "width is -16"),
        ({"num_frames": 4097}, "this model allows 230400"),
        ({"num_inference_steps": 0}, "num_inference_steps is 0"),
        ({"num_inference_steps": 51}, "from 1 to 50"),
        ({"guidance_scale": float("nan")}, "guidance_scale is nan; it must be of type float"),
        ({"guidance_scale": -1}, "guidance_scale is -1"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": 1.5}, "seed is 1.5; it must be of type int"),
        ({"output": "gif"}, "choose one of: sheet, mp4, tensor, none"),
        ({"stream": 1}, "stream is 1; it must be of type bool"),
        ({"guidance_scale": 1.0, "negative_prompt": "x"}, "negative_prompt needs a guidance_scale above 1"),
        ({"negative_prompt": b"\xff"}, "negative_prompt is not UTF-8"),
    ],
)
def test_bad_fields_are_named(runtime, fields, message):
    module = runtime("video_request")
    given = fields if not fields else {"text_input": "a kite", **fields}
    with pytest.raises(module.BadRequestError, match=r"^[^\n]*$") as caught:
        module.parse_order(given, settings_of())
    assert message in str(caught.value)


def test_defaults_are_the_models(runtime):
    order = runtime("video_request").parse_order({"text_input": b"a kite"}, settings_of("cogvideox-5b"))
    assert (order.num_frames, order.height, order.width, order.num_inference_steps) == (49, 480, 720, 50)
    assert order.guided and order.output == "sheet" and not order.stream


def test_other_work_must_be_labelled(runtime, videos):
    read = runtime("video_engine").read_settings
    folder = videos / TINY / "1"
    assert read(folder, {"vae_slicing": "True", "threads": "2"})["vae_slicing"] is True
    with pytest.raises(ValueError, match=r"other work \(tiled_vae\)"):
        read(folder, {"vae_tiling": "true"})
    with pytest.raises(ValueError, match=r"other work \(first_block\) than parameter tritonmark.work says \(exact\)"):
        read(folder, {"step_cache": "first_block"})
    assert read(folder, {"step_cache": "first_block", "tritonmark.work": "first_block"})["step_cache"] == "first_block"
    with pytest.raises(ValueError, match="these settings do other work"):
        read(folder, {"tritonmark.work": "fp8"})
    with pytest.raises(ValueError, match="choose one of none, fp8"):
        read(folder, {"quantisation": "int3"})
    with pytest.raises(ValueError, match="threads is 'many', not a int"):
        read(folder, {"threads": "many"})


@pytest.fixture(scope="session")
def make(runtime, videos):
    """`make(settings, **order)` runs the runtime's engine on the tiny model and returns the clip."""
    engine, request = runtime("video_engine"), runtime("video_request")
    folder = videos / TINY / "1"

    def run(changed=None, **fields):
        settings = engine.read_settings(folder, {}) | (changed or {})
        order = request.parse_order({"text_input": "a kite", **fields}, settings)
        return engine.Engine(folder / "weights", settings, "cpu").generate(order)

    return run


def test_the_engine_equals_plain_diffusers(make, videos):
    references = read_references(videos / TINY)
    assert len(references) == 2
    for reference in references:
        clip = make(**reference.request)
        assert video_agreement(reference.frames, clip.frames) >= MIN_PSNR_DB["fp32"]
        assert len(clip.step_s) == 4 and min(clip.step_s) > 0 < clip.vae_decode_s
    assert 20 < prompt_distance(references) < MIN_PSNR_DB["fp32"] - 2, "the gate would notice another prompt"


def test_a_reference_of_another_clip(tmp_path):
    folder = export_model(TINY, out=tmp_path, reference=3, reference_clip="frames=9, steps=1,height=16,width=32")
    references = read_references(folder)
    assert [r.request["seed"] for r in references] == [0, 0, 1] and references[0].request["num_inference_steps"] == 1
    assert references[0].frames.shape == (9, 16, 32, 3)
    assert (
        video_agreement(references[0].frames, references[2].frames) < 25
        and prompt_distance(references[1:]) == -math.inf
    )


@pytest.mark.parametrize("words", ["frames", "frames=0", "frames=-1", "pace=3", "steps=8.5"])
def test_a_reference_clip_that_makes_no_sense(tmp_path, words):
    with pytest.raises(UserError, match=f"--reference-clip has '{words}'; give frames, steps, height, width"):
        export_model(TINY, out=tmp_path, reference=1, reference_clip=words)
    assert not list(tmp_path.iterdir())


def test_a_reference_clip_that_would_not_be_served(tmp_path):
    with pytest.raises(UserError, match="--reference-clip cannot be served: num_frames is 5; it must be 8 k"):
        export_model(TINY, out=tmp_path, reference=1, reference_clip="frames=5")
    assert not [path for path in tmp_path.iterdir() if not path.name.startswith(".")]


def test_a_language_model_has_no_clip(tmp_path):
    with pytest.raises(UserError, match="phi-2-tiny is none; leave it out"):
        export_model("phi-2-tiny", out=tmp_path, reference=1, reference_clip="steps=2")
    assert not list(tmp_path.iterdir())


def test_drawn_frames_are_a_picture_and_follow_seed_prompt_and_guidance(make):
    clip = make(seed=3).frames
    assert clip.shape == (9, 32, 48, 3) and clip.std() > 15
    assert ((clip == 0) | (clip == 255)).mean() < 0.2, "not clipped"
    assert clip.std(axis=0).mean() > 2, "frames differ from each other"
    assert np.array_equal(clip, make(seed=3).frames)
    for other in ({"seed": 4}, {"seed": 3, "text_input": "a cat"}, {"seed": 3, "guidance_scale": 1.0},
                  {"seed": 3, "negative_prompt": "rain"}):  # fmt: skip
        assert video_agreement(clip, make(**other).frames) < MIN_PSNR_DB["fp32"] - 2, other  # the gate would notice


@pytest.mark.parametrize("frames", [1, 17])
def test_a_clip_has_the_frames_that_were_asked_for(make, frames):
    assert make(num_frames=frames, num_inference_steps=1, height=16, width=32).frames.shape == (frames, 16, 32, 3)


def test_a_step_cache_is_other_work(make):
    exact, cached = make(seed=1), make({"step_cache": "first_block", "step_cache_threshold": 10.0}, seed=1)
    assert video_agreement(exact.frames, cached.frames) < 60


def test_tiling_decodes_the_same_clip(make):
    size = {"seed": 1, "height": 96, "width": 96, "num_inference_steps": 1}
    plain, tiled = make(**size).frames, make({"vae_tiling": True}, **size).frames
    assert 12 < video_agreement(plain, tiled) < 60  # not equal: group norms see a tile, and edges are blended


def test_the_transformer_is_exported_for_tensorrt(runtime, videos):
    """What TensorRT would be given: torch.export's program computes what the eager transformer does."""
    import torch

    engine_module, trt = runtime("video_engine"), runtime("video_tensorrt")
    folder = videos / TINY / "1"
    settings = engine_module.read_settings(folder, {})
    pipe = engine_module.Engine(folder / "weights", settings, "cpu").pipe
    program, inputs = trt.export_transformer(pipe, settings)
    with torch.no_grad():
        expected, found = trt.Denoiser(pipe.transformer)(*inputs), program.module()(*inputs)
        assert found.shape == (2, 3, 8, 4, 6)
        torch.testing.assert_close(found, expected)
        stand_in = trt.EngineTransformer(program.module(), pipe.transformer, inputs)
        pipe.transformer = stand_in
        assert stand_in(inputs[0], inputs[1], inputs[2], inputs[3:], attention_kwargs=None)[0].shape == found.shape
        with pytest.raises(ValueError, match="was built for latents"):
            stand_in(inputs[0][:1], inputs[1], inputs[2], inputs[3:])


def test_tensorrt_is_refused_without_a_gpu_or_its_package(tmp_path, make):
    with pytest.raises(UserError, match="needs a GPU"):
        export_model(TINY, backend="tensorrt", device="cpu", out=tmp_path)
    pytest.importorskip("torch")
    with pytest.raises(ValueError, match="pip install torch-tensorrt"):
        make({"transformer_mode": "tensorrt"})


def test_mp4_and_sheet_hold_the_frames(runtime):
    import av
    from PIL import Image

    output = runtime("video_output")
    frames = np.zeros((9, 32, 48, 3), np.uint8)
    frames[:, :, 24:] = np.linspace(0, 255, 9).astype(np.uint8)[:, None, None, None]
    with av.open(io.BytesIO(output.mp4(frames, 8))) as container:
        decoded = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
        assert container.streams.video[0].average_rate == 8
    assert decoded.shape == frames.shape and video_agreement(frames, decoded) > 25
    sheet = Image.open(io.BytesIO(output.sheet(frames)))
    assert sheet.size == (4 * 96, 2 * 64)
    assert Image.open(io.BytesIO(output.sheet(frames[:1]))).size == (96, 64)


@pytest.mark.live
def test_a_clip_streams_its_steps_and_then_the_video(video_server):
    *steps, last = post(video_server, text_input="a kite", seed=1, stream=True, num_inference_steps=3)
    assert [(r["step"], r["steps"]) for r in steps] == [(0, 3), (1, 3), (2, 3), (3, 3)]
    assert all(r["step_s"] > 0 and "finish_reason" not in r for r in steps)
    assert last["finish_reason"] == "complete" and last["num_output_frames"] == 9 and last["work"] == "exact"
    assert last["denoise_s"] == pytest.approx(sum(r["step_s"] for r in steps[1:]))
    assert last["peak_memory_bytes"] > 1e6 and last["vae_decode_s"] > 0 < last["text_encode_s"]
    assert base64.b64decode(last["video"]).startswith(b"\xff\xd8")


@pytest.mark.live
def test_outputs_and_the_reference(video_server, videos):
    for reference in read_references(videos / TINY):
        (answer,) = post(video_server, "generate", **reference.request, output="tensor")
        assert video_agreement(reference.frames, frames_of(answer)) >= MIN_PSNR_DB["fp32"]
    (movie,) = post(video_server, "generate", text_input="a kite", output="mp4", num_inference_steps=1)
    assert b"ftyp" in base64.b64decode(movie["video"])[:16]
    (nothing,) = post(video_server, "generate", text_input="a kite", output="none", num_inference_steps=1)
    assert "video" not in nothing and "frames" not in nothing and nothing["num_output_frames"] == 9


@pytest.mark.live
@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "text_input is missing"),
        ({"text_input": "x", "num_frames": 10}, "num_frames is 10"),
        ({"text_input": "x", "height": 481}, "height is 481"),
        ({"text_input": "word " * 400}, "the model reads 226"),
        ({"text_input": "x", "output": "gif"}, "choose one of"),
    ],
)
def test_bad_requests_leave_the_server_alive(video_server, fields, message):
    for endpoint in ("generate", "generate_stream"):
        (answer,) = post(video_server, endpoint, **fields)
        assert message in answer["error"]
    assert post(video_server, "generate", text_input="x", num_inference_steps=1)[0]["num_output_frames"] == 9


def metrics(server):
    text = urllib.request.urlopen(server.metrics_url, timeout=10).read().decode()
    rows = [line for line in text.splitlines() if line.startswith("tritonmark_")]
    return {row.split("{")[0]: float(row.rsplit(" ", 1)[1]) for row in rows}


def wait_for(condition, seconds=20):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.05)


@pytest.mark.live
def test_a_closed_connection_ends_the_clip_between_two_steps(video_server):
    time.sleep(0.6)
    before = metrics(video_server)
    body = json.dumps({"text_input": "go on", "num_frames": 25, "height": 96, "width": 96, "num_inference_steps": 50,
                       "stream": True}).encode()  # fmt: skip
    head = f"POST /v2/models/{TINY}/generate_stream HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
    with socket.create_connection(("127.0.0.1", video_server.http_port)) as connection:
        connection.sendall(head.encode() + body)
        received = b""
        while b'"step":1' not in received.replace(b" ", b""):
            received += connection.recv(4096)
    name = "tritonmark_requests_cancelled_total"
    wait_for(lambda: metrics(video_server).get(name, 0) == before.get(name, 0) + 1)
    assert post(video_server, "generate", text_input="x", num_inference_steps=1)[0]["num_output_frames"] == 9
    wait_for(lambda: metrics(video_server)["tritonmark_requests_running"] == 0)
    after = metrics(video_server)
    assert after["tritonmark_denoise_steps_total"] - before.get("tritonmark_denoise_steps_total", 0) < 50


@pytest.mark.live
def test_many_at_once_come_one_after_the_other(video_server):
    wait_for(lambda: metrics(video_server)["tritonmark_requests_running"] == 0)
    time.sleep(0.6)  # what was counted before is published by then
    before = metrics(video_server).get("tritonmark_videos_total", 0)
    with concurrent.futures.ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(
            lambda n: post(video_server, text_input=f"clip {n}", num_inference_steps=1, stream=bool(n % 2)), range(24)
        ))  # fmt: skip
    assert {str(responses[-1].get("finish_reason", responses[-1])) for responses in answers} == {"complete"}
    assert video_server.exit_reason() is None
    assert max(responses[-1]["queue_s"] for responses in answers) > 0.1
    wait_for(lambda: metrics(video_server)["tritonmark_videos_total"] == before + 24)


@pytest.mark.live
@pytest.mark.slow
def test_torch_compile_serves_the_same_video_and_starts_faster_again(videos, tmp_path):
    from exporters.server import TritonServer

    folder = export_model(TINY, backend="torch-compile", out=tmp_path, reference=2)
    seconds = []
    for _ in range(2):
        with TritonServer(tmp_path, log_path=tmp_path / "log", ready_timeout_s=240) as running:
            seconds.append(running.ready_s)
            for reference in read_references(folder):
                (answer,) = post(running, "generate", **reference.request, output="tensor")
                assert video_agreement(reference.frames, frames_of(answer)) >= MIN_PSNR_DB["fp32"]
    assert (folder / "1/compile-cache").is_dir()
    print(f"ready after {seconds} s")
    assert seconds[1] < seconds[0]
