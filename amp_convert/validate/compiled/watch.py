"""What Inductor makes of a graph: operators by dtype before its passes and after them.

Inductor gives its graphs to two hooks of the user's: one before all of its passes over what was
traced, one after all of them, from where kernels are written. Within a kernel it may compute low
values in FP32, which is its way, and more exact; what must not happen is that a pass (such as one
that recognises attention) gives an operator another dtype than the plan has.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch
from torch import fx

from amp_convert.core.number_formats import LOW_DTYPES, name_of
from amp_convert.core.op_facts import HEAVY, Family, facts_of_target
from amp_convert.validate.compiled.results import OperatorCount

PRODUCT = "matrix product or convolution"
_FRAGILE = (
    Family.EXPONENTIAL, Family.SOFTMAX, Family.REDUCTION, Family.POWER, Family.NORM,
    Family.CUMULATIVE,
)  # fmt: skip
"""What, with heavy products, must not be computed in low precision where the plan has it in FP32.
Inductor writes other operators anew as it likes: there are none of them to be compared."""


class Watch:
    """Counts operators while models are compiled with its `options`."""

    def __init__(self) -> None:
        self.traced: Counter[tuple[str, str]] = Counter()
        self.compiled: Counter[tuple[str, str]] = Counter()
        self.graphs = 0
        """How many graphs were compiled since the last `counts`."""

    def options(self, *, cuda_graphs: bool) -> dict[str, Any]:
        """For `torch.compile`. Random numbers are those of eager, and nothing comes from Inductor's
        cache, which would leave the hooks out."""
        return {
            "joint_custom_pre_pass": lambda graph: _count(graph, self.traced),
            "post_grad_custom_post_pass": self._finished,
            "fallback_random": True,
            "fx_graph_cache": False,
            "triton.cudagraphs": cuda_graphs,
        }

    def _finished(self, graph: fx.Graph) -> None:
        self.graphs += 1
        _count(graph, self.compiled)

    def counts(self) -> tuple[OperatorCount, ...]:
        """Those of operators whose precision the plan is about, and forget them."""
        both = sorted(self.traced.keys() | self.compiled.keys())
        rows = tuple(
            OperatorCount(op, dtype, self.traced[op, dtype], self.compiled[op, dtype])
            for op, dtype in both
        )
        self.traced.clear()
        self.compiled.clear()
        self.graphs = 0
        return rows


def _count(graph: fx.Graph, into: Counter[tuple[str, str]]) -> None:
    for node in graph.nodes:
        value = node.meta.get("val")
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            facts = facts_of_target(node.target)
            if facts.is_a(*HEAVY):  # a product may become one of another name
                into[PRODUCT, name_of(value.dtype)] += 1
            elif facts.is_a(*_FRAGILE):
                into[facts.name, name_of(value.dtype)] += 1


def lowered(ops: Iterable[OperatorCount]) -> list[OperatorCount]:
    """Operators compiled in a low dtype, of which the traced graph has none but in FP32."""
    rows = list(ops)
    wide = {row.op for row in rows if row.dtype == "float32" and row.traced}
    low = {name_of(dtype) for dtype in LOW_DTYPES}
    return [r for r in rows if r.dtype in low and r.compiled and not r.traced and r.op in wide]


def raised(ops: Iterable[OperatorCount]) -> list[OperatorCount]:
    """Heavy products that are compiled in FP32 and were traced in a low dtype."""
    rows = list(ops)
    return [r for r in rows if (r.op, r.dtype) == (PRODUCT, "float32") and r.compiled > r.traced]
