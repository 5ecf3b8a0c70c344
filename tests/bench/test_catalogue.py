"""The catalogue says what the tables say, and nothing about what is not there."""

from __future__ import annotations

import importlib.util
import re
import shutil
from dataclasses import fields
from pathlib import Path
from typing import get_args

import pytest
import torch

from longspan.attention.kernels import KERNELS
from longspan.attention.patterns import PATTERNS
from longspan.bench import catalogue
from longspan.bench.catalogue import (
    BEGIN,
    END,
    main,
    methods_table,
    pages,
    print_methods,
    render_markdown,
    render_readme,
    stale,
)
from longspan.context.methods import METHODS
from longspan.layout.tokens import LAYOUTS
from longspan.model.config import Balance
from longspan.model.hf_table import ARCHITECTURES
from longspan.plan.plan import Offload, PipelineSchedule, Plan, Precision
from tests.data import REPOSITORY


def test_readme_and_page_are_fresh() -> None:
    assert not stale(REPOSITORY), f"run {catalogue.REFRESH}"


def test_every_name_of_every_table_has_a_row(capsys: pytest.CaptureFixture[str]) -> None:
    rows = methods_table()
    for section, table in (
        ("method", METHODS),
        ("layout", [*LAYOUTS, "balanced"]),
        ("pattern", PATTERNS),
        ("kernel", KERNELS),
        ("architecture", ARCHITECTURES),
        ("pipeline", get_args(PipelineSchedule)),
        ("offload", get_args(Offload)[1:]),
        ("precision", get_args(Precision)[1:]),
        ("balance", get_args(Balance)),
    ):
        assert [row.name for row in rows if row.section == section] == list(table)
    axes = [row.name for row in rows if row.section == "axis"]
    assert all(name in {field.name for field in fields(Plan)} for name in axes) and {*Plan().axes()} <= {*axes}
    assert {row.section for row in rows} == set(catalogue.SECTIONS) == set(catalogue.CHOSEN_BY)
    assert all(row.what and row.status and "\n" not in row.what for row in rows)
    for text in (render_markdown(), render_readme()):
        assert all(f"`{row.name}`" in text for row in rows)
    print_methods()
    printed = capsys.readouterr().out.splitlines()
    assert all(any(line.split()[:1] == [row.name] for line in printed) for row in rows)
    assert all(any(f"[{row.status}]" in line for line in printed) for row in rows)


def test_a_row_must_say_what_it_was_shown_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(METHODS, "novelty", METHODS["ring"])
    with pytest.raises(ValueError, match="got none for method 'novelty'"):
        methods_table()
    assert "`novelty`" in _with_status(monkeypatch)


def _with_status(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setitem(catalogue.VERIFIED, "method/novelty", "nothing")
    return render_readme()


def test_nothing_is_called_verified_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(catalogue.VERIFIED, "method/nothing_ring", "everything")
    with pytest.raises(ValueError, match="only what is there, got 'method/nothing_ring'"):
        methods_table()


def test_a_stale_file_is_seen_and_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "docs").mkdir()
    shutil.copy(REPOSITORY / "README.md", tmp_path)
    readme = tmp_path / "README.md"
    whole = readme.read_text()
    readme.write_text(whole.replace(render_readme(), "old words\n"))
    assert "old words" in readme.read_text()
    assert stale(tmp_path) == [readme, tmp_path / "docs" / "methods.md"]
    assert main(["--write", "--root", str(tmp_path)]) == 0
    assert readme.read_text() == whole and not stale(tmp_path)
    assert capsys.readouterr().out == "wrote README.md\nwrote docs/methods.md\n"


def test_markers_are_needed(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"a checkout with README\.md and docs/"):
        pages(tmp_path)
    (tmp_path / "docs").mkdir()
    (tmp_path / "README.md").write_text(f"{END}\n{BEGIN}\n")
    with pytest.raises(ValueError, match="put them back"):
        pages(tmp_path)


def test_pictures_of_masks_are_fresh() -> None:
    spec = importlib.util.spec_from_file_location("make_masks", REPOSITORY / "docs" / "make_masks.py")
    assert spec is not None and spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    wanted = script.files()
    assert not [path.name for path, text in wanted.items() if path.read_text() != text], "run docs/make_masks.py"
    drawn = {path.stem for path in (REPOSITORY / "docs" / "assets" / "masks").iterdir()}
    assert drawn == set(PATTERNS)
    for name in PATTERNS:
        # Filling the outline's runs gives the mask back.
        filled = torch.zeros(48, 48, dtype=torch.bool)
        for x, y, width in re.findall(r"M(\d+) (\d+)h(\d+)", script.outline(script.example(name).bands)):
            filled[int(y), int(x) : int(x) + int(width)] = True
        assert torch.equal(filled, script.example(name).dense())
