"""`tritonmark init FOLDER`."""

from __future__ import annotations

from pathlib import Path

import click

from exporters.errors import UserError
from exporters.stack import write_stack


@click.command()
@click.argument("folder", type=click.Path(path_type=Path))
def init(folder: Path) -> None:
    """Write the compose stack, Grafana's boards, Prometheus' files and .env.example into FOLDER."""
    try:
        names = write_stack(folder)
    except FileExistsError as error:
        raise UserError(f"{error}: name a new one") from error
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror or error}") from error
    click.echo(f"{len(names)} files, and the code that images are built from, are in {folder}")
    click.echo(f"Next: cd {folder}; cp .env.example .env, and read its comments; docker compose up -d --build")
