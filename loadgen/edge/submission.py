"""`tritonmark submission RUN...`: sealed runs → the folder tree that MLCommons' submission checker reads (v6.x).

    DIR/<division>/<submitter>/systems/<system>.json, src/, model_mapping.json (open)
    DIR/<division>/<submitter>/results/<system>/<benchmark>/<Scenario>/
        performance/run_1/mlperf_log_*   accuracy/*   measurements.json   user.conf   README.md

The tree has MLPerf's format; a result made without LoadGen is not an MLPerf result, and every file says so. Nothing
about accuracy is made up: without a real accuracy run the tree is written, and said to be incomplete.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from loadgen.core.scenario import Kind, Seeds
from loadgen.edge import comparison, store
from loadgen.edge.errors import UserError
from loadgen.edge.mlperf_log import FILES, notice, write_logs
from loadgen.edge.mlperf_run import view
from loadgen.edge.scenarios import DATA
from loadgen.edge.store import Run

MUST_SAY = (
    "status", "system_name", "number_of_nodes", "host_processor_model_name", "host_processors_per_node",
    "host_processor_core_count", "host_memory_capacity", "host_memory_configuration", "host_storage_capacity",
    "host_storage_type", "host_networking", "host_network_card_count", "host_networking_topology",
    "accelerators_per_node", "accelerator_model_name", "accelerator_memory_capacity",
    "accelerator_host_interconnect", "accelerator_memory_configuration", "accelerator_interconnect", "cooling",
    "framework", "operating_system", "other_software_stack", "system_type",
)  # fmt: skip
MAY_BE_EMPTY = (
    "host_processor_frequency", "host_processor_caches", "host_processor_interconnect", "accelerator_frequency",
    "accelerator_interconnect_topology", "accelerator_on-chip_memories", "hw_notes", "sw_notes", "system_type_detail",
)  # fmt: skip
SYSTEM_TYPES = ("datacenter", "edge", "datacenter,edge", "edge,datacenter")
STATUSES = ("available", "preview", "rdi")
MEASUREMENTS = {
    "input_data_types": "int32",
    "retraining": "no",
    "starting_weights_filename": None,
    "weight_data_types": None,
    "weight_transformations": "none",
}
SAME_FACTS = ("model", "backend", "precision", "weights")  # of an accuracy run and the speed that it stands beside
ACCURACY_FILES = ("accuracy.txt", "mlperf_log_accuracy.json", "mlperf_log_detail.txt")
MOST_ACCURACY_BYTES = 10 * 1024  # the checker's limit; MLCommons' own script keeps 4 kB at each end
KEPT_BYTES = 4 * 1024
# Prompts that the v6.1 checker wants loaded, and its own name of a benchmark where the rules' name differs.
LOADED_SAMPLES = {"llama3.1-8b": 13_368, "llama2-70b": 24_576, "gpt-oss-120b": 6_396, "deepseek-r1": 4_388,
                  "wan-2.2-t2v-a14b": 50, "stable-diffusion-xl": 5_000}  # fmt: skip
CHECKER_NAMES = {"llama2-70b": "llama2-70b-99.9"}
_SCENARIOS = {"single_stream": "SingleStream", "multi_stream": "MultiStream", "server": "Server",
              "interactive": "Interactive", "offline": "Offline"}  # fmt: skip


@click.command()
@click.argument("runs", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--out", required=True, type=click.Path(path_type=Path), help="where the tree goes; must not exist")
@click.option("--submitter", required=True, help="your organisation, also the folder's name")
@click.option("--system", required=True, type=click.Path(path_type=Path), help="system description, JSON or TOML")
@click.option("--division", default="open", show_default=True, type=click.Choice(["open", "closed", "network"]))
@click.option("--accuracy", multiple=True, help="folder of an accuracy run, or SCENARIO=FOLDER; repeatable")
@click.option("--src", type=click.Path(path_type=Path), help="folder with the code of the submission")
@click.option("--allow-invalid", is_flag=True, help="write INVALID runs too, to see the tree")
def submission(runs: tuple[Path, ...], accuracy: tuple[str, ...], allow_invalid: bool, **options: Any) -> None:
    """Write the MLPerf submission tree of sealed runs; exit 3 when something is missing that the checker wants."""
    missing = write_tree([store.load(path) for path in runs], accuracy=parse_accuracy(accuracy),
                         allow_invalid=allow_invalid, **options)  # fmt: skip
    for line in missing:
        click.echo(f"MISSING: {line}")
    click.echo(f"{options['out']}: {len(runs)} results, {notice()}")
    sys.exit(3 if missing else 0)


@dataclass(frozen=True)
class Place:
    """Where one run belongs in the tree."""

    run: Run
    scenario: str
    benchmark: str
    folder: Path


def write_tree(
    runs: list[Run], *, out: Path, submitter: str, system: Path, division: str = "open",
    accuracy: dict[str, Path] | None = None, src: Path | None = None, allow_invalid: bool = False,
) -> list[str]:  # fmt: skip
    """Writes the tree and returns what the checker will miss. Raises UserError before writing anything.

    `accuracy` maps a scenario's name, or "" for all, to the folder of its accuracy run.
    """
    if out.exists() and any(out.iterdir()):
        raise UserError(f"--out {out} is not empty; nothing is overwritten: choose another folder")
    name = folder_name(submitter, "--submitter")
    described = system_facts(system, runs, submitter, division)
    root = out / division / name
    places = [place(run, root / "results" / folder_name(str(described["system_name"]), "system_name")) for run in runs]
    _refuse(places, allow_invalid)
    (root / "systems").mkdir(parents=True)
    store.write_json(root / "systems" / f"{folder_name(described['system_name'], 'system_name')}.json", described)
    _source(root / "src", src)
    if division == "open":
        nearest = {p.benchmark: p.run.scenario.benchmark for p in places}
        store.write_json(root / "model_mapping.json", {k: CHECKER_NAMES.get(v, v) for k, v in nearest.items()})
    missing = []
    for here in places:
        missing += _write_result(here, described, accuracy or {})
    return missing


def place(run: Run, results: Path) -> Place:
    """The folder of a run: open-division names are the model's own, mapped to the nearest MLPerf benchmark."""
    scenario = _SCENARIOS.get(run.scenario.name)
    if scenario is None or run.scenario.kind is Kind.CONCURRENCY:
        raise UserError(f"{run.folder} is a {run.scenario.name} run, which is no MLPerf scenario")
    benchmark = folder_name(str(run.document.get("model") or run.scenario.benchmark), "model")
    return Place(run, scenario, benchmark, results / benchmark / scenario)


def _refuse(places: list[Place], allow_invalid: bool) -> None:
    folders = [p.folder for p in places]
    for here in places:
        if folders.count(here.folder) > 1:
            raise UserError(
                f"two runs of {here.benchmark} {here.scenario}; MLPerf takes one: give the one you stand for"
            )
        if not here.run.valid and not allow_invalid:
            reason = here.run.document["verdict"]["headline"]
            raise UserError(f"{here.run.folder} is {reason}; run it again, or use --allow-invalid to see the tree")


def folder_name(text: str, what: str) -> str:
    """A name that is safe as one folder. Raises UserError otherwise."""
    if not re.fullmatch(r"[A-Za-z0-9][\w.+-]*", text.replace(" ", "_")):
        raise UserError(f"{what} is {text!r}; it names a folder: use letters, digits, dots, dashes and underscores")
    return text.replace(" ", "_")


def system_facts(path: Path, runs: list[Run], submitter: str, division: str) -> dict[str, Any]:
    """The user's file over what was probed when the runs were made. Raises UserError naming every missing key."""
    try:
        text = path.read_text(encoding="utf-8")
        user = tomllib.loads(text) if path.suffix == ".toml" else json.loads(text)
        facts = dict.fromkeys(MAY_BE_EMPTY, "") | probed(runs[0]) | dict(user)
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"cannot read the system description {path}: {error}") from error
    facts |= {"submitter": submitter, "division": division}
    empty = [key for key in MUST_SAY if facts.get(key) in (None, "")]
    if empty:
        raise UserError(f"{path} must say what could not be probed: {', '.join(empty)}")
    for key, allowed in (("status", STATUSES), ("system_type", SYSTEM_TYPES)):
        if str(facts[key]) not in allowed:
            raise UserError(f"{path}: {key} is {facts[key]!r}; choose one of: {', '.join(allowed)}")
    notes = [str(facts["sw_notes"]), notice()]
    return facts | {"sw_notes": "; ".join(n for n in notes if n)}


def probed(run: Run) -> dict[str, Any]:
    """What the sealed run knows of the server's machine and software; nothing when the server was remote."""
    hardware = run.document.get("hardware") or {}
    gpus, cpu = hardware.get("gpus") or [], hardware.get("cpu") or {}
    facts: dict[str, Any] = {"number_of_nodes": "1", "framework": str(run.document.get("backend") or "")}
    if cpu:
        facts |= {"host_processor_model_name": cpu.get("model", ""),
                  "host_processor_core_count": str(cpu.get("cores", "")),
                  "host_memory_capacity": f"{(cpu.get('memory_bytes') or 0) / 2**30:.0f} GiB"}  # fmt: skip
    if gpus:
        facts |= {"accelerators_per_node": str(len(gpus)), "accelerator_model_name": gpus[0].get("name", ""),
                  "accelerator_memory_capacity": f"{gpus[0].get('memory_mib', '')} MiB",
                  "accelerator_frequency": f"{gpus[0].get('max_sm_mhz', '')} MHz"}  # fmt: skip
    elif hardware.get("probed"):
        facts |= {"accelerators_per_node": "0", "accelerator_model_name": "N/A", "accelerator_memory_capacity": "N/A",
                  "accelerator_host_interconnect": "N/A", "accelerator_memory_configuration": "N/A",
                  "accelerator_interconnect": "N/A"}  # fmt: skip
    return facts


def _source(folder: Path, src: Path | None) -> None:
    if src is not None:
        shutil.copytree(src, folder)
        return
    folder.mkdir(parents=True)
    (folder / "README.md").write_text(f"Load generator: Tritonmark. Results are {notice()}.\n")


def _write_result(here: Place, system: dict[str, Any], accuracy: dict[str, Path]) -> list[str]:
    run, folder = here.run, here.folder
    performance = folder / "performance" / "run_1"
    performance.mkdir(parents=True)
    if not all((run.folder / name).is_file() for name in FILES):
        write_logs(run)
    for name in FILES:
        shutil.copyfile(run.folder / name, performance / name)
    measured = MEASUREMENTS | {k: system[k] for k in MEASUREMENTS if system.get(k)}
    measured["starting_weights_filename"] = (
        measured["starting_weights_filename"] or run.document.get("model") or "unknown"
    )
    measured["weight_data_types"] = measured["weight_data_types"] or run.document.get("precision") or "unknown"
    store.write_json(folder / "measurements.json", measured)
    (folder / "user.conf").write_text(user_conf(run))
    (folder / "README.md").write_text(
        f"# {here.benchmark}, {here.scenario}\n\nThis is {notice()}. Run {run.folder.name}: "
        f"{run.document['verdict']['headline']}.\nWeights: {run.document.get('weights', 'not recorded')}.\n"
    )
    given = accuracy.get(here.scenario.lower(), accuracy.get(""))
    missing = _accuracy(given, folder / "accuracy", here)
    if given and not missing:
        with (folder / "README.md").open("a") as readme:
            readme.write(_origin(given, run))
    return missing + shortcomings(here)


def user_conf(run: Run) -> str:
    """LoadGen's user.conf with the settings of this run. The checker wants the file and reads none of it."""
    scenario = run.scenario
    lines = [f"# {notice()}", f"*.{scenario.kind.value}.min_duration = {scenario.minimums.duration_ns // 10**6}",
             f"*.{scenario.kind.value}.min_query_count = {scenario.minimums.queries}"]  # fmt: skip
    if scenario.target_qps:
        lines.append(f"*.{scenario.kind.value}.target_qps = {scenario.target_qps!r}")
    return "\n".join(lines) + "\n"


def shortcomings(here: Place) -> list[str]:
    """What MLPerf's own length asks of this run beyond what it did."""
    lacking = here.run.document["verdict"].get("lacking") or []
    out = [f"{here.scenario}: {reason['code']}: {reason['limit']}" for reason in lacking]
    if not here.run.valid:  # MLCommons' checker reads early_stopping_met and percentiles, not result_validity
        out.append(f"{here.scenario}: a VALID run; this one is {here.run.document['verdict']['headline']}")
    scenario, prompts = here.run.scenario, int(here.run.document.get("prompts", {}).get("count") or 0)
    want = LOADED_SAMPLES.get(scenario.benchmark)
    if want is None:
        out.append(f"{here.scenario}: the v6.1 checker does not know benchmark {scenario.benchmark}")
    elif prompts < want:
        out.append(f"{here.scenario}: {prompts} prompts in the library; {scenario.benchmark} wants {want} (--prompts)")
    if scenario.seeds != round_seeds(scenario.rules):
        out.append(f"{here.scenario}: seeds are not those of {scenario.rules}")
    seen = view(here.run)
    if seen and seen.one_token:
        out.append(f"{here.scenario}: {seen.one_token} answers of one token, each a LoadGen error")
    return out


def round_seeds(name: str) -> Seeds | None:
    """The seeds announced for a round; None for a round this tool does not know."""
    seeds = tomllib.loads((DATA / "mlperf_rounds.toml").read_text()).get(name)
    return Seeds(**seeds) if seeds else None


def parse_accuracy(values: tuple[str, ...]) -> dict[str, Path]:
    """`FOLDER` or `SCENARIO=FOLDER` → {lower-case scenario or "": folder}. Raises UserError on a missing folder."""
    out = {}
    for value in values:
        scenario, _, folder = value.rpartition("=")
        if not Path(folder).is_dir():
            raise UserError(f"--accuracy {value}: {folder} is no folder; give the folder of an accuracy run")
        out[scenario.lower()] = Path(folder)
    return out


def _accuracy(source: Path | None, target: Path, here: Place) -> list[str]:
    """Copies a real accuracy run, its log cut to the checker's size; without one, says what will be missing."""
    if source and (flaw := _flaw(source, here.run)):
        return [f"{here.scenario}: accuracy ({flaw}): the checker will reject this result"]
    absent = [name for name in ACCURACY_FILES if source is None or not (source / name).is_file()]
    if source is None or absent:
        why = f"{source} has no {', '.join(absent)}" if source else "no --accuracy folder was given"
        return [f"{here.scenario}: accuracy/{name} ({why}): the checker will reject this result" for name in absent]
    target.mkdir()
    for path in source.iterdir():
        if path.name in (*ACCURACY_FILES, "mlperf_log_summary.txt"):
            shutil.copyfile(path, target / path.name)
    log = target / "mlperf_log_accuracy.json"
    text = (target / "accuracy.txt").read_text()
    if not re.search(r"^hash=\w+$", text, re.MULTILINE):
        digest = store.sha256(log)
        (target / "accuracy.txt").write_text(text.rstrip("\n") + f"\nhash={digest}\n")
    elif log.stat().st_size > MOST_ACCURACY_BYTES and store.sha256(log) not in text:
        return [f"{here.scenario}: accuracy.txt has the hash of another mlperf_log_accuracy.json"]
    if log.stat().st_size > MOST_ACCURACY_BYTES:
        data = log.read_bytes()
        log.write_bytes(data[:KEPT_BYTES] + b"\n\n...\n\n" + data[-KEPT_BYTES:])
    return []


def _flaw(source: Path, performance: Run) -> str | None:
    """Why a sealed accuracy run cannot stand beside this performance run. None for a folder of bare log files too."""
    if not (source / "run.json").is_file() and not (source / "start.json").is_file():
        return None
    run = store.load(source)
    if why := comparison.why_no_scores(run):
        return f"{source}: {why}"
    if not run.valid:
        return f"{source} is {run.document['verdict']['headline']}"
    want, prompts = LOADED_SAMPLES.get(performance.scenario.benchmark), run.scenario.library_size
    if want and prompts != want:
        return f"{source} answers {prompts} prompts; {performance.scenario.benchmark} has {want}"
    for fact in SAME_FACTS:
        mine, other = run.document.get(fact), performance.document.get(fact)
        if mine != other:
            return f"{source} has {fact} {mine}, the run {performance.folder.name} has {other}"
    if not comparison.has_files(run):
        comparison.write_files(run)
    return None


def _origin(source: Path, performance: Run) -> str:
    """Which run the accuracy comes from, and whether its prompts are those of the performance run."""
    if not (source / "run.json").is_file():
        return ""
    run = store.load(source)
    mine, other = run.document.get("prompts", {}), performance.document.get("prompts", {})
    same = "the prompts of the performance run" if mine.get("sha256") == other.get("sha256") else "other prompts"
    return f"Accuracy: run {run.folder.name}, {mine.get('count')} prompts of {mine.get('source')}: {same}.\n"
