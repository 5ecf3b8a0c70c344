"""What ``auto`` chose and what it cost: beside the fastest fixed method of the same problem, network and run.

Regret is the time of ``auto`` by that of the fastest fixed method measured beside it, over both phases. The minimum of
many noisy times is too small, so one schedule measured twice has some regret too: ``twice`` is that share, the time of
``auto`` by that of the very method and layout that it chose, where these were measured also by name.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from longspan.bench.record import Row
from longspan.train.markup import Raw, tag
from longspan.train.report.style import CSS

LEAST_CELLS = 2  # fewer are no map


class Regret(NamedTuple):
    """One cell: what was computed where, what was chosen, what was fastest.

    Attributes:
        problem, network: in words.
        chosen, layout: what ``auto`` took.
        best: the fastest fixed method.
        auto_s, best_s: medians of forward and backward, of the slowest rank.
        twice: see the module; None where the chosen schedule was not measured by name.
    """

    problem: str
    network: str
    chosen: str
    layout: str
    best: str
    auto_s: float
    best_s: float
    twice: float | None

    @property
    def ratio(self) -> float:
        return self.auto_s / self.best_s


def regrets(rows: Sequence[Row]) -> list[Regret]:
    """A cell for each problem and network that has ``auto`` and at least one other method, in the order of rows."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        if row["status"] == "ok":
            place = {name: value for name, value in row["cell"].items() if name not in ("method", "layout")}
            groups.setdefault(f"{place} {row['run']}", []).append(row)
    found = []
    for group in groups.values():
        auto = next((row for row in group if row["cell"]["method"] == "auto"), None)
        fixed = [row for row in group if row["cell"]["method"] != "auto"]
        if auto is None or not fixed:
            continue
        best = min(fixed, key=_both_s)
        same = next((row for row in fixed if _what(row) == _what(auto)), None)
        cell = auto["cell"]
        found.append(
            Regret(
                problem=f"{cell['problem']['mask']} {cell['problem']['heads']}:{cell['problem']['kv_heads']}",
                network=_network(cell),
                chosen=auto["method"],
                layout=auto["layout"],
                best=best["cell"]["method"],
                auto_s=_both_s(auto),
                best_s=_both_s(best),
                twice=_both_s(auto) / _both_s(same) if same else None,
            )
        )
    return found


def _both_s(row: Row) -> float:
    return row["both_s"][1]


def _what(row: Row) -> tuple[str, str]:
    return row["method"], row["layout"]


def _network(cell: dict[str, Any]) -> str:
    rate = cell["rate_bit_per_s"]
    if cell["network"] == "none":
        return "loopback"
    return f"{cell['network']} {'no limit' if rate is None else f'{rate / 1e6:g} Mbit/s'}"


def regret_table(cells: Sequence[Regret]) -> str:
    """Markdown, a line per cell."""
    lines = [
        "| mask and H:G | network | `auto` took | s | fastest fixed | s | `auto` ÷ fastest | `auto` ÷ same by name |",
        "|---|---|---|---:|---|---:|---:|---:|",
    ]
    for c in cells:
        twice = "–" if c.twice is None else f"{c.twice:.2f}"
        lines.append(
            f"| {c.problem} | {c.network} | `{c.chosen}`, {c.layout} | {c.auto_s:.3f} | `{c.best}` | {c.best_s:.3f} | "
            f"{c.ratio:.2f} | {twice} |"
        )
    return "\n".join(lines) + "\n"


_CELL_WIDTH, _CELL_HEIGHT, _LEFT, _TOP = 190.0, 40.0, 220.0, 34.0
_WORST = 1.25  # the ratio that is drawn darkest


def heat_map(cells: Sequence[Regret]) -> str:
    """A standalone SVG: problems down, networks across; a cell names the choice and is the darker the more it lost."""
    problems = list(dict.fromkeys(cell.problem for cell in cells))
    networks = list(dict.fromkeys(cell.network for cell in cells))
    parts: list[Raw] = []
    for column, network in enumerate(networks):
        x = _LEFT + (column + 0.5) * _CELL_WIDTH
        parts.append(tag("text", network, x=x, y=_TOP - 12, class_="soft", text_anchor="middle"))
    for line, problem in enumerate(problems):
        y = _TOP + (line + 0.5) * _CELL_HEIGHT
        parts.append(tag("text", problem, x=_LEFT - 10, y=y + 4, class_="soft", text_anchor="end"))
    for cell in cells:
        x = _LEFT + networks.index(cell.network) * _CELL_WIDTH
        y = _TOP + problems.index(cell.problem) * _CELL_HEIGHT
        loss = min(max(cell.ratio - 1, 0.0) / (_WORST - 1), 1.0)
        box = {"x": x + 1, "y": y + 1, "width": _CELL_WIDTH - 2, "height": _CELL_HEIGHT - 2}
        tip = tag("title", f"{cell.problem}, {cell.network}: {cell.chosen} {cell.ratio:.2f} of {cell.best}")
        parts.append(tag("rect", **box, class_="track"))
        parts.append(tag("rect", tip, **box, style=f"fill:var(--r1);fill-opacity:{0.75 * loss:.2f}"))
        middle = {"x": x + _CELL_WIDTH / 2, "text_anchor": "middle"}
        parts.append(tag("text", cell.chosen, y=y + 17, **middle))
        parts.append(tag("text", f"{cell.ratio:.2f} × {cell.best}", y=y + 32, class_="small soft", **middle))
    width, height = _LEFT + len(networks) * _CELL_WIDTH + 10, _TOP + len(problems) * _CELL_HEIGHT + 10
    page = tag("rect", width=width, height=height, style="fill:var(--page)")
    size = {"viewBox": f"0 0 {width:g} {height:g}", "width": width, "height": height}
    return tag("svg", tag("style", CSS), page, parts, xmlns="http://www.w3.org/2000/svg", **size)
