"""The one error hierarchy. Each message says what happened, where, and what to do about it.

The command line prints `str(error)` as its only line and exits with `error.exit_code`;
`--debug` adds the traceback.
"""

from __future__ import annotations


def first_line(error: BaseException) -> str:
    """What an exception says, cut to its first line that is not blank; its type where it says
    nothing. For errors of others, which may be pages long."""
    lines = (line.strip() for line in str(error).splitlines())
    return next(filter(None, lines), type(error).__name__)


class AmpConvertError(Exception):
    """Base of every error that amp-convert raises on purpose.

    `what` is a clause without a full stop, `where` the layer or the user's file and line,
    `mend` a sentence saying what to do.
    """

    exit_code = 2

    def __init__(self, what: str, *, where: str = "", mend: str = "") -> None:
        self.what, self.where, self.mend = what, where, mend
        super().__init__(what, where, mend)

    def __str__(self) -> str:
        place = f" (at {self.where})" if self.where else ""
        return f"{self.what}{place}." + (f" {self.mend}" if self.mend else "")


class UsageError(AmpConvertError):
    """A flag, setting, rules file, baseline or output folder is wrong. Exit code 2."""


class ModelError(AmpConvertError):
    """The user's model file, its inputs or its FP32 results are wrong. Exit code 2."""


class UnsupportedModelError(AmpConvertError):
    """The model works in eager FP32, but no part of it can be captured. Exit code 4."""

    exit_code = 4
