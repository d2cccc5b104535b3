"""Text of others on a line of ours: names come from models and files, so they could drive a
terminal, break XML, reorder a line, or fill pages."""

from __future__ import annotations

import re

_UNPRINTABLE = re.compile(
    "[\x00-\x1f\x7f-\x9f\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufdd0-\ufdef\ufeff"
    "\ufff9-\uffff\ud800-\udfff\U000e0000-\U000e007f]"
)


def printable(text: str) -> str:
    """`text` with control, invisible and text-direction characters shown as escapes."""
    return _UNPRINTABLE.sub(lambda match: ascii(match[0])[1:-1], text)


def is_text(text: str) -> bool:
    """Whether `text` can be a path and be written to a file: no NUL, and no half of a character."""
    return "\0" not in text and not any("\ud800" <= c <= "\udfff" for c in text)


def clip(text: str, width: int) -> str:
    """`text` in at most `width` characters, the middle left out: both ends of a name matter."""
    if len(text) <= width:
        return text
    tail = (width - 1) * 3 // 5
    return f"{text[: width - 1 - tail]}…{text[len(text) - tail :]}"


def one_line(text: str, width: int) -> str:
    """`text` printable and on one line of at most `width` characters."""
    # Clipped twice: escapes make it longer, and a page need not be escaped to be cut.
    return clip(printable(clip(text, width)), width)
