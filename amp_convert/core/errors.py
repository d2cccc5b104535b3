"""The one error hierarchy. Each message says what happened, where, and what to do about it.

The command line prints `str(error)` as its only line and exits with `error.exit_code`;
`--debug` adds the traceback. Any other exception is a fault in amp-convert: exit code `FAULT`.
"""

from __future__ import annotations

import errno

from amp_convert.core.printable import one_line

FAULT = 5
"""The exit code of a fault in amp-convert itself."""


_WHAT, _WHERE, _MEND = 400, 200, 400
"""Characters of each part of a message. Longer ones are pages of somebody else's."""


def first_line(error: BaseException) -> str:
    """What an exception says, cut to its first line that is not blank; its type where it says
    nothing. For errors of others, which may be pages long."""
    lines = (line.strip() for line in str(error).splitlines())
    return one_line(next(filter(None, lines), type(error).__name__), _WHAT)


class AmpConvertError(Exception):
    """Base of every error that amp-convert raises on purpose.

    `what` is a clause without a full stop, `where` the layer or the user's file and line,
    `mend` a sentence saying what to do. As text it is one line of bounded length, whatever names
    and values of others are in it.
    """

    exit_code = 2

    def __init__(self, what: str, *, where: str = "", mend: str = "") -> None:
        self.what, self.where, self.mend = what, where, mend
        super().__init__(what, where, mend)

    def __str__(self) -> str:
        what, where = one_line(self.what, _WHAT), one_line(self.where, _WHERE)
        mend = one_line(self.mend, _MEND)
        return f"{what}{f' (at {where})' if where else ''}." + (f" {mend}" if mend else "")


class UsageError(AmpConvertError):
    """A flag, setting, rules file, baseline or output folder is wrong. Exit code 2."""


class ModelError(AmpConvertError):
    """The user's model file, its inputs or its FP32 results are wrong. Exit code 2."""


class EnvironmentProblemError(AmpConvertError):
    """The machine ran out of something, or lacks a package: no fault of the model. Exit code 2."""


_NO_MEMORY = ("can't allocate memory", "out of memory", "Cannot allocate memory")
_FULL_DISK = (errno.ENOSPC, errno.EDQUOT)


def environment_problem(error: BaseException) -> EnvironmentProblemError | None:
    """What the environment lacks, where that is what an exception, or one that caused it, says;
    None for all others.

    PyTorch raises a RuntimeError where the CPU's memory is used up, which only its text tells.
    """
    chain: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in chain:
        chain.append(cause)
        cause = cause.__cause__ or cause.__context__
    for found in chain:
        text = first_line(found)
        if (
            isinstance(found, MemoryError)
            or type(found).__name__ == "OutOfMemoryError"
            or (isinstance(found, RuntimeError) and any(words in text for words in _NO_MEMORY))
        ):
            mend = "Give smaller batches, or a machine with more memory."
            return EnvironmentProblemError(f"memory ran out: {text}", mend=mend)
        if isinstance(found, OSError) and found.errno in _FULL_DISK:
            where = str(found.filename or "")
            return EnvironmentProblemError("the disk is full", where=where, mend="Make room on it.")
        if isinstance(found, ModuleNotFoundError):
            mend = "Install it in this Python environment."
            return EnvironmentProblemError(f"the package {found.name} is missing", mend=mend)
    return None


def refuse_environment(error: BaseException) -> None:
    """Raises what the environment lacks, if that is what an exception comes of: whatever ran then,
    it is not to blame."""
    if problem := environment_problem(error):
        raise problem from error


class UnsupportedModelError(AmpConvertError):
    """The model works in eager FP32, but no part of it can be captured. Exit code 4."""

    exit_code = 4
