"""`ConvertedModel` -> an ONNX file with the precision of the plan."""

from __future__ import annotations

from typing import TYPE_CHECKING

from amp_convert.core.lazy import names_in

if TYPE_CHECKING:
    from amp_convert.onnx_file.write import OnnxModel as OnnxModel
    from amp_convert.onnx_file.write import export_onnx as export_onnx

__getattr__, __all__ = names_in(__name__, write="OnnxModel export_onnx")
