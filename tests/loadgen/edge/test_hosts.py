"""The inventory of hosts: what is refused, what Prometheus gets, and which label wins."""

import http.server
import json
import threading
from pathlib import Path

import pytest
from click.testing import CliRunner

from loadgen.edge import hosts
from loadgen.edge.errors import UserError
from loadgen.edge.hosts_cli import hosts as command

PAGE = """# HELP DCGM_FI_DEV_POWER_USAGE power
DCGM_FI_DEV_POWER_USAGE{gpu="0",UUID="GPU-a",device="nvidia0",modelName="NVIDIA H100 80GB HBM3",hostname="x"} 70.1
DCGM_FI_DEV_POWER_USAGE{gpu="1",UUID="GPU-b",device="nvidia1",modelName="NVIDIA H100 80GB HBM3",hostname="x"} 71
DCGM_FI_DEV_SM_CLOCK{gpu="1",UUID="GPU-b",device="nvidia1",modelName="NVIDIA H100 80GB HBM3",hostname="x"} 1980
"""


def write(folder, text):
    path = folder / "hosts.toml"
    path.write_text(text)
    return path


def test_label_counts_each_gpu_once():
    assert hosts.label_of_pages(PAGE) == "2x-NVIDIA H100 80GB HBM3"
    assert hosts.label_of_pages(PAGE.replace('UUID="GPU-b",device="nvidia1",modelName="NVIDIA H100 80GB HBM3"',
                                            'UUID="GPU-b",modelName="NVIDIA A100"')) == (
        "1x-NVIDIA A100 + 1x-NVIDIA H100 80GB HBM3")  # fmt: skip
    assert hosts.label_of_pages("# nothing\n") is None


@pytest.fixture
def dcgm(monkeypatch):
    class Page(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()
            self.wfile.write(PAGE.encode())

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Page)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(hosts, "DCGM_PORT", server.server_port)
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def test_targets_carry_the_probed_label_and_every_triton(tmp_path, dcgm):
    path = write(tmp_path, '[[host]]\nname="a"\naddress="127.0.0.1"\ngpu="a100-sxm-80"\ntritons=2\n')
    out = tmp_path / "deep" / "hosts.json"
    done = CliRunner().invoke(command, ["targets", str(path), "--out", str(out)])
    assert done.exit_code == 0, done.output
    triton, exporter = json.loads(out.read_text())
    labels = {"host": "a", "hardware": "2x-NVIDIA H100 80GB HBM3"}
    assert triton == {"targets": ["127.0.0.1:8002", "127.0.0.1:8012"], "labels": {"job": "triton", **labels}}
    assert exporter["labels"] == {"job": "dcgm", **labels}
    assert list(out.parent.iterdir()) == [out]
    for urls in (dcgm, f"{dcgm},{dcgm}"):  # the same GPUs are counted once
        assert CliRunner().invoke(command, ["label", "--dcgm", urls]).output == "2x-NVIDIA H100 80GB HBM3\n"
    assert hosts.label_of_pages(*[PAGE.replace("UUID", "uuid")] * 2) == "4x-NVIDIA H100 80GB HBM3"
    urls = CliRunner().invoke(command, ["urls", str(path)]).output
    assert urls == "http://127.0.0.1:8000,http://127.0.0.1:8010\n"


def test_the_stated_label_is_used_while_the_host_is_silent(tmp_path, monkeypatch):
    monkeypatch.setattr(hosts, "DCGM_PORT", 1)
    path = write(tmp_path, '[[host]]\nname="a"\naddress="127.0.0.1"\ngpu="8x-NVIDIA H200"\nprice_per_gpu_hour=3\n')
    shown = CliRunner().invoke(command, ["show", str(path)]).output
    assert "8x-NVIDIA H200 (as stated" in shown
    printed = CliRunner().invoke(command, ["prices", str(path)]).output
    assert "h200-sxm = 3" in printed and "[per_gpu_hour]" in printed


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "has no"),
        ("[[host]]\nname='a'\n", "has no address"),
        ("[[host]]\nname='a'\naddress='h:80'\n", "without port"),
        ("[[host]]\nname='a b'\naddress='h'\n", "a name is made of"),
        ("[[host]]\nname='a'\naddress='h'\nprice='3'\n", "unknown key 'price'"),
        ("[[host]]\nname='a'\naddress='h'\ntritons=0\n", "at least 1"),
        ("[[host]]\nname='a'\naddress='h'\n[[host]]\nname='a'\naddress='i'\n", "two hosts have the name"),
        ("[[host]\n", "not TOML"),
    ],
)
def test_a_bad_inventory_is_one_clear_line(tmp_path, text, message):
    with pytest.raises(UserError, match=message) as raised:
        hosts.read(write(tmp_path, text))
    assert "\n" not in str(raised.value)


def test_the_example_is_good():
    assert [h.name for h in hosts.read(Path("deploy/hosts.example.toml")).hosts] == ["h100-a", "h100-b"]


GPU_PAGE = b'# HELP nv_gpu_power_usage GPU power usage in watts\nnv_gpu_power_usage{gpu_uuid="GPU-1"} 300\n'


@pytest.mark.parametrize(("page", "code"), [(GPU_PAGE, 2), (b"# HELP nv_inference_count x\nnv_inference_count 1\n", 0)])
def test_a_triton_with_gpus_is_never_labelled_as_this_machine(page, code):
    """Triton's own page: two ports above HTTP; without --dcgm the label once was the CPU's of the load host."""

    class Page(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()
            self.wfile.write(page)

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Page) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port - 2}"
        done = CliRunner().invoke(command, ["label", "--triton", url], standalone_mode=False)
        server.shutdown()
    assert isinstance(done.exception, UserError) if code else done.output.strip()
    if code:
        assert f"{url.rsplit(':', 1)[0]}:{server.server_port}/metrics reports GPUs" in str(done.exception)
