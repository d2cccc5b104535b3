"""A module run in one mode, for inference or for training, with no trace left in it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

from amp_convert.core.errors import UnsupportedModelError
from amp_convert.core.module_state import Attributes


@contextlib.contextmanager
def in_mode(module: nn.Module, *, training: bool) -> Iterator[Attributes]:
    """Run `module` in one mode; its training flags, buffers and other attributes are afterwards as
    they were. Gives those attributes.

    A module that is in training mode already keeps the flags of its parts: a BatchNorm that the
    user froze stays frozen. Parameters are too large to be kept: raises UnsupportedModelError where
    one is written to in eval mode.
    """
    children = list(module.modules())
    flags = [child.training for child in children]
    # A scripted part keeps its buffers in C++, where nobody here writes to them.
    scripted = [isinstance(child, torch.jit.ScriptModule) for child in children]
    tables = [
        {} if own else dict(child._buffers) for child, own in zip(children, scripted, strict=True)
    ]
    kept = {id(b): b.detach().clone() for table in tables for b in table.values() if b is not None}
    attributes = Attributes(module)
    versions = {name: p._version for name, p in module.named_parameters() if not p.is_inference()}
    if not (training and module.training):
        module.train(training)
    try:
        yield attributes
        if not training:
            _refuse_written(module, versions)
    finally:
        attributes.restore()
        with torch.no_grad():
            for child, was_training, table in zip(children, flags, tables, strict=True):
                child.training = was_training
                if table:
                    child._buffers.update(table)
                for buffer in table.values():
                    if buffer is not None:
                        _restore(buffer, kept[id(buffer)])


def _refuse_written(module: nn.Module, versions: Mapping[str, int]) -> None:
    parameters = dict(module.named_parameters())
    written = [n for n, v in versions.items() if n in parameters and parameters[n]._version != v]
    if written:
        raise UnsupportedModelError(
            f"the model writes to its parameter {written[0]} in inference, so every call gives "
            "another model",
            mend="Register what it writes to as a buffer.",
        )


def _restore(buffer: torch.Tensor, kept: torch.Tensor) -> None:
    """Write `kept` back, if there is something to write: an equal buffer keeps its version."""
    if buffer.grad_fn is not None:  # the model wrote a result into it, with all its history
        buffer.detach_()
    comparable = buffer.layout is torch.strided and not buffer.is_meta
    if isinstance(buffer, FakeTensor) or not (comparable and torch.equal(buffer, kept)):
        buffer.copy_(kept)
