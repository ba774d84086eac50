"""docker-compose.yml and deploy/ without a container engine: schema, ports, hardening, secrets, every setting documented."""

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

jsonschema = pytest.importorskip("jsonschema")
yaml = pytest.importorskip("yaml")

ROOT = Path(__file__).parents[2]
BASE = ROOT / "docker-compose.yml"
OVERRIDES = sorted((ROOT / "deploy").glob("*.yml"))
OVERRIDES = [p for p in OVERRIDES if p.name != "prometheus.yml"]
SCHEMA = json.loads((ROOT / "tests/deploy/compose-spec.json").read_text())
VALIDATOR = jsonschema.Draft7Validator
VARIABLE = re.compile(r"\$\{(\w+)(?::([-?])([^}]*))?\}")
SET = {"BIND": "10.0.0.9", "LOCUST_PASSWORD": "x", "TRITON_URL": "http://h:8000", "DCGM_URL": "http://h:9400",
       "GRAFANA_ADMIN_PASSWORD": "x", "MASTER_HOST": "central"}  # fmt: skip
COMPOSE = shutil.which("docker-compose")
PROFILES = ["gpu", "cpu", "gpu-host", "central", "load"]


def document(path, **settings):
    """The file as Compose reads it: variables replaced by `settings` or their defaults, then YAML with its anchors."""
    text = VARIABLE.sub(lambda m: settings.get(m[1], m[3] if m[2] == "-" else ""), path.read_text())
    return yaml.safe_load(text)


def _services():
    for path in [BASE, ROOT / "deploy/per-gpu.yml"]:
        for name, service in document(path)["services"].items():
            yield pytest.param(service, id=f"{path.stem}-{name}")


@pytest.mark.parametrize("path", [BASE, *OVERRIDES], ids=lambda p: p.name)
def test_files_follow_the_compose_specification(path):
    VALIDATOR(SCHEMA).validate(document(path, **SET))


def test_the_schema_refuses_a_mistake():
    with pytest.raises(jsonschema.ValidationError):
        VALIDATOR(SCHEMA).validate({"services": {"a": {"imagee": "x"}}})


@pytest.mark.parametrize("path", [BASE, *OVERRIDES], ids=lambda p: p.name)
def test_ports_are_on_loopback_unless_set(path):
    text = path.read_text()
    for name, service in (document(path)["services"]).items():
        for port in service.get("ports", []):
            assert str(port).startswith(("127.0.0.1:", ":")), (name, port)
    published = re.findall(r'"([^"\n]*):\d+:\d+"', text)
    assert all(re.fullmatch(r"\$\{BIND:(-127\.0\.0\.1|\?[^}]+)\}", p) for p in published), published


@pytest.mark.parametrize("service", list(_services()))
def test_services_are_hardened(service):
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert not service.get("privileged")
    assert "network_mode" not in service and "pid" not in service and "ipc" not in service
    assert not any("docker.sock" in str(v) for v in service.get("volumes", []))
    if "dcgm-exporter" in service["image"]:
        assert service["cap_add"] == ["SYS_ADMIN"]
    else:
        assert "cap_add" not in service
        assert service["user"].split(":")[0] not in ("", "0", "root")


@pytest.mark.parametrize("service", list(_services()))
def test_images_are_pinned(service):
    tag = service["image"].rsplit(":", 1)
    assert len(tag) == 2 and "latest" not in tag[1] and re.search(r"\d", tag[1])


def test_models_are_mounted_read_only_where_they_are_served():
    for name, service in document(BASE)["services"].items():
        mounts = [v for v in service.get("volumes", []) if ":/models" in v]
        assert all(v.endswith(":ro") for v in mounts) or name == "export"


def _tritons():
    yield document(BASE)["services"]["triton"]
    yield document(ROOT / "deploy/per-gpu.yml")["services"]["triton-gpu3"]


@pytest.mark.parametrize("triton", list(_tritons()), ids=["base", "per-gpu"])
def test_compiled_code_and_hub_files_outlive_the_container(triton):
    """The caches that the image names lie in volumes which its user may write."""
    dockerfile = (ROOT / "docker/triton.Dockerfile").read_text()
    caches = re.findall(r"(?:XDG_CACHE_HOME|\w+_CACHE_DIR)=(\S+)", dockerfile)
    mounts = [volume.split(":")[1:] for volume in triton["volumes"]]
    assert len(caches) == 3 and all(path.split("/")[1] == "cache" for path in caches)
    assert ["/cache"] in mounts and ["/hub"] in mounts
    assert "install -d -m 1777 /cache /hub" in dockerfile
    named = {volume.split(":")[0] for volume in triton["volumes"]}
    assert named <= set(document(BASE)["volumes"])


@pytest.mark.parametrize("triton", list(_tritons()), ids=["base", "per-gpu"])
def test_triton_starts_as_an_export_says(triton):
    assert triton["command"][:3] == ["python3", "/opt/docker/serve.py", "tritonserver"]
    assert triton["environment"]["MODEL"] == "phi-2-tiny"


def test_no_secret_has_a_value():
    for path in [BASE, *OVERRIDES, ROOT / ".env.example"]:
        for line in path.read_text().splitlines():
            if match := re.search(r"(\w*(?:PASSWORD|TOKEN|SECRET)\w*)\s*[:=]\s*(.*)", line.split("#")[0]):
                value = match[2].strip()
                assert value in ("", '""') or re.match(r"\$\{\w+:(\?|-\})", value), line
    assert ".env" in (ROOT / ".gitignore").read_text().split()


def test_every_setting_is_explained_with_its_default():
    told = dict(re.findall(r"^(\w+)=(.*)$", (ROOT / ".env.example").read_text(), re.M))
    used = {}
    for path in [BASE, *OVERRIDES]:
        for name, kind, text in VARIABLE.findall(path.read_text()):
            used.setdefault(name, set())
            if kind == "-":
                used[name].add(text)
    assert set(used) <= set(told)
    assert set(told) - set(used) <= {"COMPOSE_PROFILES"}
    for name, defaults in used.items():
        assert defaults <= {told[name]}, name


def test_one_server_per_gpu_has_ports_and_gpu_of_its_own():
    found = document(ROOT / "deploy/per-gpu.yml")["services"]
    for k in range(8):
        service = found[f"triton-gpu{k}"]
        device = service["deploy"]["resources"]["reservations"]["devices"][0]
        assert device["device_ids"] == [str(k)] and "count" not in device
        assert [p.split(":")[1] for p in service["ports"]] == [str(8000 + 10 * k + j) for j in range(3)]


@pytest.mark.skipif(not COMPOSE, reason="needs docker-compose")
@pytest.mark.parametrize("override", [None, *OVERRIDES], ids=lambda p: p.name if p else "base")
@pytest.mark.parametrize("profile", PROFILES)
def test_docker_compose_takes_every_profile_and_override(profile, override):
    files = ["-f", str(BASE)] + (["-f", str(override)] if override else [])
    done = subprocess.run(
        [COMPOSE, *files, "--profile", profile, "config"], capture_output=True, text=True, cwd=ROOT,
        env={"PATH": os.environ["PATH"], **SET}, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    jsonschema_ready = yaml.safe_load(done.stdout)
    assert jsonschema_ready["services"]


@pytest.mark.skipif(not COMPOSE, reason="needs docker-compose")
@pytest.mark.parametrize(("override", "missing"), [("central", "LOCUST_PASSWORD"), ("central", "GRAFANA_ADMIN_PASSWORD"),
                                                   ("central", "BIND"), ("gpu-host", "BIND"), ("load-host", "BIND")])  # fmt: skip
def test_open_hosts_refuse_to_start_without_what_protects_them(override, missing):
    env = {"PATH": os.environ["PATH"], **{k: v for k, v in SET.items() if k != missing}}
    command = [COMPOSE, "-f", str(BASE), "-f", str(ROOT / f"deploy/{override}.yml"), "config"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=env, check=False)
    assert done.returncode != 0 and f"set {missing} in .env" in done.stderr


HUB = {"HF_TOKEN", "HF_ENDPOINT", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY"}


@pytest.mark.parametrize("service", list(_services()))
def test_whatever_has_the_hubs_cache_has_its_token_mirror_and_proxies(service):
    """A gated model was once refused with "set HF_TOKEN" while no container could get it."""
    downloads = any(str(volume).endswith(":/hub") for volume in service.get("volumes", []))
    told = set(service.get("environment") or {})
    assert told >= HUB if downloads else not told & {"HF_TOKEN"}


def test_a_token_reaches_the_container_and_no_image():
    for path in (BASE, ROOT / "deploy/per-gpu.yml"):
        for name, service in document(path, HF_TOKEN="hf_x")["services"].items():
            text = json.dumps({k: v for k, v in service.items() if k != "environment"})
            assert "hf_x" not in text, name
    for dockerfile in (ROOT / "docker").glob("*.Dockerfile"):
        assert "HF_TOKEN" not in dockerfile.read_text()


def documented():
    """Every `docker compose` command line of the documents and of the files that say how they are started."""
    paths = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), BASE, *OVERRIDES]
    found = {line for p in paths for line in re.findall(r"docker compose [^`#\n]*", p.read_text())}
    return sorted(line.strip() for line in found if re.search(r" (up|run)\b", line))


@pytest.mark.parametrize("line", documented())
def test_every_image_of_ours_that_a_documented_command_starts_is_built_by_it(line):
    words = line.split()
    files = [ROOT / words[k + 1] for k, word in enumerate(words) if word in ("-f", "--file")] or [BASE]
    profiles = {words[k + 1] for k, word in enumerate(words) if word == "--profile"} or set(PROFILES)
    services = {}
    for path in files:
        for name, service in document(path, **SET)["services"].items():
            services[name] = services.get(name, {}) | service
    named = words[words.index("run") + 1 :] if "run" in words else []
    started = {n: s for n, s in services.items() if profiles & set(s.get("profiles", profiles)) or n in named}
    assert started
    for name, service in started.items():
        if service["image"].startswith("tritonmark/"):
            assert (ROOT / service["build"]["dockerfile"]).is_file(), name
