"""Load a text-to-video model that Triton serves, under an MLPerf scenario.

    locust -f loadgen/video.py --host http://127.0.0.1:8000 --model cogvideox-5b-tiny \
        --scenario single_stream --run-time 30s --headless

What each request asks for is the model's clip; change it with `--clip steps=8,frames=9`.
"""

import sys
from pathlib import Path

if (checkout := str(Path(__file__).resolve().parents[1])) not in sys.path:
    sys.path.append(checkout)  # it need not be installed, and Locust may be started from any folder

from loadgen.edge.openloop import IdleUser


class VideoUser(IdleUser):
    """Keeps Locust's user count above zero; the scenario decides when requests are sent."""

    family = "video"
