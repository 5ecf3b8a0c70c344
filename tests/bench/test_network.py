"""The network lab: rates are read and refused, and what is made is a real network, as slow as it was asked to be.

Tests that make hosts talk to those alone; they need root, iproute2 and a kernel with namespaces, and say so otherwise.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache

import pytest

from longspan.bench import network
from longspan.bench.network import Counter, Host, NetworkError, counters, lab, refusal, total

_LIMIT_S = 60.0  # far above what anything here takes: the machine may be busy
_SERVER = """
import socket, sys, time
server = socket.create_server(("0.0.0.0", 5000))
server.settimeout(60)
print("up", flush=True)
peer, _ = server.accept()
peer.settimeout(60)
num_bytes = 0
while got := peer.recv(1 << 16):
    num_bytes += len(got)
print(num_bytes, time.monotonic())
"""
_CLIENT = """
import socket, sys, time
content = bytes(int(sys.argv[2]))
with socket.create_connection((sys.argv[1], 5000), timeout=60) as peer:
    print(time.monotonic(), flush=True)
    peer.sendall(content)
"""
_HOLDER = """
import sys, time
from longspan.bench.network import lab
with lab(2) as network:
    print(network.hosts[0].namespace, flush=True)
    time.sleep(100)
"""


def namespaces() -> list[str]:
    done = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True)
    return [line.split()[0] for line in done.stdout.splitlines()]


def mine(pid: int | None = None) -> list[str]:
    """Hosts of this process, or another one's: others may have labs up at the same time."""
    return [name for name in namespaces() if name.startswith(f"longspan-{os.getpid() if pid is None else pid}-")]


@lru_cache(maxsize=1)
def missing() -> str | None:
    """Why no lab can be made here, found out by making one."""
    if (reason := refusal()) is not None:
        return reason
    try:
        with lab(2, "port", 1e9):
            return None
    except NetworkError as error:
        return str(error)


@pytest.fixture
def real() -> None:
    if (reason := missing()) is not None:
        pytest.skip(f"no network lab here: {reason}")


@contextmanager
def started(command: list[str]) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A process, and the first line that it has said; ended with the block."""
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        try:
            assert process.stdout is not None
            yield process, process.stdout.readline().strip()
        finally:
            process.kill()


def client(source: Host, target: Host, num_bytes: int) -> list[str]:
    return source.command(sys.executable, "-c", _CLIENT, target.address, str(num_bytes))


def send(source: Host, target: Host, num_bytes: int) -> float:
    """Seconds from the first byte's leaving to the last's arrival: of one clock, and no shorter on a busy machine."""
    with started(target.command(sys.executable, "-c", _SERVER)) as (server, first):
        assert first == "up"
        with started(client(source, target, num_bytes)) as (_, start_s):
            return took_s(server, float(start_s), num_bytes)


def took_s(server: subprocess.Popen[str], start_s: float, num_bytes: int) -> float:
    arrived, end_s = server.communicate(timeout=_LIMIT_S)[0].split()
    assert int(arrived) == num_bytes
    return float(end_s) - start_s


def test_sizes_and_kinds_are_refused_before_anything_is_made(monkeypatch) -> None:
    monkeypatch.setattr(network, "_call", lambda command: pytest.fail(f"ran {command}"))
    for arguments, message in [
        ((1,), r"2 to 64 hosts, got 1"),
        ((65,), r"2 to 64 hosts, got 65"),
        ((2, "star"), r"got 'star'; pass port or mesh"),
        ((2, "port", float("nan")), r"from 1 kbit/s .* got nan"),
    ]:
        with pytest.raises(ValueError, match=message), lab(*arguments):
            pytest.fail("a lab was made")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("sys.platform", "darwin"), r"need Linux, this is darwin; use --network none"),
        (("shutil.which", lambda tool: None if tool == "tc" else "/sbin/ip"), r"'tc' was not found; apt-get install"),
        (("os.geteuid", lambda: 1000), r"needs root, this is user 1000; use sudo"),
    ],
)
def test_what_is_missing_is_named_with_its_remedy(change, message, monkeypatch) -> None:
    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.setattr("shutil.which", lambda tool: f"/sbin/{tool}")
    monkeypatch.setattr("os.geteuid", lambda: 0)
    monkeypatch.setattr(*change)
    with pytest.raises(NetworkError, match=message) as caught, lab(2):
        pytest.fail("a lab was made")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("tool", "said", "message"),
    [
        (
            "tc",
            "Error: Specified qdisc kind is unknown.",
            r"lack the token bucket: modprobe sch_tbf, or pass --rate none",
        ),
        ("ip", "Error: Unknown device type.", r"modprobe veth bridge, or use --network none"),
        ("ip", "mount --make-shared /run/netns failed: Operation not permitted", r"start it with --privileged"),
    ],
)
def test_a_command_that_fails_says_what_to_do(tool, said, message, monkeypatch) -> None:
    done = subprocess.CompletedProcess([tool], 2, "", f"{said}\nmore\n")
    monkeypatch.setattr(subprocess, "run", lambda *args, **options: done)
    with pytest.raises(NetworkError, match=message) as caught:
        network._call([tool, "something"])
    assert "\n" not in str(caught.value)


def test_counters_are_sums_and_differences() -> None:
    one = Counter(sent_bytes=1066, sent_packets=1, received_bytes=5)
    other = Counter(sent_bytes=132, sent_packets=2, received_bytes=7)
    both = total({"cable1": one, "cable2": other})
    assert both == Counter(sent_bytes=1198, sent_packets=3, received_bytes=12)
    assert both.payload_bytes == 1000
    assert both - one == other


@pytest.mark.usefixtures("real")
@pytest.mark.parametrize("kind", ["port", "mesh"])
def test_a_cable_is_as_slow_as_it_was_asked_to_be(kind) -> None:
    num_bytes, rate, shares = 1_000_000, 20e6, []
    sent = answered = Counter(sent_bytes=0, sent_packets=0, received_bytes=0)
    for _ in range(3):  # a busy machine may send more slowly, but never faster
        with lab(2, kind, rate) as made:
            one, other = made.hosts
            shares.append(num_bytes * 8 / send(one, other, num_bytes) / rate)
            sent, answered = total(counters(one)), total(counters(other))
        if shares[-1] > 0.85:
            break
    # Below 1: headers take their part. The bucket's first content comes for nothing.
    assert 0.85 < max(shares) < 1.05
    assert num_bytes - 100 < sent.payload_bytes < 1.02 * num_bytes  # ARP is shorter than a header of TCP
    assert sent.sent_bytes > 1.01 * num_bytes
    assert abs(answered.payload_bytes) < 1000
    assert answered.sent_bytes == sent.received_bytes > 0
    assert not mine()


@pytest.mark.usefixtures("real")
def test_both_directions_have_the_whole_rate() -> None:
    # Half duplex would never give either direction more than half; a busy machine may, so the best of three counts.
    assert max(_slower_direction() for _ in range(3)) > 0.6


def _slower_direction() -> float:
    """The share of the rate that the slower of two opposite streams had."""
    num_bytes, rate = 2_000_000, 20e6
    with lab(2, "port", rate) as made:
        one, other = made.hosts
        with started(one.command(sys.executable, "-c", _SERVER)) as (server, first):
            assert first == "up"
            with started(client(other, one, num_bytes)) as (_, start_s):
                there_s = send(one, other, num_bytes)
                back_s = took_s(server, float(start_s), num_bytes)
    return num_bytes * 8 / max(there_s, back_s) / rate


@pytest.mark.usefixtures("real")
def test_each_pair_of_a_mesh_has_its_own_cable() -> None:
    with lab(3, "mesh") as made:
        sizes = {(0, 1): 100_000, (1, 2): 200_000, (2, 0): 400_000}
        for (source, target), num_bytes in sizes.items():
            send(made.hosts[source], made.hosts[target], num_bytes)
        counts = [counters(host) for host in made.hosts]
    assert [sorted(count) for count in counts] == [["cable1", "cable2"], ["cable0", "cable2"], ["cable0", "cable1"]]
    for source, count in enumerate(counts):
        for name, counter in count.items():
            target = int(name.removeprefix("cable"))
            assert abs(counter.payload_bytes - sizes.get((source, target), 0)) < 1000
            assert counts[target][f"cable{source}"].received_bytes == counter.sent_bytes


@pytest.mark.usefixtures("real")
def test_hosts_go_when_the_body_fails_and_labs_do_not_disturb_each_other() -> None:
    with lab(2, "mesh", 1e6) as outer:
        with pytest.raises(KeyError, match="body"), lab(3, "port", 1e6) as inner:
            assert len(mine()) == 2 + 3 + 1  # and the switch
            assert {host.namespace for host in inner.hosts} <= set(mine())
            raise KeyError("body")
        assert sorted(mine()) == sorted(host.namespace for host in outer.hosts)
    assert not mine()


@pytest.mark.usefixtures("real")
def test_hosts_go_when_making_them_fails(monkeypatch) -> None:
    call = network._call

    def failing(command: list[str]) -> str:
        if command[0] == "tc":
            raise NetworkError("no bucket")
        return call(command)

    monkeypatch.setattr(network, "_call", failing)
    with pytest.raises(NetworkError, match="no bucket"), lab(2, "port", 1e6):
        pytest.fail("a lab was made")
    assert not mine()


@pytest.mark.usefixtures("real")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_hosts_go_with_their_process(number) -> None:
    with started([sys.executable, "-c", _HOLDER]) as (holder, first):
        assert first in mine(holder.pid)
        holder.send_signal(number)
        holder.wait(_LIMIT_S)
    if number == signal.SIGKILL:  # nobody can tidy up then: the next lab does
        assert len(mine(holder.pid)) == 3
        with lab(2):
            pass
    assert not mine(holder.pid)
