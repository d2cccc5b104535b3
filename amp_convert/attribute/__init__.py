"""Where the error comes from: converted model and batch -> `Budget`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from amp_convert.core.lazy import names_in

if TYPE_CHECKING:
    from amp_convert.attribute.results import Budget as Budget

__getattr__, __all__ = names_in(__name__, results="Budget")
