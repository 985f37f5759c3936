"""Several "hosts" on one machine: network namespaces on a switch, each with an address and a cable of its own.

    pipetrgl-<pid>-host0          pipetrgl-<pid>-switch          pipetrgl-<pid>-host1
    lo, eth0 10.77.0.1 ══════════ port0 ─ bridge ─ port1 ═════════ eth0 10.77.0.2, lo

The addresses exist inside these namespaces only: nothing here can reach the machine's own network, or be reached from
it, and two test runs never meet. All of it is Debian's iproute2, as root.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from typing import IO, Any, final

_PREFIX = f"pipetrgl-{os.getpid()}-"
_SWITCH = f"{_PREFIX}switch"


@final
class Host:
    """One namespace; `with hosts(2) as (first, second)` makes them.

    Attributes:
        address: of this host, as the others reach it.
    """

    def __init__(self, number: int) -> None:
        self.address = f"10.77.{number // 250}.{number % 250 + 1}"
        self._number = number
        self._name = f"{_PREFIX}host{number}"
        self._started: list[subprocess.Popen[str]] = []

    def start(self, command: Sequence[str], **options: Any) -> subprocess.Popen[str]:
        """A process on this host, ended with it at the latest; options are those of Popen, its output is text."""
        prefix = ["ip", "netns", "exec", self._name]
        process = subprocess.Popen([*prefix, *command], text=True, start_new_session=True, **options)
        self._started.append(process)
        return process

    def processes(self) -> list[int]:
        """Process ids of everything that runs here, whoever started it; zombies are gone as far as we care."""
        return [pid for pid in map(int, _ip("netns", "pids", self._name).split()) if not _is_zombie(pid)]

    def link_down(self) -> None:
        """Take the host off the network: packets are lost both ways and no connection is told."""
        _ip("-n", self._name, "link", "set", "eth0", "down")

    def link_up(self) -> None:
        _ip("-n", self._name, "link", "set", "eth0", "up")

    def slow(self, rate: str) -> None:
        """Limit the cable to `rate`, such as "20mbit", in each direction."""
        for namespace, device in ((self._name, "eth0"), (_SWITCH, f"port{self._number}")):
            limit = ["rate", rate, "burst", "16kb", "latency", "100ms"]
            _run(["tc", "-n", namespace, "qdisc", "replace", "dev", device, "root", "tbf", *limit])

    def _plug_in(self) -> None:
        _ip("netns", "add", self._name)
        port = f"port{self._number}"
        _ip("-n", self._name, "link", "add", "eth0", "type", "veth", "peer", "name", port, "netns", _SWITCH)
        _ip("-n", self._name, "address", "add", f"{self.address}/16", "dev", "eth0")
        for device in ("lo", "eth0"):
            _ip("-n", self._name, "link", "set", device, "up")
        _ip("-n", _SWITCH, "link", "set", port, "master", "bridge", "up")

    def _end_processes(self) -> None:
        _kill_all_in(self._name)
        for process in self._started:
            for stream in (process.stdout, process.stderr, process.stdin):
                _close(stream)
            process.wait(30)


@contextlib.contextmanager
def hosts(count: int) -> Iterator[list[Host]]:
    """Make `count` hosts that reach each other; on the way out end whatever runs on them and take them down.

    Only namespaces with this process's id in their name are ever touched, also those of a killed run that had the same.

    Raises:
        RuntimeError: the namespaces cannot be made; needs root and iproute2.
    """
    made = [Host(number) for number in range(count)]
    try:
        _take_down()
        _ip("netns", "add", _SWITCH)
        _ip("-n", _SWITCH, "link", "add", "bridge", "type", "bridge")
        _ip("-n", _SWITCH, "link", "set", "bridge", "up")
        for host in made:
            host._plug_in()
        yield made
    finally:
        for host in made:
            host._end_processes()
        _take_down()


def _take_down() -> None:
    for line in _ip("netns", "list").splitlines():
        name = line.split()[0]
        if name.startswith(_PREFIX):
            _kill_all_in(name)
            _ip("netns", "delete", name)


def _kill_all_in(namespace: str) -> None:
    """Only processes of ours can be in a namespace of ours."""
    if not os.path.exists(f"/run/netns/{namespace}"):
        return
    while pids := [pid for pid in map(int, _ip("netns", "pids", namespace).split()) if not _is_zombie(pid)]:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.05)


def _is_zombie(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def _close(stream: IO[str] | None) -> None:
    if stream is not None:
        stream.close()


def _ip(*arguments: str) -> str:
    return _run(["ip", *arguments])


def _run(command: list[str]) -> str:
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True, timeout=30).stdout
    except FileNotFoundError as error:
        raise RuntimeError(f"'{command[0]}' is missing; hosts are made with Debian's iproute2") from error
    except subprocess.CalledProcessError as error:
        raise RuntimeError(
            f"'{' '.join(command)}' failed: {error.stderr.strip()}; hosts are network namespaces, which need root "
            "(CI runs as root)"
        ) from error
