"""`python -m grafana` writes dashboards/*.json; `python -m grafana --check` fails when they are stale."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from grafana_foundation_sdk.cog.encoder import JSONEncoder

from grafana import fleet, generations, live
from grafana.panels import board

FOLDER = Path(__file__).parent / "dashboards"
BOARDS = {"live": live.BOARD, "generations": generations.BOARD, "fleet": fleet.BOARD}


def main() -> int:
    """0 when all is fresh or written, 1 when --check found something stale."""
    check, stale = "--check" in sys.argv[1:], []
    for name, spec in BOARDS.items():
        path = FOLDER / f"{name}.json"
        text = json.dumps(board(spec), cls=JSONEncoder, indent=1, sort_keys=True, ensure_ascii=False) + "\n"
        if check and (not path.exists() or path.read_text(encoding="utf-8") != text):
            stale.append(str(path.relative_to(FOLDER.parents[1])))
        elif not check:
            path.write_text(text, encoding="utf-8")
    if stale:
        print(f"stale: {', '.join(stale)}; run python -m grafana and commit what it writes", file=sys.stderr)
        return 1
    print(f"{len(BOARDS)} dashboards are {'fresh' if check else 'written'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
