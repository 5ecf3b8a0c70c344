"""HTML and SVG elements as strings that cannot carry an injection: every child that is not `Raw` is escaped.

The output is well-formed XML and HTML at once, so that a strict parser can check it.
"""

from __future__ import annotations

import html
import unicodedata
from collections.abc import Iterable

_VOID = frozenset(["meta", "link", "br", "hr", "col", "rect", "line", "path", "circle", "polyline", "polygon"])


class Raw(str):
    """Markup that is safe as it stands. Only this module and constants of the package make it."""

    __slots__ = ()


Child = str | int | float | Iterable["Child"] | None


def tag(name: str, /, *children: Child, **attributes: object) -> Raw:
    """One element: ``tag("p", "a < b", class_="note")``.

    Args:
        name: the element's name.
        children: text (escaped), `Raw` markup (kept), lists of both; None is left out.
        attributes: ``data_x`` becomes ``data-x``, ``class_`` becomes ``class``; None and False are left out, True
            becomes ``name="name"``.
    """
    words = [name]
    for key, value in attributes.items():
        if value is None or value is False:
            continue
        key = key.rstrip("_").replace("_", "-")
        words.append(f'{key}="{html.escape(clean(key if value is True else number(value)))}"')
    opening = " ".join(words)
    if name in _VOID and not children:
        return Raw(f"<{opening}/>")
    return Raw(f"<{opening}>{join(children)}</{name}>")


def join(children: Child, separator: str = "") -> Raw:
    """Children as one piece of markup, escaped where they are not `Raw`."""
    if children is None:
        return Raw("")
    if isinstance(children, Raw):
        return children
    if isinstance(children, str | int | float):
        return Raw(html.escape(clean(number(children)), quote=False))
    return Raw(separator.join(join(child) for child in children))


def number(value: object) -> str:
    """Text of an attribute or child; floats with two decimals at most, which is a hundredth of a pixel."""
    if isinstance(value, float):
        text = f"{value:.2f}".rstrip("0").rstrip(".")
        return "0" if text == "-0" else text
    return str(value)


def clean(text: str) -> str:
    """Makes visible what no document may carry: control characters as their symbols, lone surrogates as U+FFFD."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(_visible(character) for character in text)


def _visible(character: str) -> str:
    code = ord(character)
    if character in "\n\t":
        return character
    if code < 0x20:
        return chr(0x2400 + code)
    if code == 0x7F:
        return "\u2421"
    if unicodedata.category(character) in ("Cc", "Cs") or code & 0xFFFE == 0xFFFE:
        return "\ufffd"
    return character
