"""The shape of the package, read from its source: imports point one way, files stay small, no habit creeps in.

Each rule is a function from one parsed file to what is wrong with it, so that the rules themselves are tested below.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import io
import pkgutil
import re
import sys
import tokenize
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.data import REPOSITORY

# A package may import itself and those before it.
ORDER = (
    "hardware",
    "layout",
    "attention",
    "mixers",
    "context",
    "compat",
    "model",
    "plan",
    "train",
    "compress",
    "serve",
    "tasks",
    "bench",
    "cli",
)
MAX_LINES = 400
# What a module of the package may import as it loads; anything else is imported where it is used.
LIGHT = frozenset(
    {
        "__future__",
        "jaxtyping",
        "longspan",
        "numpy",
        "psutil",
        "rich",
        "safetensors",
        "torch",
        "tyro",
        "typing_extensions",
    }
)
# Oracles of the tests: the package itself must do without.
NEVER = frozenset({"transformers", "accelerate", "peft"})
# But for the way into a library, and for a benchmark beside it: inside functions, never as the module loads.
BRIDGES = {"longspan.context.hf_attention": "transformers", "longspan.bench.peers": "transformers"}
# Modules that are a back end, and what they need as they load: they themselves are imported inside functions.
BACK_ENDS = {
    "longspan.attention.merge_cuda": "triton",
    "longspan.model.loss_cuda": "triton",
    "longspan.train.adamw_cuda": "triton",
}
BROAD = frozenset({"Exception", "BaseException"})
# Spelt in two halves, so that this file does not break its own rule.
MACHINE_PATH = re.compile("/" + r"(work|root|home|Users)/\w")


class Source(NamedTuple):
    """One Python file: `name` is the module's dotted name, `folder` whether it is a package's `__init__`."""

    path: str
    name: str
    folder: bool
    text: str
    tree: ast.Module

    @classmethod
    def parse(cls, text: str, name: str = "longspan.model.example", folder: bool = False) -> Source:
        return cls(f"{name}.py", name, folder, text, ast.parse(text))


class Import(NamedTuple):
    line: int
    module: str
    names: tuple[str, ...]
    at_load: bool  # not inside a function


def imports(source: Source) -> Iterator[Import]:
    """Every import of the file, relative ones resolved; also `import_module("...")` with a literal name."""
    inside = {
        id(node)
        for function in ast.walk(source.tree)
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for node in ast.walk(function)
    }
    for node in ast.walk(source.tree):
        at_load = id(node) not in inside
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(node.lineno, alias.name, (), at_load)
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            if node.level:
                package = source.name if source.folder else source.name.rpartition(".")[0]
                module = importlib.util.resolve_name("." * node.level + module, package)
            yield Import(node.lineno, module, tuple(alias.name for alias in node.names), at_load)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).rpartition(".")[2] == "import_module":
            first = node.args[0] if node.args else None
            if isinstance(first, ast.Constant) and isinstance(first.value, str):
                yield Import(node.lineno, first.value, (), at_load)


def _packages(found: Import) -> Iterator[str]:
    """The packages of longspan that an import touches ("" for longspan itself)."""
    parts = found.module.split(".")
    if parts[0] != "longspan":
        return
    if len(parts) > 1:
        yield parts[1]
    else:
        yield from (name if name in ORDER else "" for name in found.names or ("",))


def import_order(source: Source) -> Iterator[str]:
    parts = source.name.split(".")
    if parts == ["longspan"] or parts[1] in {"__main__", "__init__"}:
        mine = -1 if parts == ["longspan"] else len(ORDER)
    elif parts[1] not in ORDER:
        yield f"longspan.{parts[1]} has no place in the order of packages"
        return
    else:
        mine = ORDER.index(parts[1])
    for found in imports(source):
        for package in _packages(found):
            if package and (package not in ORDER or ORDER.index(package) > mine):
                yield f"line {found.line}: imports longspan.{package}, which is not below it"


def light_imports(source: Source) -> Iterator[str]:
    for found in imports(source):
        root = found.module.split(".")[0]
        if root in NEVER and (found.at_load or BRIDGES.get(source.name) != root):
            yield f"line {found.line}: imports {root}, which only tests may need"
        elif found.at_load and found.module in BACK_ENDS:
            yield f"line {found.line}: imports {found.module} as it loads, which needs {BACK_ENDS[found.module]}"
        elif found.at_load and BACK_ENDS.get(source.name) == root:
            continue
        elif found.at_load and root not in LIGHT and root not in sys.stdlib_module_names:
            yield f"line {found.line}: imports {root} as it loads: import it inside the function that needs it"


def small(source: Source) -> Iterator[str]:
    if (lines := source.text.count("\n")) > MAX_LINES:
        yield f"{lines} lines, at most {MAX_LINES}: two ideas may live here"


def docstring(source: Source) -> Iterator[str]:
    if source.tree.body and not ast.get_docstring(source.tree):
        yield "no docstring says what this file is"


def no_star(source: Source) -> Iterator[str]:
    for found in imports(source):
        if "*" in found.names:
            yield f"line {found.line}: star import of {found.module}"


def broad_except(source: Source) -> Iterator[str]:
    """A handler for everything raises again, or says why in words on its own line."""
    comments = {
        token.start[0]: token.string
        for token in tokenize.generate_tokens(io.StringIO(source.text).readline)
        if token.type == tokenize.COMMENT
    }
    for node in ast.walk(source.tree):
        if not isinstance(node, ast.ExceptHandler):
            continue
        kinds = {ast.unparse(kind) for kind in ast.walk(node.type)} if node.type else BROAD
        reason = re.sub(r"^#\s*(noqa|type:|pyright:|pragma)\S*(\s*[A-Z]+\d+,?)*", "", comments.get(node.lineno, ""))
        last = node.body[-1]
        again = isinstance(last, ast.Raise) and last.exc is None
        if kinds & BROAD and not again and len(reason.split()) < 3:
            yield f"line {node.lineno}: catches everything, and no comment on that line says why"


def no_machine_path(source: Source) -> Iterator[str]:
    for number, line in enumerate(source.text.splitlines(), 1):
        if MACHINE_PATH.search(line):
            yield f"line {number}: the path of one machine"


def independent_oracle(source: Source) -> Iterator[str]:
    if source.name.startswith("tests.oracles"):
        for found in imports(source):
            if found.module.split(".")[0] == "longspan":
                yield f"line {found.line}: an oracle imports what it judges"


Rule = Callable[[Source], Iterator[str]]
EVERYWHERE: tuple[Rule, ...] = (small, no_star, broad_except, no_machine_path, independent_oracle)
IN_PACKAGE: tuple[Rule, ...] = (import_order, light_imports, docstring)


def _read(folder: Path, name: str) -> list[Source]:
    sources = []
    for path in sorted(folder.rglob("*.py")):
        parts = (name, *path.relative_to(folder).with_suffix("").parts)
        package = parts[-1] == "__init__"
        text = path.read_text(encoding="utf-8")
        tree = ast.parse(text, filename=str(path))
        sources.append(
            Source(str(path.relative_to(REPOSITORY)), ".".join(parts[: -1 if package else None]), package, text, tree)
        )
    return sources


PACKAGE = _read(REPOSITORY / "src" / "longspan", "longspan")
TESTS = _read(REPOSITORY / "tests", "tests")


@pytest.mark.parametrize("rule", IN_PACKAGE, ids=lambda rule: rule.__name__)
def test_package(rule: Rule) -> None:
    assert PACKAGE
    assert not [f"{source.path}: {wrong}" for source in PACKAGE for wrong in rule(source)]


@pytest.mark.parametrize("rule", EVERYWHERE, ids=lambda rule: rule.__name__)
def test_package_and_tests(rule: Rule) -> None:
    assert not [f"{source.path}: {wrong}" for source in (*PACKAGE, *TESTS) for wrong in rule(source)]


@pytest.mark.parametrize("top", ["src/longspan", "tests"])
def test_every_folder_of_python_is_a_package(top: str) -> None:
    folders = {path.parent for path in (REPOSITORY / top).rglob("*.py")}
    assert not [str(folder) for folder in folders if not (folder / "__init__.py").exists()]


def test_what_a_package_exports_is_there() -> None:
    import longspan

    names = [
        "longspan",
        *(f"longspan.{found.name}" for found in pkgutil.iter_modules(longspan.__path__) if found.ispkg),
    ]
    for name in names:
        module = importlib.import_module(name)
        exported = getattr(module, "__all__", [])
        assert len(set(exported)) == len(exported), f"{name}.__all__ repeats a name"
        for export in exported:
            assert hasattr(module, export), f"{name}.__all__ names {export}, which is not there"


@pytest.mark.parametrize(
    ("rule", "good", "bad"),
    [
        (import_order, "from longspan.attention import masks", "from longspan.train import loop"),
        (import_order, "from longspan import __version__, context", "from longspan import train"),
        (import_order, "import torch", "def f():\n    import longspan.cli"),
        (import_order, "from . import loss", "from ..serve import engine"),
        (import_order, "import_module('longspan.model.decoder')", "importlib.import_module('longspan.bench')"),
        (light_imports, "def f():\n    import tokenizers", "import tokenizers"),
        (light_imports, "import torch.distributed", "def f():\n    from transformers import AutoModel"),
        (small, "x = 1\n" * MAX_LINES, "x = 1\n" * (MAX_LINES + 1)),
        (docstring, '"""What it is."""\nx = 1', "x = 1"),
        (no_star, "from math import pi", "from math import *"),
        (broad_except, "try:\n    f()\nexcept OSError:\n    pass", "try:\n    f()\nexcept:\n    pass"),
        (
            broad_except,
            "try:\n    f()\nexcept Exception:  # a plug-in may raise anything\n    pass",
            "try:\n    f()\nexcept (OSError, Exception):  # noqa: BLE001\n    pass",
        ),
        (
            broad_except,
            "try:\n    f()\nexcept BaseException:\n    undo()\n    raise",
            "try:\n    f()\nexcept BaseException as e:\n    raise SystemExit(1) from e",
        ),
        (no_machine_path, "x = '/tmp/x'", "x = '/" + "home/me/data'"),
    ],
)
def test_rules_bite(rule: Rule, good: str, bad: str) -> None:
    assert not list(rule(Source.parse(good)))
    assert list(rule(Source.parse(bad)))


def test_an_oracle_imports_nothing_from_the_package() -> None:
    text = "from longspan.attention import masks"
    assert list(independent_oracle(Source.parse(text, name="tests.oracles.attention")))
    assert not list(independent_oracle(Source.parse(text, name="tests.attention.test_masks")))


def test_a_new_package_needs_a_place_in_the_order() -> None:
    assert list(import_order(Source.parse("", name="longspan.novelty")))
    assert not list(import_order(Source.parse("", name="longspan.cli")))
    assert list(import_order(Source.parse("from longspan import model", name="longspan", folder=True)))
