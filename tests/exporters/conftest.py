"""What the tests of the exporters share: one exported tiny model, one running Triton, and Triton's runtime faked."""

import importlib
import json
import sys
import types
import urllib.request
from pathlib import Path

import numpy as np
import pytest

import exporters

RUNTIME = Path(exporters.__file__).parent / "runtime"


@pytest.fixture(scope="session")
def repository(tmp_path_factory):
    """A model repository with phi-2-tiny, synthetic, fp32."""
    from exporters.export import export_model

    out = tmp_path_factory.mktemp("model_repository")
    export_model("phi-2-tiny", out=out)
    return out


@pytest.fixture(scope="session")
def server(repository, tmp_path_factory):
    from exporters.server import TritonServer

    log = tmp_path_factory.mktemp("log") / "triton.log"
    with TritonServer(repository, log_path=log, ready_timeout_s=120) as running:
        yield running


@pytest.fixture(scope="session")
def runtime():
    """`runtime("llm_text")` imports a runtime module by its bare name, as Triton does."""
    sys.path.insert(0, str(RUNTIME))
    yield importlib.import_module
    sys.path.remove(str(RUNTIME))


@pytest.fixture(scope="session")
def ask(server):
    """`ask(field=value, ...)` posts to generate_stream and returns the list of responses, errors included."""

    def post(endpoint="generate_stream", model="phi-2-tiny", **fields):
        url = f"{server.http_url}/v2/models/{model}/{endpoint}"
        request = urllib.request.Request(url, json.dumps(fields).encode())
        try:
            body = urllib.request.urlopen(request, timeout=60).read()
        except urllib.error.HTTPError as error:
            body = error.read()
        if not body.startswith(b"data:"):
            return [json.loads(body)]
        return [json.loads(event.removeprefix(b"data:")) for event in body.split(b"\n\n") if event.strip()]

    return post


@pytest.fixture(scope="session")
def metrics(server):
    """`metrics()` reads the runtime's own metrics as {name: value}."""

    def read():
        text = urllib.request.urlopen(server.metrics_url, timeout=10).read().decode()
        rows = [line for line in text.splitlines() if line.startswith("tritonmark_")]
        return {row.split("{")[0]: float(row.rsplit(" ", 1)[1]) for row in rows}

    return read


class FakeSender:
    """Collects what a request is answered with."""

    def __init__(self):
        self.responses, self.final, self.cancelled = [], 0, False

    def send(self, response=None, flags=0):
        self.responses.append(response)
        self.final += flags

    def is_cancelled(self):
        return self.cancelled


class FakeTensor:
    def __init__(self, name, values):
        self._name, self._values = name, values

    def name(self):
        return self._name

    def as_numpy(self):
        return self._values


class FakeRequest:
    """A Triton request with `tensors` and `parameters`."""

    def __init__(self, tensors=None, parameters=None):
        self.sender = FakeSender()
        self._tensors = [FakeTensor(name, values) for name, values in (tensors or {}).items()]
        self._parameters = json.dumps(parameters or {})

    def get_response_sender(self):
        return self.sender

    def inputs(self):
        return self._tensors

    def parameters(self):
        return self._parameters


@pytest.fixture
def fake_request():
    def make(parameters=None, **fields):
        tensors = {}
        for name, value in fields.items():
            is_text = isinstance(value, bytes | str)
            raw = value.encode() if isinstance(value, str) else value
            tensors[name] = np.array([raw], dtype=object if is_text else None)
        return FakeRequest(tensors, parameters)

    return make


@pytest.fixture
def fake_triton(monkeypatch):
    """Stands in for triton_python_backend_utils, which exists only inside Triton."""

    class TritonError:
        INVALID_ARG, UNAVAILABLE, INTERNAL = "INVALID_ARG", "UNAVAILABLE", "INTERNAL"

        def __init__(self, message, code):
            self.message, self.code = message, code

    class MetricFamily:
        GAUGE, COUNTER = "GAUGE", "COUNTER"

        def __init__(self, name, description, kind):
            self.name = name

        def Metric(self, labels):  # noqa: N802 (Triton's name)
            return types.SimpleNamespace(set=lambda value: None, increment=lambda value: None)

    module = types.ModuleType("triton_python_backend_utils")
    module.TritonError, module.MetricFamily, module.Tensor = TritonError, MetricFamily, FakeTensor
    module.TRITONSERVER_RESPONSE_COMPLETE_FINAL = 1
    module.InferenceResponse = lambda tensors, error=None: types.SimpleNamespace(tensors=tensors, error=error)
    module.Logger = types.SimpleNamespace(log_info=print, log_error=print)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return module
