"""deploy/kubernetes, offline: every document against Kubernetes' own schemas, every reference to something that is there.

It was never applied to a cluster. Where a kubectl with kustomize is installed, what it renders is checked too.
"""

import re
import shutil
import subprocess
from pathlib import Path

import kubernetes_validate
import pytest
import yaml

FOLDER = Path(__file__).parents[2] / "deploy" / "kubernetes"
KUSTOMIZATION = yaml.safe_load((FOLDER / "kustomization.yaml").read_text())
VERSION = "1.31"
COMPOSE = yaml.safe_load((FOLDER.parents[1] / "docker-compose.yml").read_text())["services"]


def source():
    return [d for name in KUSTOMIZATION["resources"] for d in yaml.safe_load_all((FOLDER / name).read_text())]


def rendered():
    command = ["kubectl", "kustomize", "--load-restrictor", "LoadRestrictionsNone", str(FOLDER)]
    done = subprocess.run(command, capture_output=True, text=True, check=False) if shutil.which("kubectl") else None
    if done is None or "unknown flag" in done.stderr:
        pytest.skip("no kubectl with kustomize 3.1 or later is installed")
    assert done.returncode == 0, done.stderr
    return list(yaml.safe_load_all(done.stdout))


@pytest.fixture(params=[source, rendered], ids=["source", "rendered"])
def documents(request):
    return request.param()


def pods(documents):
    return {d["metadata"]["name"]: d["spec"]["template"]["spec"] for d in documents if d["kind"] == "Deployment"}


def containers(documents):
    return [
        (name, c) for name, pod in pods(documents).items() for c in (*pod.get("initContainers", []), *pod["containers"])
    ]


def test_documents_follow_kubernetes_schemas(documents):
    assert len(documents) > 10
    for document in documents:
        kubernetes_validate.validate(document, VERSION, strict=True)


def test_files_of_config_maps_exist():
    for entry in KUSTOMIZATION["configMapGenerator"]:
        for name in (*entry.get("files", []), *entry.get("envs", [])):
            assert (FOLDER / name).is_file(), name


def test_pods_are_hardened(documents):
    for pod in pods(documents).values():
        assert pod["securityContext"]["runAsNonRoot"] and pod["automountServiceAccountToken"] is False
        assert not {"hostNetwork", "hostPID", "hostIPC"} & pod.keys()
        assert pod["enableServiceLinks"] is False  # LOCUST_MASTER_… of a service's address is no setting of Locust
        assert not any("hostPath" in volume for volume in pod["volumes"])
    for name, container in containers(documents):
        context = container["securityContext"]
        assert context["readOnlyRootFilesystem"] and not context["allowPrivilegeEscalation"], name
        assert context["capabilities"] == {"drop": ["ALL"]} and "privileged" not in context
        assert container["resources"]["requests"] and container["resources"]["limits"]["memory"]
        for variable in container.get("env", []):
            secret = re.search(r"PASSWORD|TOKEN", variable["name"])
            assert not secret or "secretKeyRef" in variable["valueFrom"], variable["name"]
    assert not any(d["kind"] == "Secret" for d in documents)


def test_nothing_is_open_to_the_outside(documents):
    assert all(d["spec"].get("type", "ClusterIP") == "ClusterIP" for d in documents if d["kind"] == "Service")
    assert not any(d["kind"] == "Ingress" for d in documents)
    (policy,) = (d for d in documents if d["kind"] == "NetworkPolicy")
    assert policy["spec"]["ingress"] == [{"from": [{"podSelector": {}}]}] and policy["spec"]["podSelector"] == {}


def test_every_reference_is_kept(documents):
    names = {kind: {d["metadata"]["name"] for d in documents if d["kind"] == kind}
             for kind in ("ConfigMap", "PersistentVolumeClaim")}  # fmt: skip
    names["ConfigMap"] = names["ConfigMap"] or {e["name"] for e in KUSTOMIZATION["configMapGenerator"]}
    for name, pod in pods(documents).items():
        volumes = {v["name"]: v for v in pod["volumes"]}
        for volume in volumes.values():
            if "configMap" in volume:
                assert volume["configMap"]["name"] in names["ConfigMap"]
            if "persistentVolumeClaim" in volume:
                assert volume["persistentVolumeClaim"]["claimName"] in names["PersistentVolumeClaim"]
        for container in (*pod.get("initContainers", []), *pod["containers"]):
            assert {m["name"] for m in container["volumeMounts"]} <= volumes.keys(), name
            assert all(s["configMapRef"]["name"] in names["ConfigMap"] for s in container.get("envFrom", []))
            ports = {p["name"] for p in container.get("ports", [])}
            for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
                check = container.get(probe, {})
                assert (check.get("httpGet") or check.get("tcpSocket") or {"port": None})["port"] in {*ports, None}
    for service in (d for d in documents if d["kind"] == "Service"):
        pod = pods(documents)[service["spec"]["selector"]["app"]]
        open_ports = {p["containerPort"] for c in pod["containers"] for p in c.get("ports", [])}
        assert {p["port"] for p in service["spec"]["ports"]} <= open_ports


def test_it_runs_what_compose_runs(documents):
    """Names that Prometheus and the load look up, images, and Triton's own options."""
    assert {"triton", "history", "prometheus", "grafana", "locust-master"} <= {
        d["metadata"]["name"] for d in documents if d["kind"] == "Service"
    }
    of = dict(containers(documents))
    asked = [w for w in COMPOSE["triton"]["command"] if "${" not in w]
    assert of["triton"]["command"] == asked[:3] and set(asked[3:]) <= set(of["triton"]["args"])
    for name in ("prometheus", "grafana"):
        assert of[name]["image"] == re.search(r":-([^}]+)}", COMPOSE[name]["image"])[1]
    for image, tag in ((i["name"], i["newTag"]) for i in KUSTOMIZATION["images"]):
        assert tag in (FOLDER.parents[1] / "docker-compose.yml").read_text(), image


def test_compiled_code_outlives_the_pod(documents):
    pod = pods(documents)["triton"]
    (mount,) = (m for m in dict(containers(documents))["triton"]["volumeMounts"] if m["mountPath"] == "/cache")
    (volume,) = (v for v in pod["volumes"] if v["name"] == mount["name"])
    assert volume["persistentVolumeClaim"] and not mount.get("readOnly")
    assert pod["securityContext"]["fsGroup"] == pod["securityContext"]["runAsUser"]  # so that it may write there


def test_a_busy_triton_is_not_killed(documents):
    triton = dict(containers(documents))["triton"]
    for probe in ("readinessProbe", "livenessProbe"):
        assert triton[probe]["timeoutSeconds"] >= 10 and triton[probe].get("failureThreshold", 3) >= 3


def test_settings_are_those_of_compose():
    given = {line.split("=")[0] for line in (FOLDER / "settings.env").read_text().splitlines()}
    known = (FOLDER.parents[1] / ".env.example").read_text() + "PROMETHEUS_URL="
    assert all(f"{name}=" in known for name in given)
