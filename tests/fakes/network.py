"""Hosts of a test: network namespaces on one bridge, and processes in them. Needs root and iproute2.

A host has an address of its own, sees only the others, and can be cut off. Nothing of this leaves the machine: the bridge
has no way out. `relay` stands for a slow line: this kernel may lack `tc netem`.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path


def available() -> str:
    """Why there can be no hosts here; empty where there can."""
    if os.geteuid() != 0 or not shutil.which("ip"):
        return "network namespaces need root and iproute2"
    try:
        with Lan() as lan:
            lan.host()
    except subprocess.CalledProcessError as error:
        return f"no network namespaces here: {error.stderr.strip()}"
    return ""


def clocks_can_differ() -> bool:
    """Has this kernel time namespaces?"""
    command = ["unshare", "--time", "--monotonic", "1", "--fork", "true"]
    return bool(shutil.which("unshare")) and subprocess.run(command, capture_output=True, check=False).returncode == 0


def ip(*words: str, inside: str = "") -> None:
    subprocess.run(["ip", *(["-n", inside] if inside else []), *words], check=True, capture_output=True, text=True)


class Host:
    """One namespace. `address` is the same for all of its ports."""

    def __init__(self, lan: Lan, number: int) -> None:
        self.lan, self.name, self.address = lan, f"{lan.name}h{number}", f"10.77.0.{number}"
        self.port = f"p{number}"  # at the bridge
        ip("netns", "add", self.name)
        ip("link", "add", self.port, "netns", lan.name, "type", "veth", "peer", "name", "eth0", "netns", self.name)
        ip("link", "set", self.port, "master", "br0", "up", inside=lan.name)
        ip("addr", "add", f"{self.address}/24", "dev", "eth0", inside=self.name)
        for device in ("lo", "eth0"):
            ip("link", "set", device, "up", inside=self.name)

    def start(self, *command: str, shift_s: int = 0, **options) -> subprocess.Popen[str]:
        """A process on this host; with `shift_s` its CLOCK_MONOTONIC is ahead by so much."""
        shifted = ["unshare", "--time", "--monotonic", str(shift_s), "--fork", "--kill-child"] if shift_s else []
        process = subprocess.Popen(["ip", "netns", "exec", self.name, *shifted, *command], text=True,
                                   stdin=subprocess.DEVNULL, start_new_session=True, **options)  # fmt: skip
        self.lan.processes.append(process)
        return process

    def cut(self) -> None:
        """Frames are dropped both ways; the host's own end of the wire stays up."""
        ip("link", "set", self.port, "nomaster", inside=self.lan.name)

    def join(self) -> None:
        ip("link", "set", self.port, "master", "br0", inside=self.lan.name)


class Lan:
    """A bridge and its hosts, until the end of the block."""

    def __init__(self) -> None:
        self.name = f"tm{os.getpid()}"
        self.hosts: list[Host] = []
        self.processes: list[subprocess.Popen[str]] = []

    def __enter__(self) -> Lan:
        ip("netns", "add", self.name)
        try:
            ip("link", "add", "br0", "type", "bridge", inside=self.name)
            ip("link", "set", "br0", "up", inside=self.name)
        except BaseException:
            self.__exit__()
            raise
        return self

    def host(self) -> Host:
        self.hosts.append(Host(self, len(self.hosts) + 1))
        return self.hosts[-1]

    def relay(self, host: Host, port: int, to: Host, delay_ms: float) -> None:
        """On `host`, a line to `port` of `to` that takes `delay_ms` each way."""
        host.start(sys.executable, str(Path(__file__).resolve()), host.address, to.address, str(port), str(delay_ms))

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            process.kill()
            process.wait()
        for name in [*(host.name for host in self.hosts), self.name]:
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)


def main(listen: str, target: str, port: int, delay_ms: float) -> None:
    import asyncio

    async def carry(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        loop = asyncio.get_running_loop()
        while data := await reader.read(65536):
            loop.call_later(delay_ms / 1e3, writer.write, data)
        loop.call_later(delay_ms / 1e3, writer.close)

    async def connect(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, back = await asyncio.open_connection(target, port)
        await asyncio.gather(carry(reader, back), carry(there, writer))

    async def serve() -> None:
        async with await asyncio.start_server(connect, listen, port) as server:
            await server.serve_forever()

    asyncio.run(serve())


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), float(sys.argv[4]))
