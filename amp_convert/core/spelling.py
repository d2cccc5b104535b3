"""What somebody may have meant by a word that nobody knows."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

_LONGEST = 200


def nearest(word: str, known: Iterable[str]) -> str:
    """The known word that is nearest to `word`, "" where none is near. No word of a file makes this
    slow: none of more than 200 characters is near to anything."""
    if len(word) > _LONGEST:
        return ""
    return next(iter(difflib.get_close_matches(word, list(known), n=1)), "")
