"""An HTML report → a PNG, with a headless Chromium.

python docs/screenshot.py results/report.html docs/images/report.png
python docs/screenshot.py report.html dark.png --dark --height 2400
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars",
         "--disable-background-networking", "--disable-component-update", "--disable-sync")  # fmt: skip


def shoot(page: Path, picture: Path, width: int = 1240, height: int = 1080, dark: bool = False) -> None:
    """Writes `picture`, at two pixels a CSS pixel. Raises RuntimeError where there is no Chromium or no picture."""
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        raise RuntimeError("no chromium found; on Debian: apt-get install chromium")
    with tempfile.TemporaryDirectory(prefix="screenshot-") as profile:
        command = [browser, *FLAGS, f"--user-data-dir={profile}", f"--window-size={width},{height}",
                   "--force-device-scale-factor=2", "--virtual-time-budget=10000",
                   f"--screenshot={picture.resolve()}"]  # fmt: skip
        command += ["--blink-settings=preferredColorScheme=0"] if dark else ["--blink-settings=preferredColorScheme=1"]
        done = subprocess.run([*command, page.resolve().as_uri()], capture_output=True, text=True, timeout=120)
    if done.returncode or not picture.is_file():
        raise RuntimeError(f"chromium made no picture of {page}: {done.stderr[-500:]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("page", type=Path)
    parser.add_argument("picture", type=Path)
    parser.add_argument("--width", type=int, default=1240)
    parser.add_argument("--height", type=int, default=1080)
    parser.add_argument("--dark", action="store_true")
    options = parser.parse_args()
    try:
        shoot(options.page, options.picture, options.width, options.height, options.dark)
    except RuntimeError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
