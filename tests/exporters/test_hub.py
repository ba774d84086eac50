"""Real weights: a hub that refuses, each time in one line that says what to do, and one that gives."""

import dataclasses
import errno
import http.server
import json
import re
import socket
import threading
from types import SimpleNamespace

import pytest

from exporters import export as export_module
from exporters import hub
from exporters.catalogue import find_model
from exporters.errors import UserError
from exporters.export import export_model

constants = pytest.importorskip("huggingface_hub.constants")
MODELS = ("phi-2", "llama-3-70b", "cogvideox-5b")
COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Answers(http.server.BaseHTTPRequestHandler):
    """Answers every request with the server's `status` and `headers`, as the hub does; or gives the files it has."""

    def do_GET(self):
        hub = self.server.hub
        file = hub.files and hub.files / self.path.partition(f"/resolve/{COMMIT}/")[2]
        if file and "/api/models/" in self.path:
            names = [path.relative_to(hub.files).as_posix() for path in hub.files.rglob("*") if path.is_file()]
            tree = [{"type": "file", "path": n, "size": (hub.files / n).stat().st_size, "oid": n} for n in names]
            about = {"id": "some/model", "sha": COMMIT, "siblings": [{"rfilename": name} for name in names]}
            self.reply(200, json.dumps(tree if "/tree/" in self.path else about).encode(), {})
        elif file and file.is_file():
            self.reply(200, file.read_bytes(), {"X-Repo-Commit": COMMIT, "ETag": f'"{file.parent.name}-{file.name}"'})
        elif file:
            self.reply(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})
        else:
            self.reply(hub.status, b"", hub.headers)

    do_HEAD = do_GET  # noqa: N815 (the library's name)

    def reply(self, status, body, headers):
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(body))}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *args):
        pass


def look_at(url, monkeypatch, cache):
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)  # it tries again for 23 s


@pytest.fixture
def fake_hub(monkeypatch, tmp_path):
    """A local server in the hub's place, with an empty cache; set what it answers with."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answers) as server:
        server.hub = SimpleNamespace(status=500, headers={}, files=None)
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        look_at(f"http://127.0.0.1:{server.server_port}", monkeypatch, tmp_path / "cache")
        yield server.hub
        server.shutdown()


def refused(name, out, backend="torch-eager"):
    with pytest.raises(UserError) as caught:
        export_model(name, backend, weights="hub", out=out)
    line = str(caught.value)
    assert "\n" not in line and list(out.iterdir()) == []
    assert line.startswith(f"cannot fetch {find_model(name).hub_id} from the hub: ")
    assert line.endswith("; or use --weights synthetic, or a local folder")
    return line


RESTRICTED = {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access to model x is restricted."}
REFUSALS = {
    "wrong token": (
        401, {"X-Error-Message": "Invalid credentials in Authorization header"}, "HF_TOKEN .*; set a new one from https://"
    ),
    "no token for a gated model": (401, RESTRICTED, "it is gated: accept its licence at https://.* and set HF_TOKEN"),
    "licence not accepted": (403, RESTRICTED, "it is gated: accept its licence at https://huggingface.co/"),
    "no such model": (404, {"X-Error-Code": "RepoNotFound"}, "the hub has no such model, or hides it; .* HF_TOKEN"),
    "no such model, without a token": (
        401, {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Invalid username or password."}, "has no such model"
    ),
    "no such revision": (404, {"X-Error-Code": "RevisionNotFound"}, "the hub has no revision [0-9a-f]{40} of it"),
    "down": (500, {}, "the hub answered with 500: .*; try again later"),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("case", REFUSALS)
def test_a_hub_that_does_not_give(fake_hub, tmp_path, name, case):
    fake_hub.status, fake_hub.headers, message = REFUSALS[case]
    out = tmp_path / "out"
    out.mkdir()
    assert re.search(message, refused(name, out))


@pytest.mark.parametrize("backend", ["vllm", "vllm-python", "torch-compile"])
def test_every_backend_says_it(fake_hub, tmp_path, backend):
    fake_hub.status, fake_hub.headers, _ = REFUSALS["wrong token"]
    (tmp_path / "out").mkdir()
    assert "does not know the token" in refused("phi-2", tmp_path / "out", backend)


@pytest.mark.parametrize("name", MODELS)
def test_no_network(monkeypatch, tmp_path, name):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{closed.getsockname()[1]}"
        look_at(url, monkeypatch, tmp_path / "cache")
        (tmp_path / "out").mkdir()
        line = refused(name, tmp_path / "out")
    assert f"{url} does not answer (" in line and "check the network" in line
    assert ("it is also gated: accept its licence" in line) == (name == "llama-3-70b")


@pytest.mark.parametrize("name", ["phi-2-tiny", "cogvideox-5b-tiny"])
def test_a_hub_that_gives(fake_hub, tmp_path, monkeypatch, name):
    fake_hub.files = export_model(name, out=tmp_path / "given") / "1/weights"
    (fake_hub.files / "model_index.json").write_text("{}")  # of a pipeline
    model = dataclasses.replace(find_model(name), hub_id="some/model", revision=COMMIT)
    monkeypatch.setattr(export_module, "find_model", lambda name: model)
    folder = export_model(name, weights="hub", out=tmp_path / "out")
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["source"] == {"kind": "hub", "hub_id": "some/model", "revision": COMMIT}
    for given in fake_hub.files.rglob("*.safetensors"):
        assert (folder / "1/weights" / given.relative_to(fake_hub.files)).read_bytes() == given.read_bytes()


def test_a_full_disk_is_left_to_the_export(monkeypatch, tmp_path):
    def fill(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", fill)
    with pytest.raises(
        UserError, match=r"the disk is full, nothing was exported to .*\(HF_HOME moves the hub's cache\)"
    ):
        export_model("phi-3.5-moe", weights="hub", out=tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", MODELS)
def test_no_space_in_the_cache(monkeypatch, tmp_path, name):
    monkeypatch.setattr("exporters.disk.shutil.disk_usage", lambda folder: SimpleNamespace(free=1.5e6))
    with pytest.raises(UserError, match=r"needs [0-9.]+ GB, the hub's cache .* has 1\.5 MB free; .*set HF_HOME"):
        hub.require_cache_space(find_model(name))


def test_a_folder_without_weights(tmp_path):
    for name, missing in (("phi-2", "config.json"), ("cogvideox-5b", "transformer")):
        with pytest.raises(UserError, match=f"no {missing} there; pass 'hub', 'synthetic' or a folder of"):
            hub.locate(find_model(name), str(tmp_path))
