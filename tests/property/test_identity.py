"""Two presets with an oracle: `fp32` must be eager PyTorch, `autocast` must be `torch.autocast`.

Both to the last bit, on every model of the zoo.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

import amp_convert as amp
from amp_convert.rewrite.converted_model import ConvertedModel
from tests.zoo import (
    DTYPES,
    Example,
    assert_same_bits,
    both_dtypes,
    converted,
    every_model,
    example,
    fused_transformer,
    mode,
    same_bits,
)

# --- fp32: nothing changes -----------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """All that one forward and backward pass of a model leaves behind."""

    outputs: Any
    gradients: dict[str, torch.Tensor]
    buffers: dict[str, torch.Tensor]


def run(call: nn.Module, original: nn.Module, name: str, *, train: bool) -> Run:
    _, args, kwargs = example(name)
    return run_on(call, (original, args, kwargs), train=train)


def run_on(call: nn.Module, built: Example, *, train: bool) -> Run:
    """Forward, then backward from random cotangents, from fixed random states."""
    original, args, kwargs = built
    wanted = {n: p for n, p in original.named_parameters() if p.requires_grad}
    with mode(original, call, train=train):
        result = call(*args, **kwargs)
        outputs = [t for t in pytree.tree_leaves(result) if getattr(t, "requires_grad", False)]
        cotangents = [torch.randn_like(t) for t in outputs]
        found = torch.autograd.grad(outputs, list(wanted.values()), cotangents, allow_unused=True)
        gradients = {n: g for n, g in zip(wanted, found, strict=True) if g is not None}
        buffers = {n: b.clone() for n, b in original.named_buffers()}
    return Run(pytree.tree_map_only(torch.Tensor, torch.detach, result), gradients, buffers)


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


# --- autocast: PyTorch's own mixed precision -----------------------------------------------------


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


def in_fp32(tree: Any) -> Any:
    return pytree.tree_map_only(
        torch.Tensor, lambda t: t.float() if t.is_floating_point() else t, tree
    )


def equal(want: Any, have: Any) -> bool:
    pairs = zip(pytree.tree_leaves(want), pytree.tree_leaves(have), strict=True)
    return all(same_bits(a, b) for a, b in pairs if isinstance(a, torch.Tensor))


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


# --- models that are tried here alone -----------------------------------------------------------


class Gru(nn.Module):
    """Two layers in both directions, from a state that is given."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 16)
        self.gru = nn.GRU(16, 24, 2, batch_first=True, dropout=0.1, bidirectional=True)
        self.head = nn.Linear(48, 50)

    def forward(self, ids: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
        return self.head(self.gru(self.embed(ids), state)[0])


def _padded_left() -> tuple[torch.Tensor, torch.Tensor]:
    mask = torch.ones(2, 10, dtype=torch.long)
    mask[0, :3] = 0
    return torch.randint(3, 99, (2, 10)), mask


def _decoder(family: str) -> Example:
    config = getattr(transformers, f"{family}Config")(
        vocab_size=99,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        use_cache=False,
    )
    return getattr(transformers, f"{family}ForCausalLM")(config), _padded_left(), {}


def _wav2vec2() -> Example:
    config = transformers.Wav2Vec2Config(
        vocab_size=32,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=37,
        conv_dim=(16, 16),
        conv_stride=(5, 2),
        conv_kernel=(10, 3),
        num_feat_extract_layers=2,
        num_conv_pos_embeddings=16,
        num_conv_pos_embedding_groups=2,
        apply_spec_augment=False,
    )
    return transformers.Wav2Vec2ForCTC(config), (torch.randn(2, 800),), {}


def _seq2seq() -> Example:
    model = nn.Transformer(32, 4, 2, 2, 64, batch_first=True)
    return model, (torch.randn(2, 7, 32), torch.randn(2, 5, 32)), {}


def _gru() -> Example:
    return Gru(), (torch.randint(0, 50, (2, 10)), torch.randn(4, 2, 24)), {}


FURTHER: dict[str, Callable[[], Example]] = {
    "qwen3": lambda: _decoder("Qwen3"),
    "gemma2": lambda: _decoder("Gemma2"),
    "wav2vec2": _wav2vec2,
    "transformer": _seq2seq,
    "gru": _gru,
}
every_further = pytest.mark.parametrize("further", FURTHER)


@pytest.fixture
def built(further: str) -> Example:
    torch.manual_seed(0)
    model, args, kwargs = FURTHER[further]()
    return model.eval(), args, kwargs


@pytest.mark.slow
@every_further
def test_fp32_rules_change_nothing_in_further_models(built: Example) -> None:
    original, args, _ = built
    mixed = amp.convert(original, args, rules="fp32")
    for train in (False, True):
        want, have = (run_on(call, built, train=train) for call in (original, mixed))
        assert want.gradients
        assert_same_bits([want.outputs, want.gradients], [have.outputs, have.gradients])


@pytest.mark.slow
@every_further
@both_dtypes
def test_autocast_rules_are_autocast_in_further_models(
    further: str, built: Example, dtype: torch.dtype
) -> None:
    original, args, _ = built
    mixed = amp.convert(original, args, dtype=dtype, rules="autocast", train=False)
    assert mixed.plan.low_nodes() > 0

    def eager(*args: Any) -> Any:
        with torch.autocast("cpu", dtype=dtype):
            return in_fp32(original(*args))

    with torch.no_grad(), fused_transformer(False):
        have, want = mixed(*args), eager(*args)
        if further != "gru":
            assert_same_bits(want, have)
        else:
            # CPU autocast has no word on aten.gru: it casts the products in it, and carries the
            # state on in FP32. Ours has the whole operator, and with it the state, low.
            assert not equal(want, have)
            assert_same_bits(eager(args[0], args[1].to(dtype)), have)


@pytest.mark.slow
@both_dtypes
def test_what_autocast_rules_change_in_gradients(dtype: torch.dtype) -> None:
    """A value that several products read is cast once, and autocast casts it for each: the sum of
    its gradients is then taken in the low dtype, in place of FP32."""
    torch.manual_seed(0)
    model = nn.ModuleList(nn.Linear(16, 16) for _ in range(3)).eval()
    norm, x = nn.LayerNorm(16), torch.randn(4, 16)

    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.linears = norm, model

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.norm(x)
            return sum(linear(y) for linear in self.linears)

    shared = Shared().eval()
    mixed = amp.convert(shared, x, dtype=dtype, rules="autocast")

    def gradient(call: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        leaf = x.clone().requires_grad_()
        return torch.autograd.grad(call(leaf).float().square().sum(), leaf)[0]

    def once(x: torch.Tensor) -> torch.Tensor:
        y = norm(x).to(dtype)
        return sum(linear(y) for linear in model)

    with torch.autocast("cpu", dtype=dtype):
        assert_same_bits(shared(x).float(), mixed(x))
        each, one = gradient(shared), gradient(once)
    assert_same_bits(one, gradient(mixed))
    assert not same_bits(each, one)
