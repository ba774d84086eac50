"""The Locust part: options, and the events that start, stop and connect a conductor and its workers.

Locust gives the control plane (command line, web UI, master and workers, messages between them); its users are idle.
A run is driven by one `Conductor` on the master (or only) process and one `LoadWorker` in every worker, which speak
over Locust's own channel: "tritonmark_begin", "_go" and "_stop" go out, "_ready", "_rows" and "_end" come back.

Only this file and the locust files import locust.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import resource
import sys
import time
from argparse import Namespace
from functools import partial
from pathlib import Path
from typing import Any

import gevent
from locust import User, constant, events, runners, task
from locust.argument_parser import LocustArgumentParser
from locust.env import Environment
from locust.runners import STATE_MISSING, MasterRunner, WorkerRunner

from loadgen.core.record import Outcome, Record
from loadgen.core.scenario import Scenario
from loadgen.edge import clocks, comparison, hardware, scenarios, servers, web_form
from loadgen.edge.clients.dialects import dialect_of
from loadgen.edge.conductor import Conductor
from loadgen.edge.errors import UserError
from loadgen.edge.live import Live
from loadgen.edge.live_worker import WorkerHealth
from loadgen.edge.mlperf_log import write_logs
from loadgen.edge.options import OPTIONS, PROGRESS_FD
from loadgen.edge.samples import PromptLibrary
from loadgen.edge.store import return_freed_memory
from loadgen.edge.telemetry import Settings, Telemetry
from loadgen.edge.worker import LoadWorker, never_began

log = logging.getLogger("tritonmark")
runners.MASTER_HEARTBEAT_TIMEOUT = 15  # s until a worker without a master ends; Locust's 60 s would be load for nobody


class IdleUser(User):
    """Locust wants at least one user; requests do not come from users, so this one only waits."""

    abstract = True
    wait_time = constant(1)
    family = "llm"  # which models the locust file is for

    @task
    def idle(self) -> None:
        gevent.sleep(1)


@events.init_command_line_parser.add_listener
def add_options(parser: LocustArgumentParser, **_: Any) -> None:
    """The options of `locust -f loadgen/llm.py`; they appear in the web UI as well."""
    for option in OPTIONS:  # not in a group of their own: Locust would leave those out of the web UI
        parser.add_argument(
            option.flag, type=option.type, default=option.default, choices=option.form_choices, help=option.help
        )


@events.init.add_listener
def connect(environment: Environment, **_: Any) -> None:
    """Registers messages and events once the runner exists. Headless, bad input ends here with exit code 2."""
    claim_resources()
    try:
        live = make_live(environment)
        if not isinstance(environment.runner, MasterRunner):
            Worker(environment, live)  # before this greenlet waits for anything: the master may send already
        control = None if isinstance(environment.runner, WorkerRunner) else Control(environment, live)
        live.open()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(2)
    if control is None:
        return
    if environment.web_ui:
        web_form.attach(environment, control.prepare)
    if environment.parsed_options.headless:
        # Locust's own timer would stop the test while answers are still due, and its stop() walks the whole call
        # stack: 100 ms in which no arrival is stamped. The run ends itself.
        control.run_time, environment.parsed_options.run_time = environment.parsed_options.run_time, None
        try:
            control.prepare()
        except UserError as error:
            print(f"error: {error}", file=sys.stderr, flush=True)
            sys.exit(2)


def make_live(environment: Environment) -> Live:
    """This process's scrape endpoint, also under /metrics of the web UI. Raises UserError."""
    options, runner = environment.parsed_options, environment.runner
    telemetry_settings(options)  # bad ones are refused here
    role = {MasterRunner: "master", WorkerRunner: "worker"}.get(type(runner), "local")
    live = Live(options.metrics_port, options.metrics_bind, Path(options.results), role)
    environment.events.quitting.add_listener(lambda **_: live.close())
    if environment.web_ui:
        environment.web_ui.app.add_url_rule("/metrics", "tritonmark_metrics", live.page)
    return live


def telemetry_settings(options: Namespace) -> Settings:
    """The options of telemetry. Raises UserError."""
    settings = Settings(options.telemetry, options.telemetry_hz, options.gpus, options.server_metrics)
    settings.check()
    return settings


def claim_resources() -> None:
    """As many open sockets as the system allows (a stream is one), and, where it may, a place ahead of the server.

    On a machine that it shares with the server, a client that waits for a core stamps arrivals late.
    """
    return_freed_memory()
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    with contextlib.suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, 0, -10)
        Path("/proc/self/autogroup").write_text("-10")  # between sessions Linux looks at this and not at the above


class Worker:
    """Runs `LoadWorker`s for whoever conducts, in this process."""

    def __init__(self, environment: Environment, live: Live) -> None:
        self.environment, self.runner, self.live = environment, environment.runner, live
        self.load: LoadWorker | None = None
        self.health: WorkerHealth | None = None
        self.greenlet: gevent.Greenlet | None = None
        for kind in ("begin", "ping", "go", "stop"):
            self.runner.register_message(f"tritonmark_{kind}", getattr(self, kind))
        environment.events.quitting.add_listener(self.stop)

    def begin(self, msg: Any, **_: Any) -> None:
        try:
            self.load = LoadWorker(msg.data, self.send, self.fire)
        except UserError as error:
            self.send("end", never_began(msg.data, str(error)))
            return
        self.health = WorkerHealth(self.live, self.load, tuple(msg.data["labels"]))
        self.greenlet = gevent.spawn(self.load.run)

    def ping(self, msg: Any, **_: Any) -> None:
        self.runner.send_message("tritonmark_pong", clocks.answer(msg.data))

    def go(self, msg: Any, **_: Any) -> None:
        if self.load:
            self.load.go.set(msg.data["t0_ns"])

    def stop(self, **_: Any) -> None:
        """Ends the load now; its rows and its "end" still go out."""
        if self.greenlet:
            self.greenlet.kill(timeout=5)

    def send(self, kind: str, data: dict[str, Any]) -> None:
        if kind == "ready":
            self.live.opened.wait(timeout=5)
            data |= {"metrics": self.live.address}
        elif kind == "end" and self.health:
            self.health.stop()
        self.runner.send_message(f"tritonmark_{kind}", data)

    def fire(self, record: Record) -> None:
        """Shows a finished request in Locust's own statistics: latency from due time, rounded as Locust rounds."""
        done = record.done_ns or record.due_ns
        error = None if record.outcome is Outcome.OK else RuntimeError((record.error or "").split(":")[0])
        self.environment.events.request.fire(
            request_type="generate", name="E2E from due", response_time=(done - record.due_ns) / 1e6,
            response_length=record.tokens_out, exception=error, context={},
        )  # fmt: skip
        if record.first_ns is not None:
            first = "start from due" if self.load and self.load.scenario.clip else "TTFT from due"
            self.environment.events.request.fire(
                request_type="generate", name=first, response_time=(record.first_ns - record.due_ns) / 1e6,
                response_length=0, exception=None, context={},
            )  # fmt: skip


class Control:
    """Starts a `Conductor` for every test Locust starts, and ends Locust's test when the run is sealed."""

    def __init__(self, environment: Environment, live: Live) -> None:
        self.environment, self.runner, self.live = environment, environment.runner, live
        self.conductor: Conductor | None = None
        self.finished: gevent.Greenlet | None = None
        self.run_time: float | None = None  # headless; in the web UI it comes with the form
        fd = os.environ.get(PROGRESS_FD)
        self.progress_file = os.fdopen(int(fd), "w", buffering=1) if fd else None
        self.runner.register_message("tritonmark_ready", self.on_ready)
        for kind in ("pong", "rows", "end"):
            self.runner.register_message(f"tritonmark_{kind}", partial(self.deliver, kind))
        environment.events.test_start.add_listener(self.start)
        environment.events.test_stopping.add_listener(self.stop)
        environment.events.quitting.add_listener(self.quit)

    def prepare(self) -> tuple[Scenario, dict[str, Any]]:
        """The resolved scenario and all that is known of server, model and hardware. Raises UserError."""
        options: Namespace = self.environment.parsed_options
        telemetry_settings(options)
        overrides = {o.override: o.of(options) for o in OPTIONS if o.override}
        overrides["duration_s"] = seconds(options.run_time or self.run_time)
        scenario = scenarios.resolve(options.scenario, options.model, options.preset, overrides)
        library = PromptLibrary(scenario.prompts, scenario)
        scenario = scenarios.sized(scenario, len(library))
        comparison.check(scenario, library.texts)
        family = getattr(self.environment.user_classes[0], "family", scenario.family)
        if family != scenario.family:
            made = {"llm": "text: use loadgen/llm.py", "video": "video: use loadgen/video.py"}[scenario.family]
            raise UserError(f"{options.model} makes {made}")
        host = self.environment.host
        server, several, self.turns = servers.ask(host, options.model, options.split)
        parameters = server.pop("parameters")
        exported = {k.removeprefix("tritonmark."): v for k, v in parameters.items() if k.startswith("tritonmark.")}
        if (exported.get("family") == "video") != (scenario.clip is not None) and exported:
            raise UserError(f"{options.model} is {exported.get('model')}: export it under a name that begins with that,"
                            " so that its clip and limits are known")  # fmt: skip
        document = {
            "model": options.model,
            "backend": exported.get("backend", server["backend"] or "unknown"),
            "precision": exported.get("precision", "unknown"),
            "weights": exported.get("weights", "unknown"),
            "dialect": dialect_of(server["backend"], parameters),
            "exported": exported,
            "server": server,
            **({"servers": several} if several else {}),
            "hardware": hardware.describe(servers.farthest(host), options.hardware, options.gpu_probe, options.gpus),
            "overrides": {k: v for k, v in overrides.items() if v is not None and v != ""},
            "prompts": library.describe(scenario),
        }
        return scenario, document

    def start(self, **_: Any) -> None:
        self.started = time.monotonic()
        self.finished = gevent.spawn(self.run_once)

    def run_once(self) -> None:
        """One run from plan to exit code; then Locust's test is over."""
        self.environment.process_exit_code = 1
        try:
            self.conductor = self.make_conductor()
            model = self.environment.parsed_options.model
            self.conductor.conduct(servers.urls(self.environment.host), self.turns, model)
            if self.conductor.error:
                raise self.conductor.error
            self.environment.process_exit_code = self.publish()
        except UserError as error:
            self.environment.process_exit_code = 2
            self.runner.log_exception("local", str(error), "")
            print(f"error: {error}", file=sys.stderr, flush=True)
        except Exception:
            log.exception("a bug in tritonmark")
        finally:
            self.live.linger()
            gevent.spawn(self.runner.quit if self.environment.parsed_options.headless else self.runner.stop)

    def make_conductor(self) -> Conductor:
        scenario, document = self.prepare()
        results = Path(self.environment.parsed_options.results)
        nodes = sorted(self.runner.clients) if isinstance(self.runner, MasterRunner) else []

        def send(kind: str, data: dict[str, Any], worker: int) -> None:
            self.runner.send_message(f"tritonmark_{kind}", data, nodes[worker] if nodes else None)

        def alive(worker: int) -> bool:
            node = self.runner.clients.get(nodes[worker]) if nodes else True
            return node is True or (node is not None and node.state != STATE_MISSING)

        if self.live.address:
            self.progress({"metrics": f"http://{self.live.address}/metrics ({self.live.role})"})
        print(f"tritonmark: {scenario.name}, preset {scenario.preset}, overrides {document['overrides']}", flush=True)
        options = self.environment.parsed_options
        hosts = servers.urls(self.environment.host)
        telemetry = Telemetry(telemetry_settings(options), hosts, options.model, self.live)
        return Conductor(
            scenario, document, results, workers=max(1, len(nodes)), send=send, alive=alive, progress=self.progress,
            live=self.live, telemetry=telemetry,
        )  # fmt: skip

    def publish(self) -> int:
        """Tells where the run is and what it came to; returns the exit code: 0 VALID, 3 INVALID."""
        run = self.conductor.run
        self.live.sealed(run.valid)
        try:
            if run.scenario.keep_outputs:
                comparison.write_files(run)
            else:
                write_logs(run)
        except OSError as error:  # they can be written again from the sealed run; the verdict stands
            log.warning("LoadGen's files were not written: %s", error)
        self.progress({"phase": "sealed", "folder": str(run.folder), "headline": run.document["verdict"]["headline"]})
        if self.progress_file is None:
            from loadgen.edge import report  # imported late: the load process must stay small while it measures

            report.text([run])
            print(f"sealed in {run.folder}", flush=True)
        return 0 if run.valid else 3

    def progress(self, snapshot: dict[str, Any]) -> None:
        if self.conductor:
            self.live.progress(snapshot, self.conductor.document.get("t0_wall_ns"), len(self.conductor.lost))
        if self.progress_file:
            try:
                print(json.dumps(snapshot), file=self.progress_file)
            except OSError:
                self.progress_file = None

    def stop(self, **_: Any) -> None:
        """Locust stops the test. At its --run-time limit the run is left to drain; before that, it is cut off."""
        conductor = self.conductor
        if conductor is None or conductor.sealed.is_set():
            return
        if isinstance(self.runner, MasterRunner) and not any(map(conductor.alive, range(conductor.workers))):
            return  # Locust gives up when no worker can be reached; the conductor waits a little longer
        limit_s = seconds(self.environment.parsed_options.run_time)
        if not limit_s or time.monotonic() - self.started < limit_s - 0.5:
            conductor.cut("stopped by the user")
        self.finished.join()

    def quit(self, **_: Any) -> None:
        """Ctrl-C or SIGTERM: whatever was measured is sealed before the process ends."""
        if self.conductor and not self.conductor.sealed.is_set():
            self.conductor.cut("stopped by the user (Ctrl-C or SIGTERM)")
            self.finished.join(timeout=60)

    def on_ready(self, msg: Any, **_: Any) -> None:
        if self.live.worker_ready(msg.data["worker"], msg.data.get("metrics")):
            self.progress({"metrics": f"http://{msg.data['metrics']}/metrics (worker {msg.data['worker']})"})
        self.deliver("ready", msg)

    def deliver(self, kind: str, msg: Any, **_: Any) -> None:
        if self.conductor:
            self.conductor.on_message(kind, msg.data)


def seconds(run_time: Any) -> float | None:
    """Locust's --run-time as seconds: it is a number after parsing, a string before."""
    from locust.util.timespan import parse_timespan

    try:
        return parse_timespan(run_time) if isinstance(run_time, str) and run_time else run_time or None
    except ValueError as error:
        raise UserError(f"--run-time is {run_time!r}; give a time such as 30s, 10m or 1h30m") from error
