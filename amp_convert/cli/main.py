"""The command line: arguments -> a command -> exit code, and nothing else.

`amp-convert model.py` is short for `amp-convert convert model.py`. Progress and messages go to
stderr, the result to stdout; what the user's own code prints goes to stderr too. An error that
amp-convert foresaw is one line; `--debug` adds the traceback.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import re
import sys
import traceback
from collections.abc import Sequence
from typing import NoReturn

import typer
from rich.console import Console
from rich.text import Text
from typer.exceptions import TyperException

from amp_convert.cli.app import app
from amp_convert.cli.console import reserve_stdout, say_renamed
from amp_convert.core.errors import (
    FAULT,
    AmpConvertError,
    ModelError,
    UsageError,
    environment_problem,
    first_line,
)
from amp_convert.core.printable import one_line
from amp_convert.core.spelling import nearest


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """The console script: run the command and exit with its code."""
    reserve_stdout()
    sys.exit(_flushed(run(sys.argv[1:] if arguments is None else arguments)))


def _flushed(code: int) -> int:
    """Write out the result; the exit code, once that could not be done another one."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        code = _READER_GONE
    except OSError as error:
        problem = environment_problem(error) or UsageError(f"no output: {error.strerror}")
        _show(_errors(), str(problem), debug=False)
    else:
        if code != _READER_GONE:
            return code
    # Or Python would try once more at its end, and say that it could not.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return code if code == _READER_GONE else UsageError.exit_code


def run(arguments: Sequence[str]) -> int:
    """Run the command for these arguments and return its exit code."""
    errors = _errors()
    if not arguments:
        run(["--help"])
        return UsageError.exit_code
    debug = "--debug" in arguments
    try:
        code = typer.main.get_command(app).main(
            args=_normalised(arguments), prog_name="amp-convert", standalone_mode=False
        )
    except AmpConvertError as error:
        _show(errors, str(error), debug=debug)
        return error.exit_code
    except TyperException as error:
        _show(errors, _usage_message(error), debug=False)
        return UsageError.exit_code
    except (KeyboardInterrupt, typer.Abort):
        code = _INTERRUPTED
    except BrokenPipeError:
        return _READER_GONE
    except BaseException as error:  # noqa: BLE001  the last line of defence: no bare traceback for users
        if isinstance(error, SystemExit) and isinstance(error.__context__, BrokenPipeError):
            return _READER_GONE  # what typer makes of it
        if not isinstance(error, Exception):
            _show(errors, str(_left(error)), debug=debug)
            return ModelError.exit_code
        if problem := environment_problem(error):
            _show(errors, str(problem), debug=debug)
            return problem.exit_code
        what = f"a fault in amp-convert itself: {type(error).__name__}: {first_line(error)}"
        mend = "Please report it with what --debug shows."
        _show(errors, f"{what}. {mend}", debug=debug)
        return FAULT
    if code == _INTERRUPTED:  # typer makes this code of Ctrl-C, too
        _show(errors, "interrupted", debug=False)
    return int(code or 0)


def _errors() -> Console:
    return Console(stderr=True, highlight=False, soft_wrap=True)


def _left(error: BaseException) -> ModelError:
    """The error for what is neither an exception of ours nor of a library's: the user's own code
    wanted to end the process."""
    what = f"the model's code raised {type(error).__name__}"
    said = first_line(error)
    return ModelError(
        what if said == type(error).__name__ else f"{what}: {said}",
        mend="Let it raise an Exception instead; --debug shows the traceback.",
    )


# What a shell reports of a process that these signals end: 128 + SIGINT, 128 + SIGPIPE.
_INTERRUPTED, _READER_GONE = 130, 141
_LINE = 1200
"""Characters of a message: three parts of those of `core.errors`."""
_COMMANDS = ("convert", "fp32-seeds", "audit", "explain", "tune", "gate")
"""In the order of the help; each has a module of its name, which adds it to `app`."""
_FORMER_COMMANDS = ("baseline",)
_FORMER_FLAGS = {"--fp32-baseline": "--fp32-seeds"}

for _command in _COMMANDS:
    importlib.import_module(f"amp_convert.cli.{_command.replace('-', '_')}")


def _normalised(arguments: Sequence[str]) -> list[str]:
    """The arguments with the default command filled in, and `--rules a b` as `--rules a --rules
    b`.
    """
    arguments = [_renamed(argument) for argument in arguments]
    spelled: list[str] = []
    more_rules = False  # whether another name may follow the last one
    for argument in arguments:
        if more_rules and _names_rules(argument):
            spelled += ["--rules", argument]
        else:
            more_rules = bool(spelled) and spelled[-1] == "--rules"
            spelled.append(argument)
    if not spelled or spelled[0] in (*_COMMANDS, *_FORMER_COMMANDS, "--help", "--version"):
        return spelled
    _refuse_unknown_command(spelled[0])
    return ["convert", *spelled]


def _renamed(argument: str) -> str:
    """An argument with the flag's name of today."""
    flag, equals, value = argument.partition("=")
    if flag not in _FORMER_FLAGS:
        return argument
    say_renamed(flag, _FORMER_FLAGS[flag])
    return _FORMER_FLAGS[flag] + equals + value


def _names_rules(argument: str) -> bool:
    """Whether an argument behind a rules file's name is another one, and not the model."""
    return argument.endswith(".toml") or bool(re.fullmatch(r"\w[\w-]*", argument))


def _refuse_unknown_command(word: str) -> None:
    """Raises UsageError for a first word that can be nothing but the name of a command."""
    if not re.fullmatch(r"[a-z]+", word) or os.path.exists(word):
        return
    near = nearest(word, _COMMANDS)
    mend = f"Did you mean {near}?" if near else "See amp-convert --help."
    raise UsageError(f"there is no command or file {word}", mend=mend)


def _show(console: Console, message: str, *, debug: bool) -> None:
    with contextlib.suppress(OSError, ValueError):  # where stderr is closed, the exit code says it
        if debug:
            console.print(Text(traceback.format_exc().rstrip(), style="dim"))
        console.print(Text.assemble(("error: ", "bold red"), one_line(message, _LINE)))


def _usage_message(error: TyperException) -> str:
    """Typer's own message as one line with the mend, which is the nearest flag or the help."""
    context = getattr(error, "ctx", None)
    mend = f"See {context.command_path if context else 'amp-convert'} --help."
    message = " ".join(error.format_message().split()).rstrip(".")
    flag = getattr(error, "option_name", "")
    if message.startswith("No such option"):
        message = f"there is no flag {flag}"
        if near := nearest(flag, getattr(error, "possibilities", ()) or ()):
            mend = f"Did you mean {near}?"
    message = re.sub(r", unable to parse string as an? \w+$", "", message)
    return f"{message}. {mend}"
