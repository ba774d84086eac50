"""Checks that the documents are true: links lead somewhere, commands and options exist, generated tables are fresh.

python docs/check.py            fails, naming each fault
python docs/check.py --write    writes the generated tables anew
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

import click
from click.testing import CliRunner

sys.path.insert(0, str(Path(__file__).parents[1]))

import tritonmark
from exporters.models_table import catalogue_document, memory_document
from loadgen.core.metrics import METRICS
from loadgen.core.record import SCHEMA
from loadgen.edge import hardware_catalogue, history_names
from loadgen.edge.live_names import all_families
from loadgen.edge.options import OPTIONS

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
LINK = re.compile(r"!?\[[^\]]*\]\(([^)#\s]+)(?:#[^)]*)?\)")
COMMAND = re.compile(r"\btritonmark +(.+)")
RUN_ID = re.compile(r"\b\d{8}T\d{6}Z-[0-9a-f]{8}\b")
BLOCK = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)", re.S)


def metrics_table() -> str:
    rows = [f"| `{m.name}` | {m.label} | {m.unit} | {m.better or '–'} | {m.help} | {m.family or 'all'} |"
            for m in METRICS]  # fmt: skip
    return "\n".join(["| name | label | unit | better | meaning | runs |", "|---|---|---|---|---|---|", *rows])


def schema_table() -> str:
    rows = [f"| `{c.name}` | {c.type} | {c.meaning} |" for c in SCHEMA]
    return "\n".join(["| column | type | meaning |", "|---|---|---|", *rows])


def options_table() -> str:
    rows = [f"| `{o.flag}` | {o.default if o.default is not None else ''} | {o.help} |" for o in OPTIONS]
    return "\n".join(["| option | default | meaning |", "|---|---|---|", *rows])


def live_table() -> str:
    rows = [f"| `{f.name}` | {f.kind} | {', '.join(f.labels) or '–'} | {f.help} |" for f in all_families()]
    return "\n".join(["| name | type | more labels | meaning |", "|---|---|---|---|", *rows])


def history_table() -> str:
    rows = [f"| `{f.name}` | {', '.join(f.labels) or '–'} | {f.help} |" for f in history_names.families()]
    return "\n".join(["| name | more labels | meaning |", "|---|---|---|", *rows])


def generations() -> str:
    """`tritonmark compare` of the runs that docs/generations.md names: `results` may hold others by now."""
    named = set(RUN_ID.findall((ROOT / "docs" / "generations.md").read_text(encoding="utf-8")))
    folders = sorted(str(p.parent) for p in (ROOT / "results").rglob("run.json") if p.parent.name in named)
    done = CliRunner().invoke(tritonmark.cli, ["compare", *folders, "--format", "markdown"])
    if done.exit_code:
        raise SystemExit(f"docs/generations.md: {done.output}{done.exception}")
    return done.output.strip()


TABLES = {
    "generations": generations,
    "live": live_table,
    "history": history_table,
    "gpus": hardware_catalogue.markdown,
    "metrics": metrics_table,
    "schema": schema_table,
    "options": options_table,
    "models": catalogue_document,
    "memory": memory_document,
}


def links(path: Path, text: str) -> list[str]:
    targets = [t for t in LINK.findall(text) if not t.startswith(("http://", "https://"))]
    return [f"{path.name}: broken link {t}" for t in targets if not (path.parent / t).exists()]


def commands(path: Path, text: str) -> list[str]:
    """Every `tritonmark …` in a code block must name a command, and options that the command has."""
    faults = []
    for block in re.findall(r"```(?:bash|sh|console)\n(.*?)```", text, re.S):
        for line in COMMAND.findall(block.replace("\\\n", " ")):
            name, *words = line.split("#")[0].split()
            command = tritonmark.cli.commands.get(name)
            if command is None:
                faults.append(f"{path.name}: no command `tritonmark {name}`")
                continue
            if isinstance(command, click.Group):  # `tritonmark import mlperf`
                sub = words[0] if words else ""
                if sub not in command.commands:
                    faults.append(f"{path.name}: no command `tritonmark {name} {sub}`")
                    continue
                name, command = f"{name} {sub}", command.commands[sub]
            known = {o for p in command.params if isinstance(p, click.Option) for o in (*p.opts, *p.secondary_opts)}
            used = {w.split("=")[0] for w in words if w.startswith("--")}
            faults += [f"{path.name}: `tritonmark {name}` has no {o}" for o in sorted(used - known - {"--help"})]
    return faults


def fresh(path: Path, text: str, write: bool) -> list[str]:
    new = BLOCK.sub(lambda m: f"{m[1]}{TABLES[m[2]]()}\n{m[3]}", text)
    if new == text:
        return []
    if write:
        path.write_text(new, encoding="utf-8")
        return []
    return [f"{path.name}: a generated table is stale; run python docs/check.py --write"]


def main() -> int:
    write = "--write" in sys.argv
    faults = []
    for path in DOCUMENTS:
        text = path.read_text(encoding="utf-8")
        faults += links(path, text) + commands(path, text) + fresh(path, text, write)
    everything = "\n".join(p.read_text(encoding="utf-8") for p in DOCUMENTS)
    faults += [f"undocumented command: tritonmark {c}" for c in tritonmark.cli.commands
               if f"tritonmark {c}" not in everything]  # fmt: skip
    print("\n".join(faults) or f"{len(DOCUMENTS)} documents are true")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
