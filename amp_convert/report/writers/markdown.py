"""Markdown that shows any text as it is, on GitHub and elsewhere.

Text from a model is made harmless with numeric character references: CommonMark never takes one
for markup, and a table never takes one for a cell border.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from amp_convert.report import text as fmt

# An underscore inside a word is no markup, and names are full of them.
_MARKUP = re.compile(r"[&<>\\`*\[\]|~#!@$]|(?<!\w)_|_(?!\w)|:(?=//)|(?<=www)\.")
_PUNCTUATION = re.compile(r"[!-/:-@\[-`{-~]")


def _reference(match: re.Match[str]) -> str:
    return f"&#{ord(match[0])};"


def escape(text: str) -> str:
    """Prose on one line, with nothing in it read as markup."""
    return _MARKUP.sub(_reference, fmt.printable(text))


def code(text: str) -> str:
    """A name in code type; empty stays empty."""
    shown = fmt.printable(text)
    if not shown:
        return ""
    if shown.strip() != shown or any(mark in shown for mark in "`|\\"):
        return f"<code>{_PUNCTUATION.sub(_reference, shown)}</code>"
    return f"`{shown}`"


def table(header: Sequence[str], rows: Sequence[Sequence[str]], numbers: str = "") -> list[str]:
    """Lines of a table. `header` and `rows` are Markdown; `numbers` names right-aligned columns
    by their index, as in "12"."""
    rule = ["---:" if str(index) in numbers else "---" for index in range(len(header))]
    return [f"| {' | '.join(cells)} |" for cells in (header, rule, *rows)]
