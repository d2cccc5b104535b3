"""Where a run's output goes while it works: progress to stderr, the result to the real stdout.

The user's own code runs in this process. Its prints go to stderr, so that stdout holds the result
and nothing else, and what libraries say about their own code is held back unless `--debug` asks.
Importing this module does not import torch.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any, TextIO, cast

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    Task,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)
from rich.text import Text

_LIBRARIES = ("torch", "transformers")


class Bar:
    """The pipeline's progress on stderr: a bar on a terminal, a line a stage elsewhere."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bar = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            _Steps(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[nodes]}"),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._task: TaskID | None = None
        self._steps = 0

    def __enter__(self) -> Bar:
        self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.stop()

    def stage(self, name: str, steps: int | None = None) -> None:
        """Replace the current bar by one for this stage."""
        if not self._console.is_terminal:
            self._console.print(f"{name} ...")
            return
        if self._task is not None:
            self._bar.remove_task(self._task)
        self._steps = 0
        self._task = self._bar.add_task(name, total=steps, nodes="")

    def advance(self) -> None:
        """Move the current bar on by one step."""
        self._steps += 1
        if self._task is not None:
            self._bar.update(self._task, completed=self._steps, nodes="")

    def node(self, done: int, nodes: int) -> None:
        """Move the current bar on within a step, and say where that is."""
        if self._task is not None:
            said = f"node {done:,} of {nodes:,}" if done < nodes else ""
            self._bar.update(self._task, completed=self._steps + done / nodes, nodes=said)

    def say(self, text: str) -> None:
        """Print a line above the bar."""
        self._console.print(Text(text), soft_wrap=True)

    @contextlib.contextmanager
    def interruptible(self) -> Iterator[Callable[[], bool]]:
        """Let the first Ctrl-C ask the stage to stop, and only the second one break it off."""
        asked = threading.Event()
        if threading.current_thread() is not threading.main_thread():
            yield asked.is_set  # only the main thread may handle signals
            return

        here = os.getpid()

        def ask(*_: object) -> None:
            if os.getpid() != here:
                return  # a worker that the user's code has forked: it goes on, so that we can
            if asked.is_set():
                raise KeyboardInterrupt
            asked.set()
            self.say("stopping after this step; Ctrl-C again breaks off")

        before = signal.signal(signal.SIGINT, ask)
        try:
            yield asked.is_set
        finally:
            signal.signal(signal.SIGINT, before)


class _Steps(ProgressColumn):
    """ "3/8", and nothing for a stage whose number of steps is not known."""

    def render(self, task: Task) -> Text:
        done = math.floor(task.completed)
        return Text("" if task.total is None else f"{done:g}/{task.total:g}")


class _Kept:
    """A stream that the user's code cannot close: what we say next goes there, too."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def close(self) -> None:
        """Nothing is closed."""
        self._stream.flush()


@contextlib.contextmanager
def running(debug: bool) -> Iterator[tuple[Console, Bar]]:
    """The console for the result, and the progress bar, while the user's prints go to stderr. With
    `debug`, so does what amp-convert tells its log."""
    result = Console(file=sys.stdout, highlight=False)
    kept = cast(TextIO, _Kept(sys.stderr))
    with (
        contextlib.redirect_stderr(kept),
        contextlib.redirect_stdout(kept),
        _logged() if debug else _quiet(),
        Bar(Console(stderr=True, highlight=False)) as bar,
    ):
        yield result, bar


@contextlib.contextmanager
def _logged() -> Iterator[None]:
    """Show what amp-convert logs."""
    logger, handler = logging.getLogger("amp_convert"), logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(name)s: %(message)s"))
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hold back the warnings and log lines of libraries about their own code; keep errors."""
    # Importing torch sets the levels of its loggers, so it has to come first.
    import torch  # noqa: F401

    loggers = [logging.getLogger(name) for name in _LIBRARIES]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        for module in (*(rf"{name}(\.|$)" for name in _LIBRARIES), "copyreg$"):
            warnings.filterwarnings("ignore", module=module)
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


def say_renamed(former: str, name: str) -> None:
    """Say that a name still holds, and what it is now."""
    Console(stderr=True, highlight=False).print(Text(f"{former} is now {name}"), style="dim")


def reserve_stdout() -> None:
    """Give `sys.stdout` a descriptor of its own, and let descriptor 1 lead to stderr.

    For a whole process only: what C code and child processes write to stdout then cannot get into
    the result either. Characters that the terminal's encoding lacks are written as "?". A stream
    that was closed before the start leads nowhere.
    """
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest that is free: this one
    sys.stdout = sys.stdout or open(1, "w", closefd=False)  # noqa: SIM115
    sys.stderr = sys.stderr or open(2, "w", closefd=False)  # noqa: SIM115
    result = open(os.dup(1), "w", encoding=sys.stdout.encoding, errors="replace")  # noqa: SIM115
    sys.stdout.flush()
    os.dup2(2, 1)
    sys.stdout = result
