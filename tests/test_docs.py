"""Runs what README.md, docs/ and examples/ tell a reader to run; tests/doc_blocks.py says how it is marked."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from tests.data import REPOSITORY
from tests.doc_blocks import Block, blocks, ranks_of_example
from tests.ranks import run_ranks

PAGES = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").rglob("*.md"))]
EXAMPLES = sorted((REPOSITORY / "examples").glob("*.py"))
SCRIPTS = Path(sys.executable).parent  # the environment's own, whatever is on PATH
COMMAND_S = 300


def _python(rank: int, world: int, code: str, name: str, folder: str) -> None:
    os.chdir(folder)
    if world == 1:
        dist.destroy_process_group()  # a reader's script has none
    exec(compile(code, name, "exec"), {"__name__": "__main__"})


def _run(command: list[str], folder: Path, where: str) -> None:
    environment = os.environ | {"PATH": f"{SCRIPTS}{os.pathsep}{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command,
        cwd=folder,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=COMMAND_S,
        check=False,
    )
    assert done.returncode == 0, (
        f"{where}: exit code {done.returncode} from {shlex.join(command)}\n{done.stdout[-6000:]}"
    )


def _run_block(block: Block, page: str, folder: Path) -> None:
    where = f"{page}:{block.line}"
    if block.language == "python":
        # Blank lines in front, so that a traceback's line is the page's.
        code = block.text if block.continues else "\n" * block.line + block.text
        run_ranks(_python, block.num_ranks, code, where, str(folder), timeout_s=COMMAND_S)
        return
    for command in block.commands:
        words = shlex.split(command)
        if words[0] == "make":
            # The target and its recipe exist; tests do not start the test run again.
            _run(["make", "--dry-run", "-C", str(REPOSITORY), *words[1:]], folder, where)
        else:
            _run([str(SCRIPTS / words[0]), *words[1:]], folder, where)


_LONG = ("finetuning.md",)  # several runs of training, of which tests/train/test_finetune.py has shorter ones


def _page(page: Path) -> Any:
    marks = [pytest.mark.slow] if page.name in _LONG else []
    return pytest.param(page, id=str(page.relative_to(REPOSITORY)), marks=marks)


@pytest.mark.timeout(900)
@pytest.mark.parametrize("page", [_page(page) for page in PAGES])
def test_page(page: Path, tmp_path: Path) -> None:
    for block in blocks(page.read_text(encoding="utf-8")):
        _run_block(block, page.name, tmp_path)


@pytest.mark.timeout(COMMAND_S + 30)
@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example.name)
def test_example(example: Path, tmp_path: Path) -> None:
    num_ranks = ranks_of_example(example.read_text(encoding="utf-8"))
    launch = (
        [sys.executable]
        if num_ranks is None
        else [str(SCRIPTS / "torchrun"), "--standalone", "--nproc-per-node", str(num_ranks)]
    )
    _run([*launch, str(example)], tmp_path, example.name)


def test_links_between_files_of_the_repository_lead_somewhere() -> None:
    for page in (*PAGES, REPOSITORY / "CONTRIBUTING.md", REPOSITORY / "CHANGELOG.md"):
        text = re.sub(r"^(```+).*?^\1", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
        text = re.sub(r"`[^`\n]*`", "code", text)
        for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text):
            if "://" not in target and not target.startswith("mailto:"):
                assert (page.parent / target).exists(), f"{page.name} links to {target}, which is not there"


PAGE = """
<!-- run: ranks 2 -->
```python
x = 1
```

<!-- continues -->

```python
x += 1
```

```console
$ longspan methods \\
>   --all
ring   implemented
$ make demo   # two minutes
```

```text
not run
```

<!-- no-run: needs two machines -->
```bash
srun anything
```
"""


def test_blocks_of_a_page() -> None:
    first, second, third = blocks(PAGE)
    assert (first.line, first.language, first.text, first.num_ranks) == (3, "python", "x = 1", 2)
    assert (second.text, second.num_ranks, second.continues) == ("x = 1\nx += 1", 2, True)
    assert third.commands == ["longspan methods    --all", "make demo"]


@pytest.mark.parametrize(
    ("page", "says"),
    [
        ("```bash\npip install x\n```", "no-run and why"),
        ("<!-- no-run -->\n```bash\nlongspan train\n```", "must say why"),
        ("<!-- run: ranks many -->\n```python\n```", "ranks N"),
        ("<!-- continues -->\n```python\n```", "no Python block"),
        ("<!-- run: ranks 2 -->\nSome words.\n\n```python\n```", "before no code block"),
        ("<!-- run: ranks 2 -->\n```text\n```", "never run"),
        ("```python\nx = 1\n", "never closes"),
    ],
)
def test_nothing_is_passed_over_in_silence(page: str, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        blocks(page)


def test_a_block_that_fails_is_found(tmp_path: Path) -> None:
    (block,) = blocks("words\n\n```python\nx = 1\nassert x == 2\n```")
    with pytest.raises(RuntimeError, match=r'page\.md:3", line 5'):
        _run_block(block, "page.md", tmp_path)
    (block,) = blocks("```bash\nmake no-such-target\n```")
    with pytest.raises(AssertionError, match=r"page\.md:1: exit code 2"):
        _run_block(block, "page.md", tmp_path)


def test_what_an_example_asks_for() -> None:
    assert ranks_of_example("import torch\n") is None
    assert ranks_of_example('"""Ring."""\n# run: ranks 3\n') == 3
    with pytest.raises(ValueError, match="once"):
        ranks_of_example("# run: ranks 0\n")
