"""The web page's form: an untouched field is the option's default, a wrong one is said on the page and loses nothing."""

import json
import re
import socket
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from argparse import Namespace
from importlib.util import find_spec
from pathlib import Path

import pytest

from loadgen.edge import store
from loadgen.edge.options import DEFAULT, OPTIONS

ROOT = Path(__file__).parents[3]
RULES = (r"replace(/_([a-z0-9])/g,", r"replace(/([a-z0-9])([A-Z0-9])/g,`$1_$2`).toLowerCase()")


def in_locust(code):
    """What `code` prints in a process of its own: importing Locust patches threads."""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_the_pages_own_scripts_rename_fields_by_the_rules_that_we_undo():
    (package,) = find_spec("locust").submodule_search_locations  # importing it would patch the threads of this process
    folder = Path(package) / "webui/dist/assets"
    scripts = "".join(path.read_text(errors="ignore") for path in folder.glob("*.js"))
    assert all(rule in scripts for rule in RULES)


def test_every_option_is_found_under_the_name_that_the_page_posts():
    names = in_locust("import json; from loadgen.edge.web_form import posted_name as p; from loadgen.edge.options import"
                      " OPTIONS; print(json.dumps({o.dest: p(o.dest) for o in OPTIONS}))")  # fmt: skip
    assert names["e2e_ms"] == "e_2e_ms" and names["ttft_ms"] == "ttft_ms"
    assert len(set(names.values())) == len(OPTIONS)


def test_a_list_of_choices_without_a_default_offers_default_first():
    for option in OPTIONS:
        if option.choices and option.default is None:
            assert option.form_choices[0] == DEFAULT and option.of(Namespace(**{option.dest: DEFAULT})) is None
        elif option.choices:
            assert DEFAULT not in option.form_choices and option.default in option.form_choices


@pytest.fixture(params=[1, 2], ids=["alone", "two workers"])
def page(request, fake_triton, tmp_path):
    """Locust's page over the fake server; `post` sends what a browser sends for an untouched form, and `fields`."""
    fake_triton.plan({"ttft_ms": 5, "itl_ms": 2})
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        master = free.getsockname()[1]
    workers = ["--processes", "2", "--master-bind-port", str(master), "--master-port", str(master)]
    process = subprocess.Popen(
        [sys.executable, "-m", "locust", "-f", str(ROOT / "loadgen/llm.py"), "--host", fake_triton.url, "--model", "fake",
         "--output-tokens", "4", "--results", str(tmp_path / "results"), "--metrics-port", "off", "--telemetry", "off",
         "--web-host", "127.0.0.1", "--web-port", str(port), *(workers if request.param > 1 else [])],
        cwd=tmp_path, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    base = f"http://127.0.0.1:{port}"

    def ask(path, form=None):
        data = None if form is None else urllib.parse.urlencode(form).encode()
        return urllib.request.urlopen(f"{base}{path}", data, timeout=30).read().decode()

    def until(condition):
        stop = time.monotonic() + 40
        while not condition():
            assert time.monotonic() < stop and process.poll() is None, "it did not happen in time"
            time.sleep(0.2)

    def up():
        try:
            return bool(ask("/")) and (request.param == 1 or json.loads(ask("/worker-count"))["worker_count"] == 2)
        except OSError:
            return False

    until(up)
    shown = json.loads(re.search(r"window\.templateArgs\s*=\s*(\{.*\})", ask("/"))[1])
    extra = shown.get("extraOptions") or shown["extra_options"]

    def post(**fields):
        untouched = {}
        for name, field in extra.items():
            choices, value = field["choices"], field.get("defaultValue", field.get("default_value"))
            untouched[name] = (choices[0] if choices else "") if value is None else value
        form = {"user_count": "1", "spawn_rate": "1", "host": fake_triton.url, "run_time": "2s", **untouched, **fields}
        return json.loads(ask("/swarm", form))

    post.state = lambda: json.loads(ask("/stats/requests"))["state"]
    post.runs = lambda: [store.load(p.parent) for p in sorted((tmp_path / "results").rglob("run.json"))]
    post.until, post.ask = until, ask
    yield post
    process.terminate()
    process.communicate(timeout=60)


@pytest.mark.slow
def test_the_untouched_form_and_a_rate_start_a_run_and_what_is_wrong_loses_nothing(page):
    for field, text, told in [
        ("target_qps", "many", "--target-qps is 'many'; it must be a number, or empty for the default"),
        ("warmup", "1.5", "--warmup is '1.5'; it must be a whole number"),
        ("gpus", "zero", "--gpus"), ("scenario", "servers", "--scenario"), ("benchmark", "mine", "--benchmark"),
        ("model", "no-such", "no-such"), ("prompts", "/no/such.jsonl", "/no/such.jsonl"), ("e_2e_ms", "-1", "e2e"),
        ("host", "http://127.0.0.1:9", "127.0.0.1:9"),
    ]:  # fmt: skip
        answer = page(**{"target_qps": "20", field: text})
        assert not answer["success"] and told in answer["message"] and "\n" not in answer["message"], (field, answer)
    assert not page()["success"], "a rate is needed, and asked for"
    assert not page.runs()
    assert page(target_qps="20", e_2e_ms="4000")["success"]
    page.until(lambda: page.state() == "running")
    assert "a run is under way" in page(target_qps="30")["message"], "Edit changes nothing, and says so"
    page.until(lambda: page.runs() and page.state() == "stopped")
    (run,) = page.runs()
    assert run.scenario.target_qps == 20 and run.scenario.limits.e2e_ns == 4_000_000_000
    assert run.document["overrides"].keys() == {"target_qps", "output_tokens", "e2e_ms", "duration_s"}, (
        "no first choice"
    )
    assert page(target_qps="30")["success"], "a second run, with other fields, and the limit gone"
    page.until(lambda: len(page.runs()) == 2 and page.state() == "stopped")
    second = page.runs()[1].scenario
    assert second.target_qps == 30 and second.limits.e2e_ns is None


def test_a_cleared_number_is_the_commands_own_default():
    told = in_locust("""
import json
from argparse import Namespace
from loadgen.edge.web_form import apply
started = {"telemetry_hz": 5.0, "target_qps": None, "telemetry": "auto", "gpus": "0,1"}
options = Namespace(telemetry_hz=1.0, target_qps=3.0, telemetry="off", gpus="")
apply({"telemetry_hz": "", "target_qps": " ", "telemetry": "", "gpus": ""}, options, started)
print(json.dumps(vars(options)))
""")
    assert told == {"telemetry_hz": 5.0, "target_qps": None, "telemetry": "auto", "gpus": "0,1"}
