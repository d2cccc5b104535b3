"""Convert a PyTorch model to mixed precision and prove that the result is as good.

    import amp_convert as amp

    mixed = amp.convert(model, inputs, dtype=torch.float16)
    mixed.plan.to_frame()                       # one row a node: rule, reason, evidence
    amp.compare(model, mixed, batches).to_frame()
    amp.error_budget(mixed, inputs).to_frame()  # which node's rounding the error comes from
    frozen = mixed.freeze()                     # for inference, weights in low precision
    with mixed.plan.autocast(model): ...        # the plan on the model as it is, in any shape
    amp.export_onnx(mixed, "model.onnx")        # the same precision in every node
    amp.save(frozen, "model.pt2")               # for torch.export.load, without amp_convert
    amp.save(mixed, "model.safetensors")        # to train on: weights and plan, see amp.load
    amp.audit(model, inputs).to_frame()         # which layers stay FP32, and why
    amp.check(model, inputs, eval_batches=batches).verdict  # the whole job of the command

Importing this package is cheap: PyTorch is imported when one of its names is first used.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from amp_convert.core.lazy import names_in

__version__ = "0.1.0"

# Who does not listen hears nothing: not even what Python would print for want of a handler.
logging.getLogger(__name__).addHandler(logging.NullHandler())

if TYPE_CHECKING:
    from amp_convert.api import audit as audit
    from amp_convert.api import autocast as autocast
    from amp_convert.api import check as check
    from amp_convert.api import compare as compare
    from amp_convert.api import convert as convert
    from amp_convert.api import error_budget as error_budget
    from amp_convert.api import export_onnx as export_onnx
    from amp_convert.attribute import Budget as Budget
    from amp_convert.core.errors import AmpConvertError as AmpConvertError
    from amp_convert.core.errors import ModelError as ModelError
    from amp_convert.core.errors import UnsupportedModelError as UnsupportedModelError
    from amp_convert.core.errors import UsageError as UsageError
    from amp_convert.pipeline import Run as Run
    from amp_convert.plan import Decision as Decision
    from amp_convert.plan import Plan as Plan
    from amp_convert.rewrite import ConvertedModel as ConvertedModel
    from amp_convert.rewrite import FrozenModel as FrozenModel
    from amp_convert.saving import load as load
    from amp_convert.saving import save as save
    from amp_convert.validate.inference import Divergence as Divergence

__getattr__, __all__ = names_in(
    __name__,
    api="audit autocast check compare convert error_budget export_onnx",
    attribute="Budget",
    core__errors="AmpConvertError ModelError UnsupportedModelError UsageError",
    pipeline="Run",
    plan="Decision Plan",
    rewrite="ConvertedModel FrozenModel",
    saving="load save",
    validate__inference="Divergence",
)
__all__ += ["__version__"]


def __dir__() -> list[str]:
    return sorted(__all__)
