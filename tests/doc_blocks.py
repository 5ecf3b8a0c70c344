"""Finds what README.md and docs/*.md tell a reader to run, so that a test can run it.

A page is run from top to bottom in one empty folder, as a person would. What a fence holds is said by its info string;
an HTML comment on the line before the fence says what differs:

| fence | what is done |
|---|---|
| `python` | run as a script of its own |
| `python` after `<!-- run: ranks 2 -->` | run on two ranks joined by gloo, with the default process group up |
| `python` after `<!-- continues -->` | run after the Python block before it, in the same script |
| `bash`, `sh`, `console` (its `$ ` lines) | `longspan` and `torchrun` are run; of `make`, the target must exist |
| any of them after `<!-- no-run: reason -->` | not run; the reason is required |

Other fences are text. A command of any other kind needs `no-run`: nothing is passed over in silence.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

PYTHON = frozenset({"python", "py"})
SHELL = frozenset({"bash", "sh", "shell", "console"})
COMMANDS = ("longspan", "torchrun", "make")

_FENCE = re.compile(r"^(?P<indent> *)(?P<ticks>```+|~~~+) *(?P<language>[\w+-]*)(?P<rest>[^`]*)$")
_COMMENT = re.compile(r"^\s*<!--\s*(?P<key>no-run|run|continues)\b:?\s*(?P<value>.*?)\s*-->\s*$")


@dataclass(frozen=True)
class Block:
    """One thing to run. `line` is where its fence opens; `num_ranks` is for Python, 1 elsewhere."""

    line: int
    language: str  # "python" or "shell"
    text: str
    num_ranks: int = 1
    continues: bool = False

    @property
    def commands(self) -> list[str]:
        """The commands of a shell block, one a line, continued lines joined, output and comments left out."""
        lines = self.text.splitlines()
        if any(line.startswith("$ ") for line in lines):
            joined = re.sub(r"\\\n(> )?", " ", self.text).splitlines()
            lines = [line[2:] for line in joined if line.startswith("$ ")]
        else:
            lines = self.text.replace("\\\n", " ").splitlines()
        commands = (re.sub(r"\s+#\s.*$", "", line).strip() for line in lines)
        return [command for command in commands if command and not command.startswith("#")]


def blocks(text: str) -> list[Block]:
    """The runnable blocks of a Markdown page, in order.

    Raises:
        ValueError: a fence that never closes, an instruction that means nothing where it stands, a `no-run` with no
            reason, or a shell command that is neither run nor excused. Says the line.
    """
    found: list[Block] = []
    lines = text.splitlines()
    number, note = 0, None
    while number < len(lines):
        if comment := _COMMENT.match(lines[number]):
            note = (number + 1, comment["key"], comment["value"])
            number += 1
            continue
        fence = _FENCE.match(lines[number])
        if fence is None:
            if note and lines[number].strip():
                raise ValueError(f"line {note[0]}: <!-- {note[1]} --> stands before no code block")
            number += 1
            continue
        end = number + 1
        while end < len(lines) and lines[end].strip() != fence["ticks"]:
            end += 1
        if end == len(lines):
            raise ValueError(f"line {number + 1}: this code block never closes")
        indent = len(fence["indent"])
        body = "\n".join(line[indent:] for line in lines[number + 1 : end])
        if block := _block(number + 1, fence["language"].lower(), body, note, found):
            found.append(block)
        number, note = end + 1, None
    return found


def _block(line: int, language: str, body: str, note: tuple[int, str, str] | None, before: list[Block]) -> Block | None:
    _, key, value = note or (0, "", "")
    if language not in PYTHON | SHELL:
        if note:
            raise ValueError(
                f"line {line}: <!-- {key} --> stands before a block that is never run ({language or 'text'})"
            )
        return None
    if key == "no-run":
        if len(value.split()) < 2:
            raise ValueError(f"line {line}: <!-- no-run --> must say why, as in <!-- no-run: needs two machines -->")
        return None
    if language in SHELL:
        if note:
            raise ValueError(f"line {line}: <!-- {key} --> stands before commands, which only no-run changes")
        block = Block(line, "shell", body)
        for command in block.commands:
            if command.split()[0] not in COMMANDS:
                raise ValueError(
                    f"line {line}: {command!r} would not be run: begin with {COMMANDS}, or say no-run and why"
                )
        return block
    num_ranks = 1
    if key == "run":
        ranks = re.fullmatch(r"ranks ([1-9])", value)
        if ranks is None:
            raise ValueError(f"line {line}: expected <!-- run: ranks N --> with N from 1 to 9, got {value!r}")
        num_ranks = int(ranks[1])
    if key == "continues":
        earlier = [block for block in before if block.language == "python"]
        if not earlier:
            raise ValueError(f"line {line}: <!-- continues --> comes after no Python block that is run")
        return Block(line, "python", f"{earlier[-1].text}\n{body}", earlier[-1].num_ranks, continues=True)
    return Block(line, "python", body, num_ranks)


def ranks_of_example(text: str) -> int | None:
    """What a file of examples/ asks for: `# run: ranks N` on a line of its own, else None for a plain script."""
    asked = re.findall(r"^# run: (.*)$", text, flags=re.MULTILINE)
    if not asked:
        return None
    ranks = re.fullmatch(r"ranks ([1-9])", asked[0])
    if len(asked) > 1 or ranks is None:
        raise ValueError(f"an example says '# run: ranks N' once, with N from 1 to 9, got {asked}")
    return int(ranks[1])
