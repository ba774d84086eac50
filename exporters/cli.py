"""`tritonmark models | export | serve`. Options are overrides; the defaults live in the catalogue.

`export --verify` ends with 3 where the served model does not agree with its reference.
"""

from __future__ import annotations

import json
import signal
import sys
import time
from pathlib import Path
from typing import NoReturn

import click

from exporters.catalogue import load_catalogue, model_names
from exporters.errors import UserError
from exporters.export import export_model, plan_export
from exporters.gpus import find_gpus
from exporters.models_table import model_entry, models_table
from exporters.reference import read_prompts
from exporters.registry import Build
from exporters.server import TritonServer
from exporters.verify import verify_export

REFERENCE_ANSWERS = 16


@click.group()
def cli() -> None:
    """Export models for Triton and serve them."""


@cli.command()
@click.option("--json", "as_json", is_flag=True, help="Everything in the catalogue, and what fits here, as JSON.")
def models(as_json: bool) -> None:
    """List the models that can be exported, and what fits on this machine's GPUs."""
    catalogue, gpus = load_catalogue().values(), find_gpus()
    if as_json:
        click.echo(json.dumps([model_entry(model, gpus) for model in catalogue], indent=2))
        return
    for line in models_table(list(catalogue), gpus):
        click.echo(line)


@cli.command()
@click.argument("model", shell_complete=model_names)
@click.option("--backend", default="torch-eager", show_default=True)
@click.option("--weights", default="synthetic", show_default=True, help="hub, synthetic, or a folder.")
@click.option("--out", default="model_repository", show_default=True, type=click.Path(path_type=Path))
@click.option("--name", help="Triton model name.  [default: the catalogue's]")
@click.option("--precision", help="E.g. bf16, fp16, fp32, fp8.  [default: the backend's first for the model]")
@click.option("--seed", default=0, show_default=True, help="Of synthetic weights.")
@click.option("--device", default="auto", show_default=True, help="auto or cpu.")
@click.option(
    "--reference", type=click.IntRange(0), help="Reference answers for `run accuracy`.  [default: 16 for tiny models]"
)
@click.option("--reference-prompts", type=click.Path(path_type=Path), help="JSONL.  [default: the corpus's sentences]")
@click.option("--reference-clip", default="", help="Of a video model: frames=9,steps=8.  [default: as it is served]")
@click.option("--verify", is_flag=True, help="Serve the result and compare it with its reference; 3 if it differs.")
@click.option("--tp", default=1, show_default=True, help="GPUs that share the model by tensor parallelism.")
@click.option("--pp", default=1, show_default=True, help="Pipeline stages (tensorrtllm).")
@click.option("--ep", default=1, show_default=True, help="Groups of GPUs that share the experts (tensorrtllm).")
@click.option("--served-from", default="/models", show_default=True, help="Where the server will see --out.")
@click.option("--image", default="", help="Container image (tensorrtllm).  [default: the newest that fits]")
@click.option("--build-cache", type=click.Path(path_type=Path), help="Keeps finished build steps (tensorrtllm).")
@click.option("--no-check", is_flag=True, help="Build without looking at GPU, driver, docker and disk first.")
@click.option("--dry-run", is_flag=True, help="Print every step of the build, do none.")
@click.option("--force", is_flag=True, help="Replace an existing export in one step.")
def export(
    model: str, backend: str, weights: str, out: Path, name: str | None, precision: str | None, seed: int,
    device: str, tp: int, pp: int, ep: int, served_from: str, image: str, build_cache: Path | None, no_check: bool,
    dry_run: bool, force: bool, reference: int | None, reference_prompts: Path | None, reference_clip: str,
    verify: bool,
) -> None:  # fmt: skip
    """Write MODEL as a Triton model into a model repository."""
    started = time.monotonic()
    build = Build(
        pp=pp, ep=ep, out=out, served_from=served_from, image=image, cache=build_cache, check=not no_check
    )  # fmt: skip
    if dry_run:
        plan = plan_export(model, backend, weights, name=name, precision=precision, seed=seed, tp=tp, build=build)
        click.echo("\n".join(plan))
        return
    folder = export_model(
        model,
        backend,
        weights,
        out,
        name=name,
        precision=precision,
        seed=seed,
        device=device,
        tp=tp,
        build=build,
        force=force,
        reference=_answers(model, reference, reference_prompts, verify),
        reference_prompts=reference_prompts,
        reference_clip=reference_clip,
        verify=verify,
        on_progress=click.echo if backend.startswith("tensorrtllm") else None,  # the others take seconds
    )
    click.echo(f"{folder}  ({time.monotonic() - started:.1f} s)")
    if verify:
        _verify(folder)


@cli.command("verify")
@click.argument("folder", type=click.Path(path_type=Path, file_okay=False))
def verify_command(folder: Path) -> None:
    """Serve the exported model in FOLDER and compare it with its reference; 3 if it differs."""
    _verify(folder)


def _verify(folder: Path) -> NoReturn:
    outcome = verify_export(folder, click.echo)
    click.echo(outcome.line, err=not outcome.passed)
    sys.exit(0 if outcome.passed else 3)


def _answers(model: str, wanted: int | None, source: Path | None, verify: bool) -> int:
    """How many reference answers: as wanted, else all prompts of a given file up to the default, else the default."""
    if wanted is not None:
        return wanted
    if source:
        return min(REFERENCE_ANSWERS, len(read_prompts(source)))
    return REFERENCE_ANSWERS if verify or model.endswith("-tiny") else 0


class _Stop(Exception):  # noqa: N818 (a request, not an error)
    """Ctrl-C or SIGTERM arrived."""


def _raise_stop(*_: object) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # a second one must not cut the orderly end short
    raise _Stop


@cli.command()
@click.option("--repository", default="model_repository", show_default=True, type=click.Path(path_type=Path))
@click.option("--model", "models", multiple=True, help="Load only this one; may be repeated.  [default: all]")
@click.option("--host", default="127.0.0.1", show_default=True)
@click.option("--http-port", default=8000, show_default=True, help="0 takes a free one.")
@click.option("--grpc-port", default=8001, show_default=True, help="0 takes a free one.")
@click.option("--metrics-port", default=8002, show_default=True, help="0 takes a free one.")
@click.option("--ready-timeout", default=600.0, show_default=True, help="Seconds.")
@click.option(
    "--log", "log_path", type=click.Path(path_type=Path), help="Triton's log file.  [default: a temporary one]"
)
def serve(
    repository: Path, models: tuple[str, ...], host: str, http_port: int, grpc_port: int, metrics_port: int,
    ready_timeout: float, log_path: Path | None,
) -> None:  # fmt: skip
    """Serve a model repository with the embedded Triton until Ctrl-C."""
    previous = {number: signal.signal(number, _raise_stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        with TritonServer(
            repository, host, http_port, grpc_port, metrics_port, models=models, log_path=log_path,
            ready_timeout_s=ready_timeout, on_progress=click.echo,
        ) as server:  # fmt: skip
            click.echo(f"http     {server.http_url}\ngrpc     {host}:{server.grpc_port}")
            click.echo(f"metrics  {server.metrics_url}\nlog      {server.log_path}\nstop with Ctrl-C")
            while (reason := server.exit_reason()) is None:
                time.sleep(0.2)
            raise UserError(reason)
    except _Stop:
        click.echo("stopped")
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
