"""`torch.compile`: `ConvertedModel` -> `CompiledParity`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from amp_convert.core.lazy import names_in

if TYPE_CHECKING:
    from amp_convert.validate.compiled.results import CompiledParity as CompiledParity

__getattr__, __all__ = names_in(__name__, results="CompiledParity")
