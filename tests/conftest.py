"""What holds for every test: one thread, a fixed seed, short deterministic property tests, GPU tests where a GPU is."""

from __future__ import annotations

import os
import signal

# Before torch is imported, and for the processes that tests start: ranks outnumber cores, threads only get in the way.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# A device profile that somebody has saved on this machine must not decide what the tests see.
os.environ["XDG_CONFIG_HOME"] = os.devnull

import hypothesis
import pytest
import torch

# The same examples on every machine and in every run: a failure that CI saw is a failure that a person sees.
_COMMON = hypothesis.settings(
    derandomize=True,
    deadline=None,
    database=None,
    print_blob=True,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.register_profile("quick", parent=_COMMON, max_examples=25)
hypothesis.settings.register_profile("thorough", parent=_COMMON, max_examples=500)
hypothesis.settings.load_profile("quick")


def pytest_configure() -> None:
    torch.set_num_threads(1)
    # A shell that runs this in the background ignores SIGINT, and the processes that tests start would inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


def pytest_runtest_setup() -> None:
    # A hook and not an autouse fixture: Hypothesis refuses function-scoped fixtures.
    torch.manual_seed(0)
