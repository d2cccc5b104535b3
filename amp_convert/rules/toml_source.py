"""Where in the text of a TOML file each thing stands.

tomllib gives no lines; they come from the text with strings and comments blanked out, where what
looks like a key is one.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property

_OPAQUE = re.compile(
    r'"""(?:\\.|[^\\])*?"{3,5}' r"|'''.*?'{3,5}" r'|"(?:\\.|[^"\\\n])*"' r"|'[^'\n]*'" r"|#[^\n]*",
    re.DOTALL,
)


@dataclass(frozen=True)
class TomlSource:
    """The text of a file, and the lines where its headers and keys stand."""

    shown: str
    text: str

    @cached_property
    def lines(self) -> list[str]:
        return _OPAQUE.sub(lambda m: re.sub(r"[^\n]", " ", m[0]), self.text).split("\n")

    @cached_property
    def headers(self) -> list[int]:
        header = re.compile(r"\s*\[\[\s*rule\s*\]\]")
        return [n for n, line in enumerate(self.lines, 1) if header.match(line)]

    def at(self, line: int) -> str:
        return f"{self.shown}:{line}"

    def at_key(self, key: str, start: int = 0) -> str:
        """Where `key` or table `[key]` is written: in the table headed at line `start`, if any."""
        sought = re.compile(rf"\s*+\[*+\s*+{re.escape(key)}\s*+[=.\]]")
        for number, line in enumerate(self.lines[start:], start + 1):
            if sought.match(line):
                return self.at(number)
            if start and line.lstrip().startswith("["):
                break
        return self.at(max(start, 1))
