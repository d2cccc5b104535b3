"""Progress on both kinds of stderr, and what is held back of the libraries' talk."""

from __future__ import annotations

import contextlib
import io
import logging
import re
import sys
import warnings

import pytest
from rich.console import Console

from amp_convert.cli.console import Bar, running

TORCH = logging.getLogger("torch.fx.experimental.symbolic_shapes")
TRANSFORMERS = logging.getLogger("transformers.modeling_utils")


def warn_from(module: str) -> None:
    warnings.warn_explicit("said by a library", UserWarning, "library.py", 1, module=module)


def shown(*, terminal: bool) -> str:
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=terminal, width=80, color_system=None)
    with Bar(console) as bar:
        bar.stage("load")
        bar._bar.refresh()
        bar.stage("calibrate", 4)
        bar.advance()
        bar._bar.refresh()
    return stream.getvalue()


def test_without_a_terminal_each_stage_is_a_line() -> None:
    assert shown(terminal=False) == "load ...\ncalibrate ...\n"


def test_on_a_terminal_a_bar_shows_the_steps_and_goes_away() -> None:
    text = shown(terminal=True)
    lines = [line.strip() for line in re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "\n", text).splitlines()]
    assert any(re.search(r"load \S+ +0:00:00$", line) for line in lines)
    assert any(re.search(r"calibrate .* 1/4 0:00:00$", line) for line in lines)
    assert "?" not in text.replace("[?25", "")
    assert text.endswith("\x1b[1A\x1b[2K")  # up one line, and cleared


def test_what_is_printed_meanwhile_goes_to_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    with running(debug=False) as (console, _):
        sys.stdout.write("by the user\n")
        console.print("the result")
    sys.stdout.write("afterwards\n")
    out, err = capsys.readouterr()
    assert out == "the result\nafterwards\n"
    assert "by the user" in err


@pytest.mark.parametrize("debug", [False, True])
def test_libraries_are_quiet_unless_debugging(debug: bool) -> None:
    with (
        warnings.catch_warnings(record=True) as caught,
        running(debug),
    ):
        warnings.simplefilter("always", append=True)
        warn_from("torch.export")
        warn_from("transformers")
        warn_from("torchish")
        enabled = [logger.isEnabledFor(logging.WARNING) for logger in (TORCH, TRANSFORMERS)]
        assert all(logger.isEnabledFor(logging.ERROR) for logger in (TORCH, TRANSFORMERS))
        assert logging.getLogger("mine").isEnabledFor(logging.WARNING)
    assert enabled == [debug, debug]
    assert len(caught) == (3 if debug else 1)


def test_afterwards_all_is_as_before() -> None:
    loggers = [logging.getLogger(name) for name in ("torch", "transformers")]
    before = [logger.level for logger in loggers], list(warnings.filters), sys.stdout
    with contextlib.suppress(KeyboardInterrupt), running(debug=False):
        raise KeyboardInterrupt
    assert ([logger.level for logger in loggers], list(warnings.filters), sys.stdout) == before
