"""A login for Locust's web page: a second locust file, used with `--web-login` when LOCUST_PASSWORD is set.

    LOCUST_PASSWORD=... locust -f loadgen/llm.py,docker/web_login.py --web-login

One user (LOCUST_USER, by default `tritonmark`). A wrong password costs a second. Sessions end with the process: their
key is made at its start. The page speaks plain HTTP: put a proxy with TLS in front where the network is not trusted.
"""

import hmac
import os
import secrets
from typing import Any

import gevent
from flask import Blueprint, redirect, request, session, url_for
from flask_login import UserMixin, login_user
from locust import events
from locust.env import Environment

FAILED_LOGIN_S = 1.0


class WebUser(UserMixin):
    """The one user there is."""

    def __init__(self, name: str) -> None:
        self.id = name


@events.init.add_listener
def protect(environment: Environment, **_: Any) -> None:
    """Adds the login to the web page; headless processes and workers have none."""
    if not environment.web_ui:
        return
    name, password = os.environ.get("LOCUST_USER") or "tritonmark", os.environ.get("LOCUST_PASSWORD", "")
    if not password:
        raise SystemExit("error: LOCUST_PASSWORD is empty; set it, or leave docker/web_login.py and --web-login out")
    ui = environment.web_ui
    ui.app.config.update(
        SECRET_KEY=secrets.token_bytes(32), SESSION_COOKIE_HTTPONLY=True, SESSION_COOKIE_SAMESITE="Strict"
    )
    ui.login_manager.user_loader(lambda user: WebUser(user) if user == name else None)
    ui.auth_args = {"username_password_callback": "/login-submit", "title": "Tritonmark"}
    pages = Blueprint("tritonmark_login", __name__)

    @pages.route("/login-submit", methods=["POST"])
    def submit() -> Any:
        """Takes the password compared in constant time; how long it is may show."""
        given = [request.form.get("username", ""), request.form.get("password", "")]
        if all(hmac.compare_digest(a.encode(), b.encode()) for a, b in zip(given, (name, password), strict=True)):
            login_user(WebUser(name))
            return redirect(url_for("locust.index"))
        gevent.sleep(FAILED_LOGIN_S)
        session["auth_error"] = "Wrong user or password"
        return redirect(url_for("locust.login"))

    ui.app.register_blueprint(pages)
