"""The part of compose_test.sh that talks to the composed services: login, one run, Prometheus, history.

`compose_check.py RESULTS "SERVICES"` ends with 1 and one line when something is not as promised.
"""

from __future__ import annotations

import http.cookiejar
import json
import os
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

LOCUST, PROMETHEUS, HISTORY = "http://127.0.0.1:8089", "http://127.0.0.1:9090", "http://127.0.0.1:9465"
# The client shares this machine with everything else: lateness of its own is an honest reason to be INVALID.
EXCUSED = {"client_late", "client_lag", "client_cpu"}
RUN = {"user_count": 2, "spawn_rate": 2, "host": "http://triton:8000", "model": "phi-2-tiny", "scenario": "server",
       "preset": "smoke", "target_qps": 4, "run_time": "15s"}  # fmt: skip


class Failed(Exception):  # noqa: N818
    """A promise that was not kept."""


def main(results: Path, services: set[str]) -> None:
    page = login()
    wait("two workers", lambda: len(page_json(page, "/stats/requests")["workers"]) == 2, 120)
    if "prometheus" in services:
        wait("targets of services up", lambda: all_up(expected_jobs(services) - {"tritonmark"}), 60)
    answer = post(page, "/swarm", RUN)
    if not json.loads(answer)["success"]:
        raise Failed(f"Locust refused the run: {answer}")
    if "prometheus" in services:
        wait("every target up while the run goes on", lambda: all_up(expected_jobs(services)), 14)
        print(f"targets up: {', '.join(targets())}")
    run = wait("a sealed run", lambda: next(results.rglob("run.json"), None), 120)
    check_run(run)
    if "prometheus" in services:
        found = wait("the run's requests in Prometheus", lambda: query("sum(tritonmark_client_requests_total)"), 20)
        print(f"Prometheus counted {found} requests")
    if "history" in services:
        wait("the sealed run in history", lambda: "tritonmark_sealed_" in get(f"{HISTORY}/metrics"), 60)
        print("history serves the run")


def login() -> urllib.request.OpenerDirector:
    """A browser that has logged in, after the page was refused without login and with a wrong password."""
    stranger = urllib.request.build_opener(urllib.request.HTTPCookieProcessor(http.cookiejar.CookieJar()))
    for attempt in (None, "wrong"):
        if attempt:
            post(stranger, "/login-submit", {"username": "tritonmark", "password": attempt})
        with stranger.open(f"{LOCUST}/stats/requests", timeout=10) as answer:
            if "/login" not in answer.url:
                raise Failed(f"Locust's page is open without login (password {attempt!r})")
    page = urllib.request.build_opener(urllib.request.HTTPCookieProcessor(http.cookiejar.CookieJar()))
    post(page, "/login-submit", {"username": "tritonmark", "password": os.environ["LOCUST_PASSWORD"]})
    page_json(page, "/stats/requests")
    print("login: refused without and with a wrong password, taken with the right one")
    return page


def check_run(path: Path) -> None:
    """VALID, or INVALID for reasons of the client alone; two workers' rows; a label."""
    document = json.loads(path.read_text())
    verdict, owner = document["verdict"], path.stat().st_uid
    print(f"sealed in {path.parent.relative_to(path.parents[5])}: {verdict['headline']}")
    print(f"hardware {document['hardware']['label']!r}, {document['records']['rows']} records")
    codes = {reason["code"] for reason in verdict["reasons"]}
    if not verdict["valid"] and not codes <= EXCUSED:
        raise Failed(f"the run is INVALID for {sorted(codes - EXCUSED)}: {verdict}")
    if len(document["audit"]["workers"]) != 2:
        raise Failed(f"the run had not two workers: {document['audit']}")
    if owner != int(os.environ["RUN_UID"]):
        raise Failed(f"the run belongs to user {owner}, not to RUN_UID")


def expected_jobs(services: set[str]) -> set[str]:
    return {"triton", "tritonmark"} | ({"tritonmark-history"} if "history" in services else set())


def all_up(jobs: set[str]) -> bool:
    """Every active target is up, and every job of `jobs` has one; the load test has three: a master and two workers."""
    found = targets()
    enough = all(any(t.startswith(f"{job} ") for t in found) for job in jobs)
    return enough and all(t.endswith(" up") for t in found) and (
        "tritonmark" not in jobs or sum(t.startswith("tritonmark ") for t in found) == 3
    )  # fmt: skip


def targets() -> list[str]:
    active = json.loads(get(f"{PROMETHEUS}/api/v1/targets?state=active"))["data"]["activeTargets"]
    return sorted(f"{t['labels']['job']} {t['labels']['instance']} {t['health']}" for t in active)


def query(expression: str) -> str | None:
    url = f"{PROMETHEUS}/api/v1/query?{urllib.parse.urlencode({'query': expression})}"
    result = json.loads(get(url))["data"]["result"]
    return result[0]["value"][1] if result else None


def wait(what: str, ready: Any, limit_s: float) -> Any:
    """The first true answer of `ready`; a Failed with the last state after `limit_s` seconds."""
    until, last = time.monotonic() + limit_s, None
    while time.monotonic() < until:
        try:
            if answer := ready():
                return answer
        except (OSError, ValueError, KeyError) as error:
            last = error
        time.sleep(0.5)
    state = targets() if "target" in what else last
    raise Failed(f"{what}: not in {limit_s:g} s ({state})")


def get(url: str) -> str:
    with urllib.request.urlopen(url, timeout=10) as answer:
        return answer.read().decode()


def post(page: urllib.request.OpenerDirector, path: str, form: dict[str, Any]) -> str:
    with page.open(LOCUST + path, urllib.parse.urlencode(form).encode(), timeout=30) as answer:
        return answer.read().decode()


def page_json(page: urllib.request.OpenerDirector, path: str) -> Any:
    with page.open(LOCUST + path, timeout=10) as answer:
        return json.loads(answer.read())


if __name__ == "__main__":
    try:
        main(Path(sys.argv[1]), set(sys.argv[2].split()))
    except (Failed, urllib.error.URLError) as error:
        print(f"FAILED: {error}", file=sys.stderr)
        sys.exit(1)
