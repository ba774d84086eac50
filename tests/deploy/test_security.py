"""No secrets in what is published, Dockerfiles as hadolint wants them, and nothing that listens beyond this machine.

Compose files are checked by test_compose.py, Kubernetes' by test_kubernetes.py, the running stack by compose_test.sh.
"""

import re
import subprocess
import sys
import time
import urllib.request
from pathlib import Path, PurePath

import psutil
import pytest
from detect_secrets import SecretsCollection
from detect_secrets.settings import transient_settings

from exporters.export import export_model

ROOT = Path(__file__).parents[2]
LLM = str(ROOT / "loadgen" / "llm.py")
TRITONMARK = [sys.executable, "-c", "import tritonmark; tritonmark.main()"]
# What has the form of a secret. High entropy is left out: hashes of revisions, prompts and files are no secrets.
KINDS = ("AWSKeyDetector", "AzureStorageKeyDetector", "BasicAuthDetector", "GitHubTokenDetector", "GitLabTokenDetector",
         "JwtTokenDetector", "KeywordDetector", "NpmDetector", "OpenAIDetector", "PrivateKeyDetector", "PypiTokenDetector",
         "SlackDetector", "StripeDetector")  # fmt: skip


def published():
    """Every file that git knows or would add; of sealed measurements all but the rows."""
    found = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    names = found.stdout.splitlines() or [str(p.relative_to(ROOT)) for p in ROOT.rglob("*") if p.is_file()]
    return [ROOT / n for n in names if not n.startswith((".venv/", "build/")) and not n.endswith(".parquet")]


IGNORED = (ROOT / ".dockerignore").read_text().split("\n")


def left_out(path):
    """Whether .dockerignore leaves a file of the folders that it lets in out again, by one of its last lines."""
    patterns = [rule[3:] for rule in IGNORED if rule.startswith("**/")]
    return any(PurePath(part).match(pattern) for part in path.relative_to(ROOT).parts for pattern in patterns)


def build_context():
    """Files that `docker build` sends along, those that git ignores included."""
    roots = [ROOT / rule[1:] for rule in IGNORED if rule.startswith("!")]
    files = (f for root in roots for f in ([root] if root.is_file() else root.rglob("*")) if f.is_file())
    return [f for f in files if not left_out(f)]


def secrets(path):
    collection = SecretsCollection()
    with transient_settings({"plugins_used": [{"name": name} for name in KINDS]}):
        collection.scan_file(str(path))
    return [f"{path}:{secret.line_number} {secret.type}" for _, secret in collection]


def test_no_file_of_the_project_has_a_secret():
    found = [line for path in published() if path.is_file() for line in secrets(path)]
    own = Path(__file__).name  # it names what it looks for
    assert [line for line in found if own not in line] == []
    of_hub = re.compile(rb"\bhf_[A-Za-z]{30,}")  # the one kind that the scanner does not know
    assert [path.name for path in published() if path.is_file() and of_hub.search(path.read_bytes())] == []


def test_build_contexts_have_no_more_than_the_repository():
    known = set(published())
    assert [str(path) for path in build_context() if path not in known] == []
    assert {"load.sh", "pyproject.toml"} <= {path.name for path in build_context()}


@pytest.mark.parametrize("name", ["docker/.env", "docker/.env.local", "loadgen/site.pem", "exporters/data/token.key"])
def test_private_files_stay_out_of_build_contexts(name):
    assert left_out(ROOT / name) and not left_out(ROOT / "docker/load.sh")


def test_the_scanner_sees_one(tmp_path):
    (tmp_path / "a.py").write_text("key = 'AKIA" + "IOSFODNN7ABCDEFG'\npassword = 'correct" + "horse'\n")
    assert len(secrets(tmp_path / "a.py")) == 2


@pytest.mark.parametrize("path", sorted((ROOT / "docker").glob("*.Dockerfile")), ids=lambda p: p.name)
def test_hadolint_has_no_complaint(path):
    hadolint = Path(sys.executable).with_name("hadolint")
    done = subprocess.run([str(hadolint), "--no-color", str(path)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")


def test_hadolint_sees_a_mistake(tmp_path):
    (tmp_path / "Dockerfile").write_text("FROM debian\nRUN sudo apt-get install curl\n")
    hadolint = Path(sys.executable).with_name("hadolint")
    done = subprocess.run([str(hadolint), str(tmp_path / "Dockerfile")], capture_output=True, text=True, check=False)
    assert done.returncode != 0 and "DL3006" in done.stdout and "DL3004" in done.stdout


def listening(process):
    """Addresses on which a process or its children accept connections."""
    found = set()
    for one in (me := psutil.Process(process.pid), *me.children(recursive=True)):
        try:
            found |= {
                (c.laddr.ip.removeprefix("::ffff:"), c.laddr.port)
                for c in one.net_connections("inet")
                if c.status == psutil.CONN_LISTEN
            }
        except psutil.NoSuchProcess:
            continue
    return found


def until(condition, process, seconds=90):
    stop = time.monotonic() + seconds
    while time.monotonic() < stop:
        if value := condition():
            return value
        assert process.poll() is None, process.communicate()
        time.sleep(0.2)
    raise AssertionError("it did not happen in time")


def start(command):
    return subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


@pytest.mark.slow
def test_server_load_and_history_listen_on_loopback_only(tmp_path):
    export_model("phi-2-tiny", out=tmp_path / "models")
    results = tmp_path / "results"
    results.mkdir()
    processes = []
    try:
        server = start([*TRITONMARK, "serve", "--repository", str(tmp_path / "models"), "--http-port", "0",
                        "--grpc-port", "0", "--metrics-port", "0"])  # fmt: skip
        processes.append(server)
        url = until(
            lambda: next((w for w in server.stdout.readline().split() if w.startswith("http://")), None), server
        )
        history = start([*TRITONMARK, "history", str(results), "--port", "0"])
        processes.append(history)
        until(lambda: listening(history), history)
        until(lambda: urllib.request.urlopen(f"{url}/v2/health/ready", timeout=5).status == 200, server)
        run = start([*TRITONMARK, "run", "server", "--host", url, "--model", "phi-2-tiny", "--target-qps", "2",
                     "--run-time", "5s", "--processes", "2", "--results", str(results)])  # fmt: skip
        processes.append(run)
        until(lambda: len(listening(run)) >= 4, run)  # the meeting point, and three processes' metrics
        for process, least in ((server, 3), (history, 1), (run, 4)):
            addresses = listening(process)
            assert len(addresses) >= least
            assert {host for host, _ in addresses} <= {"127.0.0.1", "::1"}, addresses
        assert run.wait(90) in (0, 3)
    finally:
        for process in processes:
            process.terminate()
        for process in processes:
            process.wait(60)
