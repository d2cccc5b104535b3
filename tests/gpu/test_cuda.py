"""The same promises on a CUDA device. Everything here skips, with a reason, where there is none."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils import _pytree as pytree

import amp_convert as amp
from amp_convert.core import device as devices
from amp_convert.core.random_state import preserved_rng, rng_state, set_rng_state
from amp_convert.validate.inference import costs
from amp_convert.validate.onnx.compare import validate_onnx
from tests.bits import assert_same_bits, tensors
from tests.zoo import DTYPES, Example, build, fused_transformer, mode

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch finds no CUDA device"),
]

CUDA = torch.device("cuda", 0)
MODELS = ("cnn", "bert", "gpt2", "llama", "t5", "whisper", "vit", "clip")
"""Those whose bits are autocast's on the CPU, too. The LSTM's are not here: cuDNN has its own."""


def on_cuda(name: str) -> Example:
    model, args, kwargs = build(name)
    args, kwargs = devices.move((args, kwargs), CUDA)
    return model.to(CUDA), args, kwargs


@pytest.fixture(autouse=True)
def repeatable() -> Iterator[None]:
    """cuDNN keeps to one algorithm, and TF32 is on, as the fastest user would have it."""
    before = (
        torch.backends.cudnn.deterministic,
        torch.backends.cuda.matmul.allow_tf32,
        torch.backends.cudnn.allow_tf32,
    )
    torch.backends.cudnn.deterministic = True
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    yield
    (
        torch.backends.cudnn.deterministic,
        torch.backends.cuda.matmul.allow_tf32,
        torch.backends.cudnn.allow_tf32,
    ) = before


def test_auto_is_cuda() -> None:
    chosen = devices.choose("auto")
    assert (chosen.type, chosen.reason) == ("cuda", "auto: CUDA is available")
    assert chosen.name == torch.cuda.get_device_name(chosen.device)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_converted_and_frozen(name: str, dtype: torch.dtype) -> None:
    model, args, kwargs = on_cuda(name)
    mixed = amp.convert(model, args, kwargs, dtype=dtype)
    assert mixed.plan.device == "cuda"
    assert mixed.plan.low_nodes() > 0
    with mode(model, mixed), torch.no_grad():
        want, have = model(*args, **kwargs), mixed(*args, **kwargs)
        frozen = mixed.freeze()
        assert_same_bits(have, frozen(*args, **kwargs))
    for a, b in zip(tensors(want), tensors(have), strict=True):
        assert (b.device, b.dtype, b.shape) == (a.device, a.dtype, a.shape)
        if a.is_floating_point():
            torch.testing.assert_close(b, a, rtol=0.05, atol=0.03)
    state = frozen.state_dict().values()
    assert {t.device for t in state} == {CUDA}
    assert any(t.dtype == dtype for t in state)


@pytest.mark.parametrize("name", MODELS)
def test_fp32_rules_change_nothing(name: str) -> None:
    model, args, kwargs = on_cuda(name)
    mixed = amp.convert(model, args, kwargs, rules="fp32")
    for fidelity in mixed.captured.fidelity:
        assert fidelity.outputs, fidelity.reason
    with devices.exact_fp32(CUDA), mode(model, mixed), torch.no_grad(), fused_transformer(False):
        assert_same_bits(model(*args, **kwargs), mixed(*args, **kwargs))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_autocast_rules_are_autocast(name: str, dtype: torch.dtype) -> None:
    model, args, kwargs = on_cuda(name)
    mixed = amp.convert(model, args, kwargs, dtype=dtype, rules="autocast")
    with mode(model, mixed), torch.no_grad():
        with torch.autocast("cuda", dtype=dtype):
            want = model(*args, **kwargs)
        have = mixed(*args, **kwargs)
    want = pytree.tree_map_only(
        torch.Tensor, lambda t: t.float() if t.is_floating_point() else t, want
    )
    assert_same_bits(want, have)


def test_compare_has_an_exact_reference() -> None:
    """TF32 is on outside; inside it is off, or the FP32 arm's own error would show."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 512)).to(CUDA).eval()
    x = torch.randn(256, 512, device=CUDA)
    mixed = amp.convert(model, x, rules="fp32")
    assert amp.compare(model, mixed, [x]).outputs[0].rel_l2 == 0
    low = amp.convert(model, x, dtype=torch.float16)
    [row] = amp.compare(model, low, [x]).outputs
    with torch.no_grad():
        exact = copy.deepcopy(model).double()(x.double())
        error = (low(x).double() - exact).norm() / exact.norm()
    assert row.rel_l2 == pytest.approx(float(error), rel=1e-2)
    assert torch.backends.cuda.matmul.allow_tf32


def test_times_come_from_events(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock around an asynchronous call would miss the device's work."""
    recorded: list[torch.cuda.Event] = []

    class Event(torch.cuda.Event):
        def record(self, stream: torch.cuda.Stream | None = None) -> None:
            recorded.append(self)
            super().record(stream)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    x = torch.randn(1024, 1024, device=CUDA)
    assert devices.milliseconds(lambda: torch.mm(x, x), CUDA) > 0
    start, end = recorded
    assert start.query()
    assert end.query()


def test_costs_of_all_arms() -> None:
    model, args, kwargs = on_cuda("bert")
    found = costs.measure(amp.convert(model, args, kwargs), args, kwargs)
    assert [cost.arm for cost in found] == ["fp32", "autocast", "mixed", "frozen"]
    assert all(cost.milliseconds and cost.peak_bytes for cost in found)


def test_random_state_of_the_device_is_kept() -> None:
    torch.cuda.manual_seed(3)
    with preserved_rng(CUDA):
        first = torch.rand(3, device=CUDA)
        state = rng_state(CUDA)
        second = torch.rand(3, device=CUDA)
        set_rng_state(CUDA, state)
        assert torch.equal(torch.rand(3, device=CUDA), second)
    assert torch.equal(torch.rand(3, device=CUDA), first)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_training_with_a_loss_scale(dtype: torch.dtype) -> None:
    model, args, _ = on_cuda("cnn")
    mixed = amp.convert(model, args, dtype=dtype).train()
    optimizer = torch.optim.SGD(mixed.parameters(), lr=0.05)
    scaler = torch.amp.GradScaler("cuda", enabled=dtype == torch.float16)
    target = torch.arange(4, device=CUDA) % 5
    losses = []
    for _ in range(10):
        loss = nn.functional.cross_entropy(mixed(*args), target)
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        assert all(p.grad is None or p.grad.dtype == p.dtype for p in mixed.parameters())
        scaler.step(optimizer)
        scaler.update()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("name", ["cnn", "bert", "gpt2"])
def test_onnx_files_run_in_low_precision(name: str, tmp_path: Path) -> None:
    """With the extra `onnx-gpu`: CUDA has kernels for FP16, so no node falls back to FP32."""
    runtime = pytest.importorskip("onnxruntime")
    if "CUDAExecutionProvider" not in runtime.get_available_providers():
        pytest.skip("this ONNX Runtime is built without CUDA")
    model, args, kwargs = on_cuda(name)
    with mode(model):
        mixed = amp.convert(model, args, kwargs, train=False)
        parity = validate_onnx(
            mixed, amp.export_onnx(mixed, tmp_path / "m.onnx"), [(args, kwargs, None)]
        )
    assert parity.providers[0] == "CUDAExecutionProvider"
    assert parity.ran.get("as written", 0) > 0
    assert parity.unrounded == ""
    for run in parity.runs:
        assert run.outputs, run.failure
        for output in run.outputs:
            assert output.against_fp32.nonfinite == 0
        assert run.arm == "fp32" or run.agrees or parity.parting or parity.drifting
