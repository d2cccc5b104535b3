"""ONNX Runtime: `ConvertedModel` and its file -> `OnnxParity`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from amp_convert.core.lazy import names_in

if TYPE_CHECKING:
    from amp_convert.validate.onnx.results import OnnxParity as OnnxParity

__getattr__, __all__ = names_in(__name__, results="OnnxParity")
