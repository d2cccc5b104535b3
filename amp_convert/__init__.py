"""Convert a PyTorch model to mixed precision and prove that the result is as good.

    import amp_convert as amp

    mixed = amp.convert(model, inputs, dtype=torch.float16)
    mixed.plan.to_frame()                       # one row a node: rule, reason, evidence
    amp.compare(model, mixed, batches).to_frame()
    frozen = mixed.freeze()                     # for inference, weights in low precision
    amp.export_onnx(mixed, "model.onnx")        # the same precision in every node
    amp.audit(model, inputs).to_frame()         # which layers stay FP32, and why
    amp.check(model, inputs, eval_batches=batches).verdict  # the whole job of the command

Importing this package is cheap: PyTorch is imported when one of its names is first used.
"""

from __future__ import annotations

import importlib
import logging
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# Who does not listen hears nothing: not even what Python would print for want of a handler.
logging.getLogger(__name__).addHandler(logging.NullHandler())

if TYPE_CHECKING:
    from amp_convert.api import audit, check, compare, convert, export_onnx
    from amp_convert.core.errors import (
        AmpConvertError,
        ModelError,
        UnsupportedModelError,
        UsageError,
    )
    from amp_convert.pipeline import Run
    from amp_convert.plan.plan import Decision, Plan
    from amp_convert.rewrite.converted_model import ConvertedModel
    from amp_convert.rewrite.frozen_model import FrozenModel
    from amp_convert.validate.inference.results import Divergence

_HOMES = {
    "audit": "api",
    "check": "api",
    "compare": "api",
    "convert": "api",
    "export_onnx": "api",
    "Run": "pipeline",
    "ConvertedModel": "rewrite.converted_model",
    "FrozenModel": "rewrite.converted_model",
    "Decision": "plan.plan",
    "Divergence": "validate.inference.results",
    "Plan": "plan.plan",
    "AmpConvertError": "core.errors",
    "ModelError": "core.errors",
    "UnsupportedModelError": "core.errors",
    "UsageError": "core.errors",
}

__all__ = [
    "AmpConvertError",
    "ConvertedModel",
    "Decision",
    "Divergence",
    "FrozenModel",
    "ModelError",
    "Plan",
    "Run",
    "UnsupportedModelError",
    "UsageError",
    "__version__",
    "audit",
    "check",
    "compare",
    "convert",
    "export_onnx",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"amp_convert.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
