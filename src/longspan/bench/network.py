"""A real network on one Linux machine: hosts are network namespaces, every link is limited by a token bucket.

``with lab(4, "port", 100e6) as network:`` makes the hosts and takes them away again. Two shapes, both full duplex:

* ``port``: each host has one cable to a switch (a bridge in a namespace of its own); each direction of each cable has
  the rate. What NVSwitch or one network card per device is, scaled down.
* ``mesh``: each pair of hosts has a cable of its own with the rate in each direction. A host has one /32 address on an
  empty bridge and a route over the right cable to every other address, so gloo, which knows one interface, uses all.

Nothing is made in the machine's own namespace, and the hosts reach each other and nothing else. Bytes are counted by
the kernel at the hosts' interfaces (``counters``), not computed. Needs root and iproute2 (``ip``, ``tc``).
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Literal, NoReturn

from longspan.hardware.rates import check_rate

Kind = Literal["port", "mesh"]
MAX_HOSTS = 64
# Ethernet, IPv4 and TCP with time stamps: what the kernel counts beside the payload, once per packet that it handles.
HEADER_BYTES = 14 + 20 + 32

_PREFIX = "longspan"
_ADDRESSES = "10.77.0"
# A bucket of 2 ms hides less than a packet's time from the measurement; below 16 KiB the timer wakes too often.
_BURST_S, _MIN_BURST_BYTES = 2e-3, 16 * 1024
# A deep queue: where several hosts send to one at once, a shallow one drops, and the measurement is of TCP's timers.
_QUEUE_S, _MIN_QUEUE_BYTES = 0.2, 1024 * 1024
_COMMAND_LIMIT_S = 30.0


class NetworkError(ValueError):
    """The lab cannot be made here: the message says why in one line, and what to do about it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Host:
    """One host of the lab.

    Attributes:
        namespace: its name for ``ip netns``.
        address: its IPv4 address, the same over every cable.
        interface: what carries the address: the value of GLOO_SOCKET_IFNAME.
    """

    namespace: str
    address: str
    interface: str

    def command(self, *arguments: str) -> list[str]:
        """The command line that runs a program in this host; files, pipes and the process id stay as they are."""
        return ["ip", "netns", "exec", self.namespace, *arguments]


@dataclass(frozen=True, kw_only=True, slots=True)
class Network:
    """The hosts of a lab that is up."""

    kind: Kind
    rate_bit_per_s: float | None
    hosts: tuple[Host, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Counter:
    """What an interface has sent and received since it was made, as the kernel counts: with headers, all packets."""

    sent_bytes: int
    sent_packets: int
    received_bytes: int

    @property
    def payload_bytes(self) -> int:
        """Sent bytes without headers; an acknowledgement has none. Segments that were sent twice count twice."""
        return self.sent_bytes - HEADER_BYTES * self.sent_packets

    def __sub__(self, earlier: Counter) -> Counter:
        return Counter(
            sent_bytes=self.sent_bytes - earlier.sent_bytes,
            sent_packets=self.sent_packets - earlier.sent_packets,
            received_bytes=self.received_bytes - earlier.received_bytes,
        )


def counters(host: Host | None = None) -> dict[str, Counter]:
    """Every cable of a host by the name of its interface; of the namespace of the calling process by default."""
    where = [] if host is None else ["-n", host.namespace]
    links = json.loads(_ip(*where, "-s", "-j", "link", "show"))
    return {
        link["ifname"]: Counter(
            sent_bytes=link["stats64"]["tx"]["bytes"],
            sent_packets=link["stats64"]["tx"]["packets"],
            received_bytes=link["stats64"]["rx"]["bytes"],
        )
        for link in links
        if link["ifname"].startswith("cable")
    }


def total(counts: dict[str, Counter]) -> Counter:
    """The sum over the cables of a host."""
    return Counter(
        sent_bytes=sum(count.sent_bytes for count in counts.values()),
        sent_packets=sum(count.sent_packets for count in counts.values()),
        received_bytes=sum(count.received_bytes for count in counts.values()),
    )


def refusal() -> str | None:
    """Why no lab can be made here, with the remedy; None where nothing is known to be missing."""
    if not sys.platform.startswith("linux"):
        return f"network namespaces need Linux, this is {sys.platform}; use --network none"
    for tool in ("ip", "tc"):
        if shutil.which(tool) is None:
            return f"a network lab needs iproute2, but {tool!r} was not found; apt-get install iproute2"
    if os.geteuid() != 0:
        return f"a network lab needs root, this is user {os.geteuid()}; use sudo, or --network none"
    return None


@contextmanager
def lab(num_hosts: int, kind: Kind = "port", rate_bit_per_s: float | None = None) -> Iterator[Network]:
    """Makes the hosts, gives them to the body, and takes them away whatever happens, Ctrl-C and SIGTERM included.

    Args:
        num_hosts: 2 to 64.
        kind: "port" or "mesh", see the module.
        rate_bit_per_s: of each direction of each cable; None for no limit.

    Raises:
        ValueError: a size, kind or rate out of range.
        NetworkError: no root, no iproute2, or a kernel without namespaces, veth, bridges or token buckets.
    """
    if not 2 <= num_hosts <= MAX_HOSTS:
        raise ValueError(f"a lab has 2 to {MAX_HOSTS} hosts, got {num_hosts}; pass --ranks 4")
    if kind not in ("port", "mesh"):
        raise ValueError(f"a lab is one port per host or a mesh of links, got {kind!r}; pass port or mesh")
    if rate_bit_per_s is not None:
        check_rate(rate_bit_per_s)
    if (reason := refusal()) is not None:
        raise NetworkError(reason)
    _sweep()
    prefix = f"{_PREFIX}-{os.getpid()}-{_number()}"
    with _ending_on_sigterm():
        try:
            yield _build(prefix, num_hosts, kind, rate_bit_per_s)
        finally:
            _remove(lambda name: name.startswith(f"{prefix}-"))


_LABS: list[int] = [0]
_LOCK = threading.Lock()


def _number() -> int:
    """Labs of one process, counted: two may be up at once."""
    with _LOCK:
        _LABS[0] += 1
        return _LABS[0]


def _build(prefix: str, num_hosts: int, kind: Kind, rate_bit_per_s: float | None) -> Network:
    interface = "cable" if kind == "port" else "self"
    hosts = tuple(
        Host(namespace=f"{prefix}-host{i}", address=f"{_ADDRESSES}.{i + 1}", interface=interface)
        for i in range(num_hosts)
    )
    for host in hosts:
        _namespace(host.namespace)
    if kind == "port":
        _cable_to_switch(f"{prefix}-switch", hosts, rate_bit_per_s)
    else:
        _cable_pairs(hosts, rate_bit_per_s)
    return Network(kind=kind, rate_bit_per_s=rate_bit_per_s, hosts=hosts)


def _namespace(name: str) -> None:
    _ip("netns", "add", name)
    # Silence: what IPv6 says on its own would be counted. A read-only /proc/sys leaves a few packets in the counts.
    quiet = "echo 1 > /proc/sys/net/ipv6/conf/all/disable_ipv6; echo 1 > /proc/sys/net/ipv6/conf/default/disable_ipv6"
    _call(["ip", "netns", "exec", name, "sh", "-c", f"({quiet}) 2>/dev/null || true"])
    _ip("-n", name, "link", "set", "lo", "up")


def _cable_to_switch(switch: str, hosts: tuple[Host, ...], rate_bit_per_s: float | None) -> None:
    _namespace(switch)
    _ip("-n", switch, "link", "add", "bridge", "type", "bridge", "forward_delay", "0", "mcast_snooping", "0")
    _ip("-n", switch, "link", "set", "bridge", "up")
    for number, host in enumerate(hosts):
        port = f"port{number}"
        _cable(switch, port, host.namespace, "cable", rate_bit_per_s)
        _ip("-n", host.namespace, "address", "add", f"{host.address}/24", "dev", "cable")
        _ip("-n", switch, "link", "set", port, "master", "bridge")
        _ip("-n", switch, "link", "set", port, "up")
        _ip("-n", host.namespace, "link", "set", "cable", "up")


def _cable_pairs(hosts: tuple[Host, ...], rate_bit_per_s: float | None) -> None:
    for host in hosts:
        _ip("-n", host.namespace, "link", "add", "self", "type", "bridge")
        _ip("-n", host.namespace, "address", "add", f"{host.address}/32", "dev", "self")
        _ip("-n", host.namespace, "link", "set", "self", "up")
    for one in range(len(hosts)):
        for other in range(one + 1, len(hosts)):
            ends = ((hosts[one], hosts[other], f"cable{other}"), (hosts[other], hosts[one], f"cable{one}"))
            _cable(hosts[one].namespace, ends[0][2], hosts[other].namespace, ends[1][2], rate_bit_per_s)
            for host, _, name in ends:
                _ip("-n", host.namespace, "link", "set", name, "up")
            for host, peer, name in ends:
                route = ("route", "add", f"{peer.address}/32", "dev", name, "src", host.address)
                _ip("-n", host.namespace, *route)


def _cable(where: str, name: str, peer: str, peer_name: str, rate_bit_per_s: float | None) -> None:
    """A pair of interfaces, each of which sends at the rate at most: full duplex."""
    _ip("-n", where, "link", "add", name, "type", "veth", "peer", "name", peer_name, "netns", peer)
    if rate_bit_per_s is None:
        return
    bytes_per_s = rate_bit_per_s / 8
    burst = max(_MIN_BURST_BYTES, math.ceil(bytes_per_s * _BURST_S))
    queue = max(_MIN_QUEUE_BYTES, math.ceil(bytes_per_s * _QUEUE_S))
    bucket = ("tbf", "rate", f"{round(rate_bit_per_s)}bit", "burst", f"{burst}b", "limit", f"{burst + queue}b")
    for namespace, device in ((where, name), (peer, peer_name)):
        _call(["tc", "-n", namespace, "qdisc", "add", "dev", device, "root", *bucket])


def _namespaces() -> list[str]:
    return [line.split()[0] for line in _ip("netns", "list").splitlines() if line.strip()]


def _remove(chosen: Callable[[str], bool]) -> None:
    """Cables go with their namespaces. A second Ctrl-C waits until all are gone."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        failures = []
        for name in filter(chosen, _namespaces()):
            try:
                _ip("netns", "delete", name)
            except NetworkError as error:  # the others must go all the same
                failures.append(error)
        if failures:
            raise failures[0]
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _sweep() -> None:
    """Removes what processes left that were killed before they could: their names say whose they are."""
    pattern = re.compile(rf"{_PREFIX}-(\d+)-\d+-(?:host\d+|switch)")

    def orphaned(name: str) -> bool:
        match = pattern.fullmatch(name)
        return match is not None and not _is_alive(int(match[1]))

    _remove(orphaned)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


@contextmanager
def _ending_on_sigterm() -> Iterator[None]:
    """SIGTERM raises SystemExit, as SIGINT raises KeyboardInterrupt: else the hosts would outlive the process."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(number: int, frame: FrameType | None) -> NoReturn:
        del frame
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _ip(*arguments: str) -> str:
    return _call(["ip", *arguments])


def _call(command: list[str]) -> str:
    """Standard output of a command of iproute2. In a session of its own: Ctrl-C is this process's to handle."""
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=_COMMAND_LIMIT_S, start_new_session=True, check=False
        )
    except FileNotFoundError:
        raise NetworkError(
            f"a network lab needs iproute2, but {command[0]!r} was not found; apt-get install iproute2"
        ) from None
    except subprocess.TimeoutExpired:
        raise NetworkError(
            f"{' '.join(command)} must answer within {_COMMAND_LIMIT_S:g} s, got nothing; look at dmesg"
        ) from None
    if done.returncode != 0:
        said = " ".join(done.stderr.split()) or f"exit code {done.returncode}"
        raise NetworkError(f"{' '.join(command)} failed: {said}; {_remedy(command, said)}")
    return done.stdout


def _remedy(command: list[str], said: str) -> str:
    if "permitted" in said or "denied" in said or "Read-only" in said:
        return "in a container, start it with --privileged (namespaces need CAP_SYS_ADMIN and CAP_NET_ADMIN)"
    if command[0] == "tc":
        return "this kernel seems to lack the token bucket: modprobe sch_tbf, or pass --rate none"
    return "the kernel must have network namespaces, veth and bridge: modprobe veth bridge, or use --network none"
