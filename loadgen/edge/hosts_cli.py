"""`tritonmark hosts`: from the inventory of hosts to scrape targets, labels and prices."""

from __future__ import annotations

from pathlib import Path

import click

from loadgen.edge import hardware
from loadgen.edge import hosts as inventory
from loadgen.edge.errors import UserError

_FILE = click.argument("file", type=click.Path(path_type=Path), default=Path("deploy/hosts.toml"))


@click.group()
def hosts() -> None:
    """Work with hosts.toml, the inventory of several hosts."""


@hosts.command()
@_FILE
def show(file: Path) -> None:
    """Name, address, hardware and price of each host of FILE."""
    known = inventory.read(file)
    for host in known.hosts:
        label, probed = inventory.label(host)
        price = f"{host.price_per_gpu_hour:g} {known.currency}".strip() if host.price_per_gpu_hour is not None else "-"
        origin = "probed" if probed else "as stated; DCGM's exporter did not answer"
        click.echo(f"{host.name}  {host.address}  {label} ({origin})  {price}")


@hosts.command()
@_FILE
@click.option("--out", default="deploy/targets/hosts.json", show_default=True, type=click.Path(path_type=Path))
def targets(file: Path, out: Path) -> None:
    """Write what Prometheus scrapes on the hosts of FILE, with each host's probed hardware label."""
    known = inventory.read(file)
    labels = [inventory.label(host) for host in known.hosts]
    inventory.write_targets(inventory.targets(known, [label for label, _ in labels]), out)
    for host, (label, probed) in zip(known.hosts, labels, strict=True):
        if not probed:
            click.echo(f"{host.name}: DCGM's exporter did not answer; its label is {label}", err=True)
    click.echo(f"{out}  ({len(known.hosts)} hosts)")


@hosts.command()
@_FILE
def urls(file: Path) -> None:
    """Print the Tritons of all hosts of FILE, for --host."""
    click.echo(inventory.urls(inventory.read(file)))


@hosts.command()
@_FILE
def prices(file: Path) -> None:
    """Print a price file (for --prices) from the prices in FILE."""
    known = inventory.read(file)
    click.echo(inventory.prices(known, [inventory.label(host)[0] for host in known.hosts]), nl=False)


@hosts.command()
@click.option("--dcgm", help="URL of the server's DCGM exporter, such as http://dcgm:9400; several with commas")
@click.option("--triton", help="URL of the server: where it reports GPUs, this machine's label is refused")
def label(dcgm: str | None, triton: str | None) -> None:
    """Print a hardware label: of the host behind --dcgm, or of this machine."""
    if dcgm is None:
        if triton and (where := inventory.reports_gpus(triton)):
            raise UserError(
                f"{where} reports GPUs, so the label of this machine would be another's; give"
                " --dcgm (in compose DCGM_URL) with the URL of that host's DCGM exporter, or HARDWARE with its label"
            )
        click.echo(hardware.describe("http://127.0.0.1")["label"])
        return
    probed = inventory.probed_label(dcgm)
    if probed is None:
        raise UserError(f"{dcgm} does not answer as DCGM's exporter, or names no GPU; check it, or set the label")
    click.echo(probed)
