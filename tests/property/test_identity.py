"""Two presets with an oracle: `fp32` must be eager PyTorch, `autocast` must be `torch.autocast`.

Both to the last bit, on every model of the zoo.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import amp_convert as amp
from amp_convert.rewrite.converted_model import ConvertedModel
from tests.bits import assert_same_bits, same_bits
from tests.property.identity_runs import (
    Run,
    equal,
    in_fp32,
    run_on,
)
from tests.zoo import DTYPES, both_dtypes, converted, every_model, example, fused_transformer, mode


def run(call: nn.Module, original: nn.Module, name: str, *, train: bool) -> Run:
    _, args, kwargs = example(name)
    return run_on(call, (original, args, kwargs), train=train)


# --- fp32: nothing changes -----------------------------------------------------------------------


@every_model
@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
def test_fp32_rules_change_nothing(name: str, train: bool) -> None:
    original, mixed = example(name)[0], converted(name, "fp32")
    want, have = (run(call, original, name, train=train) for call in (original, mixed))
    assert_same_bits(want.outputs, have.outputs)
    assert want.gradients
    assert_same_bits(want.gradients, have.gradients)
    assert_same_bits(want.buffers, have.buffers)
    assert mixed.plan.low_nodes() == 0
    assert not mixed.rewritten[""]["eval"].casts


@pytest.mark.slow
def test_training_mode_has_something_to_get_wrong() -> None:
    """BatchNorm's statistics move and dropout drops, or the test above would prove nothing."""
    original = example("cnn")[0]
    still, moving = (run(original, original, "cnn", train=train) for train in (False, True))
    assert not same_bits(still.buffers["norm1.running_mean"], moving.buffers["norm1.running_mean"])
    assert int(moving.buffers["norm1.num_batches_tracked"]) == 1
    mixed = converted("lstm", "fp32")
    _, args, _ = example("lstm")
    with mode(mixed, train=True):
        assert not torch.equal(mixed(*args), mixed(*args))


class Operators(TorchDispatchMode):
    """Writes down the name of every operator that runs."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


@every_model
def test_fp32_rules_change_nothing_without_gradients(name: str) -> None:
    """As above under no_grad; for nn.Transformer once its fused kernels are off."""
    original, args, kwargs = example(name)
    mixed = converted(name, "fp32")
    with mode(original, mixed), torch.no_grad(), fused_transformer(False):
        assert_same_bits(original(*args, **kwargs), mixed(*args, **kwargs))


def test_only_the_fused_kernels_of_transformer_are_not_captured() -> None:
    """Capture records what runs with gradients on, and that is not the fused encoder layer."""
    original, args, _ = example("transformer")
    mixed = converted("transformer", "fp32")
    with mode(original, mixed), torch.no_grad():
        with Operators() as eager, fused_transformer(True):
            fused = original(*args)
        with Operators() as ours, fused_transformer(True):
            result = mixed(*args)
    assert "aten::_transformer_encoder_layer_fwd" in eager.names
    assert "aten::_transformer_encoder_layer_fwd" not in ours.names
    torch.testing.assert_close(result, fused, rtol=1e-5, atol=1e-5)


def native(name: str, dtype: torch.dtype) -> Any:
    """The original under torch.autocast, its low outputs brought back to FP32 as ours are."""
    original, args, kwargs = example(name)
    with mode(original), torch.no_grad(), torch.autocast("cpu", dtype=dtype):
        outputs = original(*args, **kwargs)
    return in_fp32(outputs)


def ours(mixed: ConvertedModel, name: str) -> Any:
    _, args, kwargs = example(name)
    with mode(mixed), torch.no_grad():
        return mixed(*args, **kwargs)


def fused_encoder_layer(op: str, dtype: torch.dtype) -> None:
    """CPU autocast does not stop the fused encoder layer, which then computes in FP32; without it
    the bits are ours."""
    mixed = converted("transformer", "autocast", dtype)
    with Operators() as operators:
        native("transformer", dtype)
    assert op in operators.names
    assert not equal(native("transformer", dtype), ours(mixed, "transformer"))
    with fused_transformer(False):
        assert_same_bits(native("transformer", dtype), ours(mixed, "transformer"))


def no_such_kernel(op: str, dtype: torch.dtype) -> None:
    """Autocast lets ATen pick oneDNN's LSTM for the FP32 input and then hands it the low dtype,
    which many processors have no kernel for: the original fails. Ours runs on all of them, since
    ATen chooses by the dtype that arrives."""
    original, args, _ = example("lstm")
    result, failure = ours(converted("lstm", "autocast", dtype), "lstm"), ""
    with Operators() as operators:
        try:
            expected = native("lstm", dtype)
        except RuntimeError as error:
            failure = str(error)
            with mode(original), torch.no_grad():
                expected = original(*args)
    if failure:
        assert "could not create a primitive" in failure
        assert op in operators.names
        torch.testing.assert_close(result, expected, rtol=1e-2, atol=1e-3)
    else:
        assert_same_bits(expected, result)


DIFFERENT: dict[tuple[str, torch.dtype], tuple[str, Callable[[str, torch.dtype], None]]] = {
    **{
        (name, dtype): (op, proof)
        for dtype in DTYPES
        for name, op, proof in (
            ("transformer", "aten::_transformer_encoder_layer_fwd", fused_encoder_layer),
            ("lstm", "aten::mkldnn_rnn_layer", no_such_kernel),
        )
    }
}
"""Where the bits may not be autocast's: the op that parts the two, and the proof that it does."""


# --- autocast: PyTorch's own mixed precision -----------------------------------------------------


@every_model
@both_dtypes
def test_autocast_rules_are_autocast(name: str, dtype: torch.dtype) -> None:
    mixed = converted(name, "autocast", dtype)
    assert mixed.plan.low_nodes() > 0
    if (name, dtype) in DIFFERENT:
        op, proof = DIFFERENT[name, dtype]
        proof(op, dtype)
    else:
        assert_same_bits(native(name, dtype), ours(mixed, name))


class Transposed(nn.Module):
    """A linear layer on an input that does not lie in memory row by row."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(64, 70)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x.transpose(1, 2))


@both_dtypes
def test_autocast_rules_on_a_transposed_input(dtype: torch.dtype) -> None:
    """Autocast's cache of weights keeps requires_grad even under no_grad, and aten.linear then
    calls another kernel (mm in place of bmm) for an input such as this: in FP16 the bits are not
    equal. Without the cache, or with gradients, they are."""
    torch.manual_seed(0)
    model, x = Transposed().eval(), torch.randn(2, 64, 33)
    mixed = amp.convert(model, x, dtype=dtype, rules="autocast")
    with torch.autocast("cpu", dtype=dtype, cache_enabled=False), torch.no_grad():
        assert_same_bits(model(x).float(), mixed(x))
    with torch.autocast("cpu", dtype=dtype):
        expected = model(x).float()
    assert_same_bits(expected, mixed(x))
