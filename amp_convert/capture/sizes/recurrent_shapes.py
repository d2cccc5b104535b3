"""What recurrent layers give, without a step computed, so that a trace leaves their length open.

A trace runs each operator on tensors without values. For LSTM, GRU and RNN, PyTorch then computes
every time step in Python, and with that fixes the length of the sequence (2.13). Only the shapes of
the results are wanted: they follow from the shapes of the arguments.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C import DispatchKey
from torch._decomp import decomposition_table

aten = torch.ops.aten
_KEYS = (DispatchKey.CompositeImplicitAutograd, DispatchKey.Autograd)


def _lstm(input: Tensor, hx: Sequence[Tensor], *rest: Any) -> tuple[Tensor, ...]:
    """The arguments are those of the operator's schema: `rest` ends in bidirectional and
    batch_first, as with the others."""
    output = _output(input, hx[0], *rest[-2:])
    return output, *(torch.empty_like(state, dtype=input.dtype) for state in hx)


def _rnn(input: Tensor, hx: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return _output(input, hx, *rest[-2:]), torch.empty_like(hx, dtype=input.dtype)


def _output(input: Tensor, state: Tensor, bidirectional: bool, batch_first: bool) -> Tensor:
    """The last layer's hidden states: (length, batch, width), as it lies in memory, or the same
    with the first two exchanged."""
    width = state.shape[2] * (2 if bidirectional else 1)
    length, batch = input.shape[:2] if not batch_first else (input.shape[1], input.shape[0])
    output = input.new_empty((length, batch, width))
    return output.transpose(0, 1) if batch_first else output


_SHAPES: dict[Any, Any] = {
    aten.lstm.input: _lstm,
    aten.gru.input: _rnn,
    aten.rnn_tanh.input: _rnn,
    aten.rnn_relu.input: _rnn,
}


@contextlib.contextmanager
def open_lengths() -> Iterator[None]:
    """While this is open, recurrent layers that are traced give shapes alone. Only for traces that
    keep these operators whole: what decomposed them would find no computation. Tensors with values
    are computed as ever."""
    kernels = {op: dict(op.py_kernels) for op in _SHAPES}
    decomposed = {op: decomposition_table.get(op) for op in _SHAPES}
    try:
        for op, shapes in _SHAPES.items():
            op.py_kernels.update(dict.fromkeys(_KEYS, shapes))
            op._dispatch_cache.clear()
            decomposition_table[op] = shapes
        yield
    finally:
        for op in _SHAPES:
            op.py_kernels.clear()
            op.py_kernels.update(kernels[op])
            op._dispatch_cache.clear()
            del decomposition_table[op]
            if (former := decomposed[op]) is not None:
                decomposition_table[op] = former
