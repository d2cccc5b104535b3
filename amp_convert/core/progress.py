"""Who is told how far a run is."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Protocol

_log = logging.getLogger(__name__)


OnNode = Callable[[int, int], None]
"""Told of each node that is done: how many are, of how many."""


def unwatched(done: int, nodes: int) -> None:
    """Nobody is told."""


class Progress(Protocol):
    """Who is told how far a run is."""

    def stage(self, name: str, steps: int | None = None) -> None:
        """A stage begins; `steps` is how many there will be, if that is known."""

    def advance(self) -> None:
        """One step of the current stage is done."""

    def node(self, done: int, nodes: int) -> None:
        """Of the current step, which goes through a graph of so many nodes, so many are done."""

    def say(self, text: str) -> None:
        """Something that the user should know now; a sentence or a clause."""

    def interruptible(self) -> AbstractContextManager[Callable[[], bool]]:
        """While this is open, the user may ask the stage to stop; gives whether that was asked."""


class Silent:
    """Progress that nobody watches."""

    def stage(self, name: str, steps: int | None = None) -> None:
        """A stage begins."""

    def advance(self) -> None:
        """One step of it is done."""

    def node(self, done: int, nodes: int) -> None:
        """Some nodes of it are done."""

    def say(self, text: str) -> None:
        """Something that the user should know now goes to the log."""
        _log.warning("%s", text)

    def interruptible(self) -> AbstractContextManager[Callable[[], bool]]:
        """Nobody asks to stop."""
        return contextlib.nullcontext(lambda: False)


class Logged:
    """Progress that is also told to the log."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress

    def stage(self, name: str, steps: int | None = None) -> None:
        _log.info("%s", name)
        self._progress.stage(name, steps)

    def advance(self) -> None:
        self._progress.advance()

    def node(self, done: int, nodes: int) -> None:
        self._progress.node(done, nodes)

    def say(self, text: str) -> None:
        _log.info("%s", text)
        self._progress.say(text)

    def interruptible(self) -> AbstractContextManager[Callable[[], bool]]:
        return self._progress.interruptible()
