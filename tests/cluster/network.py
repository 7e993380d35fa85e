"""Machines that are network namespaces: each has an address, a host name and a cable of its own to one bridge."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

SUBNET = "10.77.0"


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True)


class Node:
    """One machine.

    Args:
        number: from 1; its address is SUBNET.number.
        name: of its namespace, and its host name.
    """

    def __init__(self, number: int, name: str):
        self.number, self.name, self.address = number, name, f"{SUBNET}.{number}"
        self.plug = f"v{number}{name.rpartition('-')[2]}"  # the cable's other end, on the bridge
        self.settings = Path("/etc/netns") / name  # what lies there stands in place of /etc on this machine

    def start(self, command: Sequence[str], log: Path, environment: Mapping[str, str]) -> subprocess.Popen:
        """A command on this machine; its output goes to ``log``."""
        inside = ["ip", "netns", "exec", self.name, "unshare", "--uts", "bash", "-c"]
        inside += [f'hostname {self.name}; exec "$@"', "bash", *command]
        own = {"PET_LOCAL_ADDR": self.address, "GLOO_SOCKET_IFNAME": "eth0"}
        with log.open("a") as output:
            return subprocess.Popen(
                inside, env={**os.environ, **own, **environment}, stdout=output, stderr=subprocess.STDOUT
            )

    def processes(self) -> list[int]:
        result = subprocess.run(["ip", "netns", "pids", self.name], capture_output=True, text=True, check=True)
        return [int(pid) for pid in result.stdout.split()]

    def send(self, number: signal.Signals) -> None:
        """A signal to all that runs on this machine."""
        for pid in self.processes():
            try:
                os.kill(pid, number)
            except ProcessLookupError:
                continue

    def unplug(self) -> None:
        """Nothing leaves or reaches this machine any more, not even the news that its connections are closed."""
        ip("link", "set", self.plug, "nomaster")

    def seconds(self) -> float:
        """Processor time of all that runs on this machine."""
        total = 0
        for pid in self.processes():
            try:
                fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            except (FileNotFoundError, ProcessLookupError):
                continue
            total += int(fields[11]) + int(fields[12])
        return total / os.sysconf("SC_CLK_TCK")

    @contextmanager
    def slowed(self) -> Iterator[None]:
        """Everything on this machine stands still for two thirds of the time. (Not every kernel can delay packets.)"""
        done = threading.Event()

        def pulse() -> None:
            while not done.wait(0.1):
                self.send(signal.SIGSTOP)
                done.wait(0.2)
                self.send(signal.SIGCONT)

        thread = threading.Thread(target=pulse, daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()
            self.send(signal.SIGCONT)


@contextmanager
def cluster(count: int) -> Iterator[list[Node]]:
    """``count`` machines on one bridge; all that runs on them is killed at the end."""
    tag = f"{os.getpid() % 0xFFFF:04x}"
    bridge = f"slam{tag}"
    nodes = [Node(number, f"node{number}-{tag}") for number in range(1, count + 1)]
    made: list[Node] = []
    try:
        ip("link", "add", bridge, "type", "bridge")
        ip("link", "set", bridge, "up")
        names = "".join(f"{node.address} {node.name}\n" for node in nodes)
        for node in nodes:
            ip("netns", "add", node.name)
            made.append(node)
            node.settings.mkdir(parents=True)
            (node.settings / "hosts").write_text(f"127.0.0.1 localhost\n{names}")
            ip("link", "add", node.plug, "type", "veth", "peer", "name", "eth0", "netns", node.name)
            ip("link", "set", node.plug, "master", bridge, "up")
            for command in (
                ["addr", "add", f"{node.address}/24", "dev", "eth0"],
                ["link", "set", "eth0", "up"],
                ["link", "set", "lo", "up"],
            ):
                ip("-n", node.name, *command)
        yield nodes
    finally:
        for node in made:
            node.send(signal.SIGCONT)
            node.send(signal.SIGKILL)
            subprocess.run(["ip", "netns", "delete", node.name], check=False)
            shutil.rmtree(node.settings, ignore_errors=True)
        subprocess.run(["ip", "link", "delete", bridge], check=False)
