"""The line of the user's code that a call comes from, as a plan names it."""

from __future__ import annotations

import functools
from types import FrameType

from amp_convert.capture.node_info import is_library_frame, short_path


def line_of(frame: FrameType | None) -> str:
    """The line of the user's code that a frame runs for, as a plan names it."""
    while frame is not None:
        if place := _place(frame.f_code.co_filename):
            return f"{place}:{frame.f_lineno}"
        frame = frame.f_back
    return ""


@functools.cache
def _place(file: str) -> str:
    """A file as a plan names it; "" for one of PyTorch's, Python's or ours."""
    return "" if is_library_frame(file) else short_path(file)
