"""What Locust's web page posts, read as the command line is: before Locust sees it, and refused on the page.

The page sends every field: an empty text or number means the option's default, as leaving it out does, and so does
"default" in a list of choices. Locust itself would take '' as a value, convert by the type of the value before, and
start a test that then ends with an error in the log alone.
"""

from __future__ import annotations

import re
from argparse import Namespace
from collections.abc import Callable, Mapping
from typing import Any

from flask import Response, jsonify, request
from locust.env import Environment
from locust.runners import STATE_CLEANUP, STATE_RUNNING, STATE_SPAWNING, STATE_STOPPING
from locust.util.timespan import parse_timespan
from werkzeug.datastructures import MultiDict

from loadgen.edge.errors import UserError
from loadgen.edge.options import DEFAULT, OPTIONS, Option

BUSY = (STATE_SPAWNING, STATE_RUNNING, STATE_CLEANUP, STATE_STOPPING)


def posted_name(dest: str) -> str:
    """The name under which the page posts an option: its scripts write each in camel case and back, by these rules."""
    camel = re.sub(r"_([a-z0-9])", lambda m: m[1].upper(), dest)
    return re.sub(r"([a-z0-9])([A-Z0-9])", r"\1_\2", camel).lower()


def read(option: Option, text: str, default: Any) -> Any:
    """An option's value from its field. Raises UserError."""
    text = text.strip()
    if text in ("", DEFAULT):
        return default
    try:
        value = option.type(text)
    except ValueError:
        kind = {int: "a whole number", float: "a number"}[option.type]
        raise UserError(f"{option.flag} is {text!r}; it must be {kind}, or empty for the default") from None
    if option.choices and value not in option.choices:
        raise UserError(f"{option.flag} is {text!r}; choose one of: {', '.join(option.choices)}")
    return value


def apply(form: Mapping[str, str], options: Namespace, started: Mapping[str, Any]) -> list[str]:
    """Sets `options` from the fields of ours in `form`; `started` has the command line's values, which are the page's
    defaults. Returns the names of those fields. Raises UserError."""
    ours = {name: option for option in OPTIONS for name in (option.dest, posted_name(option.dest))}
    mine = [name for name in form if name in ours]
    for name in mine:
        option = ours[name]
        setattr(options, option.dest, read(option, form[name], started[option.dest]))
    return mine


def _seconds(run_time: str) -> int:
    try:
        return parse_timespan(run_time)
    except ValueError:
        raise UserError(f"the run time is {run_time!r}; write it as 20, 20s, 3m, 2h or 1h20m") from None


def attach(environment: Environment, check: Callable[[], Any]) -> None:
    """Reads and checks each posted form; what `check` refuses is said on the page, and nothing starts or is lost."""
    started = dict(vars(environment.parsed_options))

    def refused(message: str) -> Response:
        return jsonify({"success": False, "message": message, "host": environment.host})

    def guarded() -> Response:
        if environment.runner.state in BUSY:
            return refused("a run is under way, whose load is fixed from its start: stop it, then start a new one")
        options, host = environment.parsed_options, environment.host
        before = dict(vars(options))
        try:
            mine = apply(request.form, options, started)
            environment.host = request.form.get("host") or host
            if run_time := request.form.get("run_time"):
                options.run_time = _seconds(run_time)
            check()
        except UserError as error:
            vars(options).clear()
            vars(options).update(before)
            environment.host = host
            return refused(str(error))
        request.form = MultiDict([(k, v) for k, v in request.form.items(multi=True) if k not in mine])
        return locusts()

    app = environment.web_ui.app
    (endpoint,) = (rule.endpoint for rule in app.url_map.iter_rules() if rule.rule.endswith("/swarm"))
    locusts = app.view_functions[endpoint]
    app.view_functions[endpoint] = environment.web_ui.auth_required_if_enabled(guarded)
