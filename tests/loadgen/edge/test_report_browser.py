"""The HTML report in a real headless Chromium, driven through chromedriver's own HTTP interface."""

import http.client
import json
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fabricated import fabricate

from loadgen.edge import report_html

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
         "--disable-background-networking", "--disable-component-update", "--window-size=1240,1600")  # fmt: skip
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="no chromium or chromedriver on this machine; CI has them"),
]
DRAWN = """
const figures = JSON.parse(document.getElementById("figures").textContent);
return Object.keys(figures).map(id => [id, figures[id].data.filter(t => t.x.length).length,
    [...document.querySelectorAll(`#${id} .scatterlayer .trace`)]
        .filter(t => t.querySelector("path.js-line[d], path.point[d]")).length]);"""


class Browser:
    """One WebDriver session: `command` for WebDriver's, `cdp` for Chromium's own commands."""

    def __init__(self, port: int, profile: Path) -> None:
        self.port, self.path = port, ""
        wanted = {"browserName": "chrome", "goog:loggingPrefs": {"browser": "ALL", "performance": "ALL"},
                  "goog:chromeOptions": {"binary": CHROMIUM, "args": [*FLAGS, f"--user-data-dir={profile}"]}}  # fmt: skip
        session = self.command("POST", "/session", {"capabilities": {"alwaysMatch": wanted}})
        self.path = f"/session/{session['sessionId']}"

    def command(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        connection.request(method, self.path + path, None if body is None else json.dumps(body))
        value = json.loads(connection.getresponse().read())["value"]
        connection.close()
        assert not (isinstance(value, dict) and "error" in value), value
        return value

    def open(self, page: Path) -> None:
        self.command("POST", "/url", {"url": page.as_uri()})

    def script(self, code: str) -> Any:
        return self.command("POST", "/execute/sync", {"script": code, "args": []})

    def cdp(self, name: str, **parameters: Any) -> Any:
        return self.command("POST", "/goog/cdp/execute", {"cmd": name, "params": parameters})

    def log(self, kind: str) -> list[dict[str, Any]]:
        return self.command("POST", "/se/log", {"type": kind})


@pytest.fixture(scope="module")
def browser(tmp_path_factory) -> Iterator[Browser]:
    process = subprocess.Popen([DRIVER, "--port=0"], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        lines = (line for line in process.stdout if "successfully on port" in line)
        session = Browser(int(next(lines).rsplit(" ", 1)[1].rstrip(".\n")), tmp_path_factory.mktemp("profile"))
        yield session
        session.command("DELETE", "")
    finally:
        process.terminate()
        process.wait(timeout=20)


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    evil = "<script>document.title='x'</script><img src=http://127.0.0.1:9/ onerror=\"document.title='x'\">"
    runs = [fabricate(folder / "a", label=evil), fabricate(folder / "b", failures=5, error=evil, label=evil),
            fabricate(folder / "c", count=2000, name="offline", label=evil)]  # fmt: skip
    path = folder / "report.html"
    path.write_text(report_html.html(runs), encoding="utf-8")
    return path


def test_every_trace_is_drawn_and_nothing_complains(browser, page):
    browser.open(page)
    drawn = browser.script(DRAWN)
    assert [name for name, _, _ in drawn] == ["distributions", "time0", "time1", "time2"]
    assert all(wanted > 0 and wanted == seen for _, wanted, seen in drawn), drawn
    assert [entry for entry in browser.log("browser") if entry["level"] in ("WARNING", "SEVERE")] == []
    text = browser.script("return document.body.innerText")
    assert "2 of 3 runs VALID" in text and "failed_error" in text
    assert "<script>document.title" in text  # shown as text, not run
    assert browser.script("return document.title").endswith("Tritonmark")


def test_the_page_asks_for_nothing_but_itself(browser, page):
    browser.log("performance")
    browser.open(page)
    events = [json.loads(entry["message"])["message"] for entry in browser.log("performance")]
    asked = [e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"]
    assert asked == [page.as_uri()]


def test_an_injected_script_would_not_run(browser, page):
    browser.open(page)
    run = "const s = document.createElement('script'); s.textContent = 'window.hit = 1'; document.body.append(s);"
    assert browser.script(f"{run} return window.hit ?? 0") == 0


def test_plots_follow_the_colour_scheme(browser, page):
    browser.open(page)
    seen = {}
    for scheme in ("light", "dark"):
        browser.cdp("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        for _ in range(50):
            seen[scheme] = browser.script(
                "return [getComputedStyle(document.body).backgroundColor,"
                " document.querySelector('#time0 .scatterlayer .js-line').style.stroke]"
            )
            if scheme == "light" or seen["dark"][1] != seen["light"][1]:
                break
            time.sleep(0.1)
    assert seen == {
        "light": ["rgb(255, 255, 255)", "rgb(0, 114, 178)"],
        "dark": ["rgb(20, 23, 26)", "rgb(86, 180, 233)"],
    }
