"""Answers that are kept in a cache from run to run, by the fingerprint of all that they depend on.

While `kept_in` is open, `kept` looks an answer up before it is computed, and writes it down after.
What has no fingerprint, and what cannot be written plainly, is computed each time, and logged.

The code that answers depend on is that which is loaded when the first one is asked for: what later
ones import, such as PyTorch's tracer, an answer from the cache does not. What is imported since
stands in the entry, and is looked at again.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from typing import TypeVar

from amp_convert.capture.kept import fingerprint, origins
from amp_convert.core.errors import first_line
from amp_convert.core.files import digests
from amp_convert.core.files.cache import Cache, Entry
from amp_convert.core.files.plain_data import PlainData

_log = logging.getLogger(__name__)
_T = TypeVar("_T")


class _Session:
    """A cache, and the code that was loaded when it was first asked."""

    def __init__(self, cache: Cache) -> None:
        self.cache = cache

    @functools.cached_property
    def code(self) -> tuple[str, frozenset[str]]:
        """The digest of the code, and its files."""
        return fingerprint.of_code(), origins.loaded_code()


_SESSION: ContextVar[_Session | None] = ContextVar("session", default=None)


@contextlib.contextmanager
def kept_in(cache: Cache | None) -> Iterator[None]:
    """Answers are looked up in this cache, and written to it, while this is open."""
    token = _SESSION.set(_Session(cache) if cache is not None else None)
    try:
        yield
    finally:
        _SESSION.reset(token)


def kept(
    kind: str,
    about: Callable[[], str],
    compute: Callable[[], _T],
    write: Callable[[_T], Entry],
    read: Callable[[Entry], _T],
) -> _T:
    """What `compute` gives, or gave before. `kind` says what is asked, `about` gives the digest of
    what it is asked of, code apart; `write` and `read` raise NotPlainError where they cannot."""
    session = _SESSION.get()
    if session is None:
        return compute()
    cache = session.cache
    try:
        code, loaded = session.code
        asked = about()
        key = digests.of_text(f"{kind} {code} {asked}")
    except Exception as error:  # noqa: BLE001  the model's own objects are asked, and may raise
        _log.info("%s: not kept: %s", kind, first_line(error))
        return compute()
    try:
        entry = cache.get(key)
        if entry is not None and _is_of_today(entry):
            found = read(Entry(entry.document["answer"], entry.tensors))
            _log.info("%s: kept from before", kind)
            return found
    except Exception as error:  # noqa: BLE001  whatever a foreign file leads to
        _log.info("%s: what was kept is left aside: %s", kind, first_line(error))
    answer = compute()
    try:
        # What is not left as it was is another thing the next time.
        if about() != asked:
            _log.info("%s: not kept: computing it changed the model or its surroundings", kind)
            return answer
        made = write(answer)
        imported = dict(origins.loaded_since(loaded))
        cache.put(key, Entry({"imported": imported, "answer": made.document}, made.tensors))
    except Exception as error:  # noqa: BLE001  see above
        _log.info("%s: not kept: %s", kind, first_line(error))
    return answer


def kept_plainly(
    kind: str, about: Callable[[], str], compute: Callable[[], _T], plain: PlainData
) -> _T:
    """`kept`, for an answer that is plain data."""

    def read(entry: Entry) -> _T:
        found: _T = plain.read(entry.document)
        return found

    return kept(kind, about, compute, lambda answer: Entry(plain.write(answer)), read)


def _is_of_today(entry: Entry) -> bool:
    """Whether what was imported while the answer was computed is still what it was."""
    files: Mapping[str, str] = entry.document.get("imported", {})
    return all(origins.of_file(file) == digest for file, digest in files.items())
