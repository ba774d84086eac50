"""The committed dashboards: fresh, readable by the SDK and by Grafana's own schema, and nothing left unsaid."""

import copy
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

jsonschema = pytest.importorskip("jsonschema")
yaml = pytest.importorskip("yaml")
sdk = pytest.importorskip("grafana_foundation_sdk")

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "grafana" / "dashboards").glob("*.json"))
SCHEMA = json.loads((Path(__file__).parent / "grafana-schema.json").read_text())
SOURCE = {"type": "prometheus", "uid": "${datasource}"}
# Fields that Grafana 12.1's dashboard type does not name, and why they are there.
UNNAMED = {
    "templating": {"definition", "auto", "auto_min", "auto_count"},  # Grafana writes the first; the SDK always the others
    "annotations": {"placement", "expr", "step", "titleFormat", "useValueForTime"},  # the last four are Prometheus' own
}  # fmt: skip


def read(path):
    return json.loads(path.read_text())


def panels(document):
    return [p for p in document["panels"] if p["type"] != "row"]


boards = pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)


def test_there_are_three_of_them_and_they_are_fresh():
    assert [p.stem for p in FILES] == ["fleet", "generations", "live"]
    done = subprocess.run(
        [sys.executable, "-m", "grafana", "--check"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_the_check_names_what_is_stale(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", "import sys; sys.argv = ['grafana', '--check']; import pathlib, grafana.__main__ as m;"
         f" m.FOLDER = pathlib.Path({str(tmp_path / 'a' / 'dashboards')!r}); sys.exit(m.main())"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 1 and "live.json" in done.stderr and "python -m grafana" in done.stderr


@pytest.mark.filterwarnings("ignore:Prefer using dashboardv2")  # which Grafana 12.1 does not read by default
@boards
def test_the_sdk_reads_what_it_wrote(path):
    from grafana_foundation_sdk.cog.encoder import JSONEncoder
    from grafana_foundation_sdk.cog.plugins import register_default_plugins
    from grafana_foundation_sdk.models.dashboard import Dashboard

    register_default_plugins()
    document = read(path)
    again = json.loads(json.dumps(Dashboard.from_json(copy.deepcopy(document)), cls=JSONEncoder))
    for link in again["links"]:
        link.pop("placement")  # the SDK's default, which hides the link: not in the file
    assert again == document


@boards
def test_grafanas_own_types_take_it(path):
    document = read(path)
    for panel in panels(document):
        kind = panel["type"]
        assert f"{kind}-Options" in SCHEMA
        jsonschema.Draft7Validator(SCHEMA[f"{kind}-Options"]).validate(panel["options"])
        if f"{kind}-FieldConfig" in SCHEMA:
            custom = panel["fieldConfig"]["defaults"].get("custom", {})
            jsonschema.Draft7Validator(SCHEMA[f"{kind}-FieldConfig"]).validate(custom)
    for place, names in UNNAMED.items():
        found = document.get(place) or []
        for item in found["list"]:
            for name in names:
                item.pop(name, None)
    jsonschema.Draft7Validator(SCHEMA["dashboard"]).validate(document)


def test_the_schema_refuses_a_mistake():
    document = read(FILES[0])
    document["panels"][1]["gridPos"]["width"] = 3
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.Draft7Validator(SCHEMA["dashboard"]).validate(document)


@boards
def test_no_panel_lies_on_another_and_ids_are_unique(path):
    taken = {}
    for panel in read(path)["panels"]:
        at = panel["gridPos"]
        assert at["x"] >= 0 and at["x"] + at["w"] <= 24 and at["h"] > 0 and at["w"] > 0, panel["title"]
        for cell in ((x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])):
            assert cell not in taken, f"{panel['title']!r} lies on {taken[cell]!r}"
            taken[cell] = panel["title"]
    ids = [p["id"] for p in read(path)["panels"]]
    assert len(set(ids)) == len(ids)


@boards
def test_every_panel_says_what_it_is_and_in_which_unit(path):
    for panel in panels(read(path)):
        assert panel["targets"], panel["title"]
        assert len(panel["description"]) > 20 and panel["description"].endswith("."), panel["title"]
        assert panel["fieldConfig"]["defaults"]["unit"], panel["title"]
        assert panel["datasource"] == SOURCE
        assert [t["datasource"] for t in panel["targets"]] == [SOURCE] * len(panel["targets"])
        refs = [t["refId"] for t in panel["targets"]]
        assert len(set(refs)) == len(refs)
        assert all(t.get("instant", False) != t.get("range", False) for t in panel["targets"]), panel["title"]


@boards
def test_nothing_is_editable_and_every_variable_is_known(path):
    document = read(path)
    assert document["editable"] is False and document["uid"].startswith("tritonmark-") and "id" not in document
    known = {v["name"] for v in document["templating"]["list"]} | {"__rate_interval", "__range"}
    texts = [t["expr"] for p in panels(document) for t in p["targets"]]
    texts += [json.dumps(v["query"]) for v in document["templating"]["list"]]
    for text in texts:
        assert set(re.findall(r"\$\{?(\w*[a-z]\w*)", text)) <= known, text
    assert all(v.get("description") for v in document["templating"]["list"])


DECIDES = {"model", "scenario", "load", "weights", "preset", "backend", "precision"}  # what makes work another work


def dropped(expr: str) -> set[str]:
    """Labels on which the work depends, that some aggregation of a query over sealed runs neither keeps nor fixes."""
    fixed = set(re.findall(r'(\w+)="\$', expr))
    joined = {m[1]: set(re.findall(r"\w+", m[2])) for m in re.finditer(r'"(\w+)", "[ ,]+", ("[^)]*")\)', expr)}
    missing = set()
    for labels in re.findall(r"\b(?:avg|max|min|sum|count|topk)\b(?: by \(([^)]*)\))?", expr):
        kept = set(re.findall(r"\w+", labels))
        kept |= set().union(*(joined.get(label, set()) for label in kept))
        missing |= set() if "run" in kept else DECIDES - kept - fixed
    return missing


def test_no_aggregation_over_sealed_runs_drops_what_the_work_depends_on():
    """256 requests in flight against 64 once stood on the board as a gain of the compiler."""
    for panel in panels(read(ROOT / "grafana/dashboards/generations.json")):
        for target in panel["targets"]:
            assert not dropped(target["expr"]), panel["title"]


@pytest.mark.parametrize(
    ("expr", "missing"),
    [
        ('max by (model, scenario, backend, precision) (x{model=~"$model"})', {"load", "weights", "preset"}),
        ("avg(x)", DECIDES),
        ('avg by (row, backend, precision) (label_join(x{model="$m", scenario="$s", load="$l"}, "row", ", ", "gpu"))',
         {"weights", "preset"}),
        ("max by (run) (x)", set()),
    ],
)  # fmt: skip
def test_a_dropped_label_is_found(expr, missing):
    assert dropped(expr) == missing


def test_the_live_dashboard_has_every_live_metric():
    from loadgen.edge.live_names import all_families

    text = " ".join(t["expr"] for p in panels(read(ROOT / "grafana/dashboards/live.json")) for t in p["targets"])
    text += json.dumps(read(ROOT / "grafana/dashboards/live.json")["annotations"])
    untold = {"tritonmark_client_workers",  # the lines of the health row are the workers
              "tritonmark_worker_cpu_seconds_total",  # its rate is tritonmark_worker_cpu_ratio
              "tritonmark_gpu_energy_joules_total",  # for the sealed energy; power is shown
              "tritonmark_gpu_memory_clock_hertz"}  # fmt: skip
    missing = {f.name for f in all_families() if not re.search(rf"\b{f.name}(_bucket)?\b", text)}
    assert missing == untold


def test_grafana_is_given_the_source_and_the_folder_that_the_dashboards_name():
    (source,) = yaml.safe_load((ROOT / "grafana/provisioning/datasources/prometheus.yml").read_text())["datasources"]
    chosen = {v["current"]["value"] for p in FILES for v in read(p)["templating"]["list"] if v["type"] == "datasource"}
    assert chosen == {source["uid"]} and source["type"] == "prometheus" and source["url"] == "${PROMETHEUS_URL}"
    (provider,) = yaml.safe_load((ROOT / "grafana/provisioning/dashboards/tritonmark.yml").read_text())["providers"]
    compose = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]["grafana"]
    assert f"./grafana/dashboards:{provider['options']['path']}:ro" in compose["volumes"]
    assert "PROMETHEUS_URL" in compose["environment"]
