"""The catalogue of what is here, generated from the visible tables: methods, layouts, masks, kernels, models.

    python -m longspan.bench.catalogue            prints it
    python -m longspan.bench.catalogue --write    rewrites README.md between its markers, and docs/methods.md

A row's words are the first line of its docstring, or its card. What a row was *verified* on is the one thing that is
written by hand, in ``VERIFIED`` below, and a row without it is refused.
"""

from __future__ import annotations

import argparse
import inspect
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple, get_args

from longspan.attention.kernels import KERNELS
from longspan.attention.patterns import PATTERNS
from longspan.context.balance import balanced
from longspan.context.methods import METHODS
from longspan.layout.tokens import LAYOUTS
from longspan.model.config import Balance
from longspan.model.hf_table import ARCHITECTURES
from longspan.model.recompute import Recompute
from longspan.plan.plan import Offload, PipelineSchedule, Precision

BEGIN, END = "<!-- methods:begin -->", "<!-- methods:end -->"
REFRESH = "python -m longspan.bench.catalogue --write"


class Row(NamedTuple):
    """One thing that can be chosen by name."""

    section: str
    name: str
    what: str
    source: str
    status: str


SECTIONS: dict[str, str] = {
    "method": "Context-parallel methods",
    "layout": "Token layouts",
    "pattern": "Mask patterns",
    "kernel": "Attention kernels",
    "architecture": "Checkpoints of Hugging Face",
    "axis": "Axes of a plan",
    "pipeline": "Pipeline schedules",
    "recompute": "Recomputation",
    "offload": "Offload to host memory",
    "precision": "Precision",
    "balance": "Balance of experts",
    "tuning": "Fine-tuning",
}
# How the value is passed: attention(method=...), shard(layout=...), ...
CHOSEN_BY: dict[str, str] = {
    "method": "`method=` of `attention`, `shard` and `unshard`; `auto` chooses",
    "layout": "`layout=` of `attention`, `shard` and `unshard`; by default the method's, or the better balanced one",
    "pattern": "`longspan.attention.patterns.PATTERNS[name](num_tokens, ...)`; see [Masks](masks.md)",
    "kernel": "`kernel=` of `attention`; `auto` takes the first that can",
    "architecture": "the checkpoint itself, in its config.json; see [Checkpoints](checkpoints.md)",
    "axis": "its size in the plan; see [Axes](axes.md)",
    "pipeline": "`pipeline_schedule` of the plan",
    "recompute": "`recompute` of the plan, and `activation_budget` for compiled blocks; see [Memory](memory.md)",
    "offload": "`offload` of the plan; see [Memory](memory.md)",
    "precision": "`precision` of the plan; see [Memory](memory.md)",
    "balance": "`--model.balance`",
    "tuning": "options of `longspan train`; see [Fine-tuning](finetuning.md)",
}

_SCHEDULE = "run: gloo on CPU, and on one H200 (staged), NCCL on four H200; emulate: 1–8 ranks"
_CPU = "CPU: against float64, forward and gradients"
_CUDA = "one H200: 16-bit against float64, forward and gradients"
_EQUAL = "loss and every gradient equal one process's"
_AXIS = f"gloo on CPU, and NCCL on up to four H200: {_EQUAL}"
_AXES = f"on every axis {_EQUAL}"
_NEWER = (
    "striped", "descending", "opposing", "double_ring", "all_gather", "mask_aware", "kept_keys", "ulysses",
    "staged_ulysses", "usp", "distributed_mha", "token_ring", "light_seq", "burst",
)  # fmt: skip
# What each row was shown on. A section's own entry ("pattern") holds for all its rows that have none.
VERIFIED: dict[str, str] = {
    **{f"method/{name}": _SCHEDULE for name in ("ring", "zigzag")},
    **{f"method/{name}": "run: gloo on CPU, NCCL on four H200; emulate: 1–8 ranks" for name in _NEWER},
    "layout": _SCHEDULE,
    "pattern": "equal to its definition, element by element",
    "kernel/cudnn": _CUDA,
    "kernel/cuda_flash": _CUDA,
    "kernel/flex": "one H200: fp32, 16-bit against float64, forward and gradients; fp32 in training steps",
    "kernel/cpu_flash": _CPU,
    "kernel/reference": _CPU,
    "architecture": "logits equal transformers', both ways, random weights",
    "axis": _AXIS,
    "pipeline": f"gloo on CPU, and NCCL on two H200: {_EQUAL}",
    "pipeline/looped_bfs": "gloo on CPU: loss and every gradient equal one process's",
    "pipeline/dualpipev": "gloo on CPU: loss and every gradient equal one process's",
    "recompute": "gradients equal those without, on CPU; trained with on one H200",
    "offload": "gradients equal those without, bit by bit, on CPU and on one H200",
    "precision/fp32": "gloo on CPU",
    "precision/bf16": "gloo on CPU; trained with on one H200",
    "precision/pure_bf16": "gloo on CPU: trained beside fp32, resumed bit by bit; CUDA kernel, a step of 1B at 8K and "
    "of 8B at 512K tokens, in windows, on one H200",
    "balance": "gloo on CPU: loss, auxiliary loss, loads and every gradient equal one process's",
    "tuning/lora": f"CPU: peft reads what is written and gives the same logits; runs resume and are exported; {_AXES}",
    "tuning/freeze": f"CPU: what is frozen stays, bit by bit; {_AXES}",
}

# Names that are values of an option, with what has no docstring to say it.
_WORDS: dict[str, dict[str, tuple[str, str]]] = {
    "axis": {
        "data": ("ranks draw different rows; parameters replicated, ZeRO-2 or ZeRO-3", "arXiv:1910.02054"),
        "context": ("ranks share each sequence, by the methods above", ""),
        "tensor": (
            "ranks share every weight, with sequence and loss parallelism",
            "arXiv:1909.08053, arXiv:2205.05198",
        ),
        "pipeline": ("ranks share the layers, by the schedules below", ""),
        "expert": ("ranks share the experts of a mixture and draw different rows", "arXiv:2006.16668"),
        "replicas": ("copies of what is sharded, each over a part of the data ranks (HSDP)", "arXiv:2304.11277"),
    },
    "pipeline": {
        "gpipe": ("all forwards, then all backwards", "arXiv:1811.06965"),
        "1f1b": ("a backward after each forward, once the pipeline is full", "arXiv:2006.09503"),
        "interleaved": ("several stages a rank, 1f1b", "arXiv:2104.04473"),
        "looped_bfs": ("several stages a rank, all micro-batches through one before the next", "arXiv:2211.05953"),
        "zero_bubble": ("several stages a rank, gradients of weights where a rank would wait", "arXiv:2401.10241"),
        "zbv": ("two stages a rank in a V, so that first and last are on one", "arXiv:2405.15362"),
        "dualpipev": ("as zbv, a forward beside each backward", "DeepSeek-V3, arXiv:2412.19437"),
    },
    "recompute": {
        "none": ("every activation is kept", ""),
        "full": ("each block's input is kept, the block runs again in the backward", ""),
        "attention": (
            "as full, but attention's output and lse are kept, so that attention does not run again",
            "Li et al. 2023, arXiv:2310.03294, section 3.4",
        ),
    },
    "offload": {
        "activations": ("what recomputation keeps of a block leaves the device until its backward", "arXiv:2506.13996"),
        "layers": ("parameters, gradients and optimiser state on the host; blocks are streamed", "arXiv:2104.07857"),
        "both": ("activations and layers", ""),
    },
    "precision": {
        "fp32": ("all in fp32", ""),
        "bf16": (
            "products and activations in bf16, weights and optimiser state in fp32",
            "Micikevicius et al. 2017, arXiv:1710.03740, section 3.1",
        ),
        "pure_bf16": (
            "all in bf16; AdamW rounds weights and moments by chance (stochastic rounding)",
            "Zamirai et al. 2020, arXiv:2010.06192",
        ),
    },
    "balance": {
        "none": ("tokens go where the router sends them", ""),
        "aux": ("an auxiliary loss in each layer, over the load of all ranks", "arXiv:2101.03961"),
        "aux_pooled": ("an auxiliary loss over all layers at once, as transformers has it", ""),
        "bias": ("a bias on the router's choice, moved after every step; no loss", "arXiv:2408.15664"),
    },
    "tuning": {
        "lora": ("low-rank adapters beside frozen weights, saved in PEFT's format", "Hu et al. 2021, arXiv:2106.09685"),
        "freeze": ("parameters that stay as they are, by the beginnings of their names", ""),
    },
}

PLANNED = "Planned, and not here: the other published works that longspan means to gather, beyond context parallelism."


def _first_line(thing: object) -> str:
    line = (inspect.getdoc(thing) or "").strip().partition("\n")[0].replace("``", "`")
    return line if line.endswith("...") else line.rstrip(".")


def _options(section: str) -> tuple[str, ...]:
    """The values of an option that a plan or a model takes by name."""
    kinds = {
        "pipeline": PipelineSchedule,
        "recompute": Recompute,
        "offload": Offload,
        "precision": Precision,
        "balance": Balance,
    }
    if section not in kinds:
        return tuple(_WORDS[section])
    nothing = {"offload": "none", "precision": "auto"}.get(section)
    return tuple(name for name in get_args(kinds[section]) if name != nothing)


def methods_table() -> list[Row]:
    """Every row of the visible tables, by section.

    Raises:
        ValueError: a row says nothing about what it was verified on, or ``VERIFIED`` names what is not there.
    """
    found: list[tuple[str, str, str, str]] = []
    for name, method in METHODS.items():
        found.append(("method", name, f"{method.title}; layout {method.layout}", method.paper))
    for name, layout in LAYOUTS.items():
        found.append(("layout", name, _first_line(layout), ""))
    found.append(("layout", "balanced", _first_line(balanced), ""))
    for name, pattern in PATTERNS.items():
        long = "; a few long documents among many short ones" if name.endswith("_long") else ""
        found.append(("pattern", name, f"{_first_line(pattern)}{long}", ""))
    for name, kernel in KERNELS.items():
        found.append(("kernel", name, _first_line(kernel), ""))
    for name, architecture in ARCHITECTURES.items():
        found.append(("architecture", name, f"model type {architecture.model_type}; import and export", ""))
    for section, words in _WORDS.items():
        found += [(section, name, *words.get(name, ("", ""))) for name in _options(section)]
    used: set[str] = set()
    rows = []
    for section, name, what, source in found:
        key = f"{section}/{name}" if f"{section}/{name}" in VERIFIED else section
        if key not in VERIFIED or not what:
            raise ValueError(
                f"a row of the catalogue says what it is and what it was verified on, got none for {section} {name!r}; "
                "give it a docstring and an entry in VERIFIED"
            )
        used.add(key)
        rows.append(Row(section, name, what, source, VERIFIED[key]))
    if stale := sorted(VERIFIED.keys() - used):
        raise ValueError(f"VERIFIED may name only what is there, got {stale[0]!r}; remove it")
    return rows


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> list[str]:
    head = list(head)
    lines = [head, ["---"] * len(head), *rows]
    return [f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines]


def render_readme() -> str:
    """The README's table: methods with their papers, then one line a section."""
    rows = methods_table()
    lines = _table(
        ("method", "what", "paper", "shown on"),
        ((f"`{r.name}`", r.what, r.source, r.status) for r in rows if r.section == "method"),
    )
    others = []
    for section, title in SECTIONS.items():
        mine = [row for row in rows if row.section == section]
        if section != "method" and mine:
            statuses = dict.fromkeys(row.status for row in mine)
            shown = (
                next(iter(statuses))
                if len(statuses) == 1
                else "; ".join(f"{', '.join(r.name for r in mine if r.status == s)}: {s}" for s in statuses)
            )
            others.append((title, ", ".join(f"`{row.name}`" for row in mine), shown))
    lines += ["", *_table(("beside them", "names", "shown on"), others), ""]
    lines.append(f"{PLANNED} [Everything, with a line on each](docs/methods.md).")
    return "\n".join(lines) + "\n"


def render_markdown() -> str:
    """The page docs/methods.md: every row, by section."""
    rows = methods_table()
    lines = [
        "# Methods",
        "",
        f"Generated from the tables in the source by `{REFRESH}`; a test fails where this page is stale. A status says "
        "what a row was shown on, and nothing more; `longspan doctor` says what your machine shows. *Run* is on "
        "ranks of `torch.distributed`, *emulate* is all ranks in one process ([Schedules](schedules.md)).",
    ]
    for section, title in SECTIONS.items():
        mine = [row for row in rows if row.section == section]
        sources = any(row.source for row in mine)
        head = ("name", "what", *(("source",) if sources else ()), "shown on")
        body = ((f"`{r.name}`", r.what, *((r.source,) if sources else ()), r.status) for r in mine)
        lines += ["", f"## {title}", "", f"Chosen by {CHOSEN_BY[section]}.", "", *_table(head, body)]
    return "\n".join([*lines, "", "## Not here yet", "", PLANNED]) + "\n"


def render_text() -> str:
    """The catalogue for a terminal: a line a row, and in brackets what it, or its whole section, was shown on."""
    rows = methods_table()
    width = max(len(row.name) for row in rows)
    blocks = []
    for section, title in SECTIONS.items():
        mine = [row for row in rows if row.section == section]
        shared = mine[0].status if len({row.status for row in mine}) == 1 else None
        head = title if shared is None else f"{title} [{shared}]"
        own = [f"  {r.name:<{width}}  {r.what}{f' [{r.status}]' if shared is None else ''}" for r in mine]
        blocks.append("\n".join([head, *own]))
    return "\n\n".join([*blocks, PLANNED]).replace("`", "") + "\n"


def print_methods() -> None:
    """What ``longspan methods`` prints."""
    sys.stdout.write(render_text())


def pages(root: Path) -> dict[Path, str]:
    """The files that hold the catalogue and what they should say.

    Raises:
        ValueError: README.md or its markers are not there.
    """
    readme, page = root / "README.md", root / "docs" / "methods.md"
    if not readme.is_file() or not page.parent.is_dir():
        raise ValueError(f"the catalogue belongs in a checkout with README.md and docs/, got {root}; name its root")
    text = readme.read_text(encoding="utf-8")
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ValueError(f"README.md must hold {BEGIN} and then {END}, once each; put them back")
    before, after = text[: text.index(BEGIN)], text[text.index(END) :]
    return {readme: f"{before}{BEGIN}\n{render_readme()}{after}", page: render_markdown()}


def stale(root: Path) -> list[Path]:
    """The files whose catalogue is not what the tables say."""
    return [
        path
        for path, text in pages(root).items()
        if not path.is_file() or path.read_text(encoding="utf-8") != text
    ]  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    """Prints the catalogue, or with ``--write`` rewrites the files that hold it."""
    parser = argparse.ArgumentParser(prog="python -m longspan.bench.catalogue", description="the catalogue of methods")
    parser.add_argument("--write", action="store_true", help="rewrite README.md and docs/methods.md")
    parser.add_argument("--root", type=Path, default=Path(__file__).parents[3], help="the checkout")
    options = parser.parse_args(argv)
    if not options.write:
        sys.stdout.write(render_markdown())
        return 0
    for path in stale(options.root):
        path.write_text(pages(options.root)[path], encoding="utf-8")
        print(f"wrote {path.relative_to(options.root)}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
