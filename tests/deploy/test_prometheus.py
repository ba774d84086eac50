"""Alert rules and Prometheus' configurations, by Prometheus' own tool."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

yaml = pytest.importorskip("yaml")

ROOT = Path(__file__).parents[2]
RULES, TESTS = ROOT / "prometheus/alerts.yml", ROOT / "prometheus/alerts_test.yml"
PROMTOOL = shutil.which("promtool")
needs_promtool = pytest.mark.skipif(not PROMTOOL, reason="promtool is not installed (Debian: prometheus)")


def promtool(*arguments, cwd=ROOT):
    return subprocess.run([PROMTOOL, *map(str, arguments)], cwd=cwd, capture_output=True, text=True, check=False)


def alerts():
    return [r for g in yaml.safe_load(RULES.read_text())["groups"] for r in g["rules"]]


@needs_promtool
def test_the_rules_do_what_their_tests_say():
    done = promtool("test", "rules", TESTS)
    assert done.returncode == 0, done.stdout + done.stderr


@needs_promtool
def test_the_tests_can_fail(tmp_path):
    (tmp_path / "alerts.yml").write_text(
        RULES.read_text().replace("tritonmark_client_workers_lost > 0", "vector(0) > 1")
    )
    (tmp_path / "alerts_test.yml").write_text(TESTS.read_text())
    done = promtool("test", "rules", tmp_path / "alerts_test.yml", cwd=tmp_path)
    assert done.returncode != 0 and "WorkerLost" in done.stdout + done.stderr


def test_every_alert_is_tested_described_and_documented():
    tested = set(re.findall(r"alertname: (\w+)", TESTS.read_text()))
    told = (ROOT / "docs/observe.md").read_text()
    for rule in alerts():
        assert rule["alert"] in tested
        assert f"| `{rule['alert']}` | {rule['labels']['severity']} |" in told
        assert set(rule["annotations"]) == {"summary", "description"}


@needs_promtool
@pytest.mark.parametrize("name", ["prometheus/prometheus.yml", "deploy/prometheus.yml"])
def test_prometheus_takes_the_configuration(name, tmp_path):
    """Compose's names the rules by their place in the container."""
    text = (ROOT / name).read_text().replace("/etc/prometheus/rules/", f"{RULES.parent}/")
    (tmp_path / "prometheus.yml").write_text(text.replace("[alerts.yml]", f"[{RULES}]"))
    done = promtool("check", "config", tmp_path / "prometheus.yml")
    assert done.returncode == 0 and "12 rules found" in done.stdout, done.stdout + done.stderr
    assert yaml.safe_load(text)["rule_files"]
