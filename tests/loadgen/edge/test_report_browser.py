"""The HTML report in a real headless Chromium."""

import re
import shutil
import subprocess

import pytest
from fabricated import fabricate

from loadgen.edge import report_html

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
         "--disable-background-networking", "--disable-component-update", "--enable-logging=stderr",
         "--virtual-time-budget=8000", "--host-resolver-rules=MAP * ~NOTFOUND"]  # fmt: skip


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine; CI installs it")
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_plot_is_drawn_and_nothing_complains(tmp_path, scheme):
    runs = [
        fabricate(tmp_path / "a"),
        fabricate(tmp_path / "b", failures=5, error="<script>document.title='x'</script>"),
    ]
    page = tmp_path / "report.html"
    page.write_text(report_html.html(runs), encoding="utf-8")
    command = [CHROMIUM, *FLAGS, f"--user-data-dir={tmp_path / scheme}", "--dump-dom", page.as_uri()]
    command[1:1] = ["--blink-settings=preferredColorScheme=0"] if scheme == "dark" else []
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    dom = done.stdout
    assert not re.findall(r"CONSOLE.*", done.stderr)
    plots = re.split(r'id="run\d-\d"', dom)[1:]
    assert len(plots) == 8
    for plot in plots:
        assert 'class="main-svg"' in plot
        assert re.search(r'<path class="(js-line|point)"[^>]*d="M[^"]{5}', plot), "no data was drawn"
    assert "VALID for preset smoke" in dom and "failed_error" in dom
    assert "<title>x" not in dom
    assert re.search(r"fill: rgb\(230, 232, 235\)" if scheme == "dark" else r"fill: rgb\(28, 30, 33\)", dom)
