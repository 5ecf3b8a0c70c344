"""Shares of a core: a busy process gets its share and no more, and nothing is left behind.

Needs root and the cpu controller of control groups, and says so otherwise.
"""

from __future__ import annotations

import subprocess
import sys

import pytest

from longspan.bench import shares
from longspan.bench.shares import ShareError, cpu_shares, join

_BUSY = """
import sys, time
sys.stdin.readline()
start, spent = time.monotonic(), time.process_time()
while time.monotonic() < start + 1:
    pass
print((time.process_time() - spent) / (time.monotonic() - start))
"""


@pytest.fixture
def real() -> None:
    try:
        with cpu_shares(1, 0.5):
            pass
    except ShareError as error:
        pytest.skip(str(error))


@pytest.mark.usefixtures("real")
def test_a_busy_process_gets_its_share() -> None:
    with cpu_shares(2, 0.2) as groups:
        process = subprocess.Popen(
            [sys.executable, "-c", _BUSY], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        join(groups[1], process.pid)
        used = float(process.communicate("go\n", timeout=60)[0])
        assert len({*groups}) == 2
    assert 0.05 < used < 0.4
    assert not any(group.exists() for group in groups)


def test_what_cannot_be_had_is_refused_in_one_line(tmp_path, monkeypatch) -> None:
    with pytest.raises(ValueError, match=r"must be positive, got 0"), cpu_shares(1, 0):
        pass
    monkeypatch.setattr(shares, "_ROOT", tmp_path)
    with pytest.raises(ShareError, match=r"need root and the cpu controller .* leave --cpu out"), cpu_shares(1, 0.5):
        pass
