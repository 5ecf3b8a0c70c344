"""Finds test data that is not in the repository: under `LONGSPAN_DATA`, else under shared/data beside the checkout."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]


def data_dir(name: str) -> Path:
    """The folder or file `name` of the data collection; skips the calling test where it is missing."""
    root = Path(os.environ.get("LONGSPAN_DATA") or REPOSITORY.parent / "shared" / "data")
    path = root / name
    if not path.exists():
        pytest.skip(f"no data {name!r}: set LONGSPAN_DATA to a folder that holds it")
    return path
