"""Multiply-adds of each node, counted while a graph runs.

PyTorch's own `FlopCounterMode` has the formulas; it sees what a composite operator is made of, so
`linear` counts as its `addmm`. Two operators that only the CPU uses are missing there and added
here. Custom operators without a registered formula count as none: a share of multiply-adds speaks
of those that could be counted.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

aten = torch.ops.aten


def _attention_flops(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return int(sdpa_flop_count(query, key, value))


def _rnn_layer_flops(inputs: Any, w_ih: Any, w_hh: Any, *_: Any, **__: Any) -> int:
    """Two products a step: (batch, in) x w_ih and (batch, hidden) x w_hh; shapes as given."""
    steps_times_batch = inputs[0] * inputs[1]
    return int(2 * steps_times_batch * (w_ih[0] * w_ih[1] + w_hh[0] * w_hh[1]))


class _OneModule:
    """In place of PyTorch's tracker of modules, which nobody asks here: its hooks on backward fail
    in a forward that calls `torch.autograd.grad`."""

    parents = frozenset({"Global"})

    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None: ...


class MacCounter:
    """Runs operators and counts. Higher-order operators, which the counter cannot look into, and
    custom ones that write to their inputs count as none."""

    def __init__(self) -> None:
        self._mode = FlopCounterMode(
            display=False,
            custom_mapping={
                aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
                aten.mkldnn_rnn_layer: _rnn_layer_flops,
            },
        )
        self._mode.mod_tracker = _OneModule()  # type: ignore[assignment]

    def count(self, call: Callable[[], Any]) -> int:
        """The multiply-adds of all that `call` does."""
        with self._mode:
            call()
        return self._mode.get_total_flops() // 2

    def run(self, call: Callable[[], Any], target: Any) -> tuple[Any, int]:
        """The result of `call`, one operator's, and its multiply-adds: half its operations."""
        if not isinstance(target, torch._ops.OpOverload) or target.namespace != "aten":
            return call(), 0
        with self._mode:
            result = call()
        return result, self._mode.get_total_flops() // 2
