"""The border between amp-convert and the user's code: how it is run, and what its errors become.

The model file is the user's own program. It is executed, with the user's rights and without a
sandbox, exactly as `python model.py` would: give amp-convert only files that you would run. Its
path comes from the command line alone, never from a rules file or a report.

How a file is loaded: its folder goes first on sys.path and stays there, so that imports of its
neighbours work whenever they happen; the code runs in a new module, which enters sys.modules
under the file's stem. Keeping the stem makes class paths (`digits_cnn.Net`) the same on every
machine, so that rules and reports can name them, and lets worker processes import the module.
When the stem is taken, by a second model.py say, a number is appended.

What the user's code does wrong, then or in a later stage, ends as a ModelError that names the
line in the user's file: `user_code` is the one place where that happens.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import itertools
import os
import re
import sys
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import torch

import amp_convert
from amp_convert.core.errors import AmpConvertError, ModelError, UsageError, environment_problem
from amp_convert.core.spelling import nearest
from amp_convert.loading.source import SOURCES

_NOT_THE_USERS = tuple(
    os.path.dirname(os.path.abspath(f)) + os.sep for f in (amp_convert.__file__, torch.__file__)
)
_names: dict[str, str] = {}
"""The name in sys.modules of each model file loaded so far, by absolute path."""


_folders: dict[tuple[str, str], str] = {}
"""The current folder of a model file's code, where it has moved, by the file and by ours."""


@contextlib.contextmanager
def user_output_to_stderr() -> Iterator[None]:
    """While this is open, what Python code prints to stdout goes to stderr."""
    with contextlib.redirect_stdout(sys.stderr):
        yield


@contextlib.contextmanager
def _no_errors_of_warnings() -> Iterator[None]:
    """Take back that warnings are errors, where the code inside made them so."""
    before = list(warnings.filters)
    try:
        yield
    finally:
        kept = [entry for entry in warnings.filters if entry[0] != "error" or entry in before]
        if len(kept) < len(warnings.filters):
            warnings.resetwarnings()  # says that the list changes, too
            warnings.filters[:] = kept  # type: ignore[index]


@contextlib.contextmanager
def _own_folder(path: str) -> Iterator[None]:
    """Let the user's code have a current folder of its own: where it moves to holds for itself, and
    not for the paths of ours, which are relative to where the command was given."""
    ours = os.getcwd()
    if (theirs := _folders.get((path, ours))) is not None:
        os.chdir(theirs)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # it may have deleted the folder
            if (now := os.getcwd()) != ours:
                _folders[path, ours] = now
        os.chdir(ours)


@contextlib.contextmanager
def user_code(what: str, path: str, mend: str = "") -> Iterator[None]:
    """Run code of the user's inside this: errors become ModelError, prints go to stderr.

    Where the code makes errors of warnings, or moves to another folder, that holds for itself, and
    not for what we call later.
    `what` is the noun that the message starts with ("metrics()"), `path` the model file
    (`Case.path`), `mend` the advice for an exception that needs more than correcting its line.
    The place named is the deepest line in the model file, or else the deepest one that is
    neither torch's nor amp-convert's. AmpConvertError and KeyboardInterrupt pass unchanged; a class
    beside Exception of the user's own does not.
    """
    try:
        with user_output_to_stderr(), _no_errors_of_warnings(), _own_folder(path):
            yield
    except (AmpConvertError, KeyboardInterrupt, GeneratorExit):
        raise
    except SystemExit as error:
        code = "" if error.code is None else repr(error.code)
        raise ModelError(
            f"{what} called sys.exit({code})",
            where=_user_line(error, path),
            mend='Guard it with if __name__ == "__main__".',
        ) from error
    except ModuleNotFoundError as error:
        said = f"imports {error.name}, which cannot be found" if error.name else _raised(error)
        raise ModelError(
            f"{what} {said}",
            where=_user_line(error, path),
            mend="Install the package that provides it in this Python environment.",
        ) from error
    except SyntaxError as error:
        own = error.filename in (path, None)
        said = f"is not valid Python: {error.msg}" if own else _raised(error)
        line = f"{os.path.basename(error.filename or path)}:{error.lineno or 1}"
        raise ModelError(f"{what} {said}", where=line, mend="Correct that line.") from error
    except BaseException as error:
        if problem := environment_problem(error):
            raise problem from error
        mend = mend or "Correct it there; --debug shows the traceback."
        where = _user_line(error, path)
        raise ModelError(f"{what} {_raised(error)}", where=where, mend=mend) from error


@contextlib.contextmanager
def placed(where: str) -> Iterator[None]:
    """Errors raised inside this that name no place get `where` for one."""
    try:
        yield
    except AmpConvertError as error:
        if error.where:
            raise
        raise type(error)(error.what, where=where, mend=error.mend) from error


def defined_at(function: object, path: str) -> str:
    """The model file and the line where a function of the user's begins; only the file for one that
    is from elsewhere."""
    while isinstance(function, functools.partial):
        function = function.func
    code, name = getattr(function, "__code__", None), os.path.basename(path)
    return f"{name}:{code.co_firstlineno}" if code and code.co_filename == path else name


def run_file(place: str) -> tuple[ModuleType, str]:
    """Run the Python file at `place` as a module of its own; give it and its absolute path.

    Raises UsageError when there is no such file, ModelError when it is not Python or fails.
    """
    path, name = Path(os.path.abspath(place)), os.path.basename(place)
    if path.is_dir():
        raise UsageError(f"{place} is a folder", mend="Give the model file that is in it.")
    if not path.exists():
        names = sorted(p.name for p in path.parent.glob("*.py"))
        near = nearest(path.with_suffix(".py").name, names)
        mend = f"Did you mean {os.path.join(os.path.dirname(place), near)}?" if near else SOURCES
        raise UsageError(f"there is no file {place}", mend=mend)
    if path.suffix != ".py":
        raise UsageError(
            f"{place} is not a .py file",
            mend="Give a Python file whose build_model() loads what is needed.",
        )
    try:
        text = importlib.util.decode_source(path.read_bytes())
    except OSError as error:
        raise UsageError(f"cannot read {place}: {error.strerror}") from error
    except (UnicodeDecodeError, SyntaxError) as error:
        raise ModelError(f"{name} is not UTF-8 text: {error}", mend="Save it as UTF-8.") from error
    _put_first_on_path(str(path.parent))
    return _execute(text, path), str(path)


def run_module(place: str) -> tuple[ModuleType, str]:
    """Import the module `place`, with the current folder on sys.path; give it and its file.

    Raises UsageError when there is no such module, ModelError when importing it fails.
    """
    _put_first_on_path(os.getcwd())
    with user_code(place, ""):
        try:
            spec = importlib.util.find_spec(place)
        except ModuleNotFoundError as error:
            if not f"{place}.".startswith(f"{error.name}."):
                raise
            spec = None
    if spec is None or not spec.has_location or not spec.origin:
        looked = f"It is looked for in {os.getcwd()} and in this Python environment."
        raise UsageError(f"there is no module {place}", mend=f"{looked} {SOURCES}")
    with user_code(place, spec.origin):
        return importlib.import_module(place), spec.origin


def _execute(text: str, path: Path) -> ModuleType:
    name = _module_name(path)
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None:
        raise UsageError(f"{path} cannot be imported", mend=SOURCES)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        with user_code(path.name, str(path)):
            # Compiled here and not by the loader: that would leave a __pycache__ beside the file.
            code = compile(text, str(path), "exec", dont_inherit=True)
            exec(code, vars(module))  # noqa: S102 - running the user's own file is the purpose
    except BaseException:
        sys.modules.pop(name, None)
        raise
    return module


def _module_name(path: Path) -> str:
    if str(path) not in _names:
        stem = re.sub(r"\W", "_", path.stem)
        taken = {*sys.modules, *sys.stdlib_module_names, *_names.values()}
        numbered = (f"{stem}_{number}" for number in itertools.count(2))
        _names[str(path)] = next(n for n in itertools.chain([stem], numbered) if n not in taken)
    return _names[str(path)]


def _put_first_on_path(folder: str) -> None:
    """Put `folder` first on sys.path, and forget namesakes of its modules from other folders.

    Otherwise the second of two model files that each import their own net.py would silently
    get the first one's.
    """
    if folder in sys.path:
        sys.path.remove(folder)
    sys.path.insert(0, folder)
    others = {os.path.dirname(path) for path in _names} - {folder}
    stale = set()
    for name, module in sys.modules.items():
        origin = getattr(module, "__file__", None) or ""
        home = os.path.dirname(origin.removesuffix(f"{os.sep}__init__.py"))
        mine = os.path.join(folder, name)
        if home in others and (os.path.isfile(f"{mine}.py") or os.path.isdir(mine)):
            stale.add(name)
    for name in [name for name in sys.modules if name.partition(".")[0] in stale]:
        if name not in _names.values():
            del sys.modules[name]


def _user_line(error: BaseException, path: str) -> str:
    frames = [
        (frame.f_code.co_filename, line) for frame, line in traceback.walk_tb(error.__traceback__)
    ]
    own = [frame for frame in frames if frame[0] == path]
    foreign = [frame for frame in frames if not frame[0].startswith(("<", *_NOT_THE_USERS))]
    if deepest := (own or foreign)[-1:]:
        return f"{os.path.basename(deepest[0][0])}:{deepest[0][1]}"
    return os.path.basename(path)


def _raised(error: BaseException) -> str:
    """ "raised Type: message", the message cut to its first line, or to two after a colon."""
    lines = [" ".join(line.split()) for line in str(error).splitlines() if line.strip()]
    text = " ".join(lines[: 2 if lines and lines[0].endswith(":") else 1])
    text = "".join(char for char in text[:300] if char.isprintable()).rstrip(".")
    return f"raised {type(error).__name__}" + (f": {text}" if text else "")
