"""Two hosts on one machine, joined by a network that can be cut: Linux network namespaces, for root only.

Each host has its own interface `eth0`, its own address and its own host name, and both names resolve on both hosts. The
hosts hang on a bridge in a third namespace, the switch; `cut` takes the bridge down, so the hosts keep their carrier
and hear nothing any more, as when a switch between them loses power.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
import uuid
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any


def why_not() -> str | None:
    """Why this machine cannot hold two hosts, in a few words; None where it can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    missing = [program for program in ("ip", "unshare", "mount", "hostname") if shutil.which(program) is None]
    if missing:
        return f"no program {missing[0]}"
    name = f"probe-{uuid.uuid4().hex[:8]}"
    made = _ip("netns", "add", name, check=False)
    if made.returncode != 0:
        return f"no network namespaces: {made.stderr.strip()}"
    bridge = _ip("-n", name, "link", "add", "bridge0", "type", "bridge", check=False)
    _ip("netns", "delete", name)
    return None if bridge.returncode == 0 else f"no bridges: {bridge.stderr.strip()}"


class Hosts:
    """A context manager: the hosts exist between entering and leaving, and so do the processes started on them.

    `names[i]` and `addresses[i]` are host i's name and IPv4 address, `interface` is what both call their network card.
    Raises RuntimeError where `why_not()` has a reason.
    """

    interface = "eth0"

    def __init__(self, names: tuple[str, str] = ("nodeA", "nodeB"), network: str = "10.77.0") -> None:
        self.names = names
        self.addresses = tuple(f"{network}.{number}" for number in (1, 2))
        unique = uuid.uuid4().hex[:8]
        self._switch = f"switch-{unique}"
        self._spaces = [f"{name}-{unique}" for name in names]
        self._folder = Path(tempfile.mkdtemp(prefix="hosts-"))
        self._started: list[subprocess.Popen[Any]] = []

    def __enter__(self) -> Hosts:
        reason = why_not()
        if reason is not None:
            raise RuntimeError(reason)
        try:
            self._build()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def run(
        self, host_index: int, argv: Sequence[str], env: Mapping[str, str] | None = None, **options: Any
    ) -> subprocess.Popen[Any]:
        """Start `argv` on a host, with `env` over this process's environment; `options` go to subprocess.Popen.

        GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME name the host's network card. The process found by `.pid` is `argv`
        itself, as its wrappers all exec.
        """
        space, name = self._spaces[host_index], self.names[host_index]
        # `ip netns exec` has a mount namespace of its own, so the bound hosts file is seen in there only.
        prepare = 'mount --bind "$1" /etc/hosts && hostname "$2" && shift 2 && exec "$@"'
        inside = ["unshare", "--uts", "sh", "-c", prepare, "sh", str(self._folder / "hosts"), name, *argv]
        cards = {"GLOO_SOCKET_IFNAME": self.interface, "NCCL_SOCKET_IFNAME": self.interface}
        environment = {**os.environ, **cards, **(env or {})}
        process = subprocess.Popen(["ip", "netns", "exec", space, *inside], env=environment, **options)
        self._started.append(process)
        return process

    def cut(self) -> None:
        """Break the link: packets vanish, and no one is told."""
        _ip("-n", self._switch, "link", "set", "bridge0", "down")

    def mend(self) -> None:
        """Undo `cut`."""
        _ip("-n", self._switch, "link", "set", "bridge0", "up")

    def close(self) -> None:
        """End every process on the hosts and take the hosts away. May be called again."""
        for space in self._spaces:
            for pid in _ip("netns", "pids", space, check=False).stdout.split():
                with suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGKILL)
        for process in self._started:
            process.wait(timeout=30)
        for space in (self._switch, *self._spaces):
            _ip("netns", "delete", space, check=False)
        shutil.rmtree(self._folder, ignore_errors=True)

    def _build(self) -> None:
        _ip("netns", "add", self._switch)
        _ip("-n", self._switch, "link", "add", "bridge0", "type", "bridge")
        _ip("-n", self._switch, "link", "set", "bridge0", "up")
        for number, (space, address) in enumerate(zip(self._spaces, self.addresses, strict=True)):
            port = f"port{number}"
            _ip("netns", "add", space)
            _ip("-n", self._switch, "link", "add", port, "type", "veth", "peer", "name", self.interface, "netns", space)
            _ip("-n", self._switch, "link", "set", port, "master", "bridge0", "up")
            _ip("-n", space, "address", "add", f"{address}/24", "dev", self.interface)
            for card in ("lo", self.interface):
                _ip("-n", space, "link", "set", card, "up")
        lines = ["127.0.0.1 localhost", *(" ".join(pair) for pair in zip(self.addresses, self.names, strict=True))]
        (self._folder / "hosts").write_text("\n".join(lines) + "\n")


def _ip(*arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True)
    if check and done.returncode != 0:
        raise RuntimeError(f"ip {' '.join(arguments)}: {done.stderr.strip()}")
    return done
