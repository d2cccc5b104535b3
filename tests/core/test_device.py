"""Choosing, measuring, and leaving things as they were; and the device path without a GPU."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

import amp_convert as amp
from amp_convert import api
from amp_convert.core import device as devices
from amp_convert.core.device import Device
from amp_convert.core.errors import UsageError
from tests.zoo import build

# --- choosing ------------------------------------------------------------------------------------


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Pretend that this machine has so many GPUs."""

    def pretend(count: int) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: count - 1)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda d: f"GPU {d.index or 0}")

    return pretend


def test_auto_takes_cuda_where_there_is_one(gpus: Callable[[int], None]) -> None:
    gpus(2)
    expected = Device(torch.device("cuda", 1), "GPU 1", "auto: CUDA is available")
    assert devices.choose("auto") == expected
    assert devices.choose("auto").type == "cuda"


@pytest.mark.parametrize(
    ("version", "reason"),
    [(None, "auto: this PyTorch is built without CUDA"), ("12.8", "auto: no usable GPU")],
)
def test_auto_says_why_not_cuda(
    gpus: Callable[[int], None], monkeypatch: pytest.MonkeyPatch, version: Any, reason: str
) -> None:
    gpus(0)
    monkeypatch.setattr(torch.version, "cuda", version)
    chosen = devices.choose("auto")
    assert (chosen.type, chosen.reason) == ("cpu", reason)
    assert chosen.name


def test_a_device_that_was_asked_for(gpus: Callable[[int], None]) -> None:
    gpus(2)
    assert devices.choose("cpu").device == torch.device("cpu")
    assert devices.choose("cpu").reason == "--device cpu"
    assert devices.choose("cuda").device == torch.device("cuda")
    chosen = devices.choose("cuda:1")
    assert (chosen.device.index, chosen.name, chosen.reason) == (1, "GPU 1", "--device cuda:1")


@pytest.mark.parametrize(
    ("count", "asked", "message"),
    [
        (0, "cuda", "--device cuda was asked for, but PyTorch finds no CUDA device"),
        (0, "cuda:0", "PyTorch finds no CUDA device"),
        (2, "cuda:2", "--device cuda:2 was asked for, but there are 2 GPUs"),
        (1, "cuda:7", "there are 1 GPUs|there is 1 GPU"),
    ],
)
def test_a_device_that_is_not_there(
    gpus: Callable[[int], None], count: int, asked: str, message: str
) -> None:
    gpus(count)
    with pytest.raises(UsageError, match=message) as caught:
        devices.choose(asked)
    assert caught.value.exit_code == 2
    assert caught.value.mend


# --- where things are ----------------------------------------------------------------------------


def test_of_model() -> None:
    assert devices.of_model(nn.Linear(2, 2)) == torch.device("cpu")
    assert devices.of_model(nn.Linear(2, 2, device="meta")) == torch.device("meta")
    assert devices.of_model(nn.ReLU()) == torch.device("cpu")
    assert devices.of_model(nn.BatchNorm1d(2, affine=False, device="meta")).type == "meta"


def test_has_values() -> None:
    assert devices.has_values(nn.Linear(2, 2))
    assert devices.has_values(nn.ReLU())
    assert not devices.has_values(nn.Linear(2, 2, device="meta"))
    assert not devices.has_values(nn.BatchNorm1d(2, affine=False, device="meta"))
    with FakeTensorMode():
        assert not devices.has_values(nn.Linear(2, 2))


def test_move_moves_tensors_and_nothing_else() -> None:
    tree = {"x": torch.ones(2), "rest": [None, 3, ("text", torch.ones(1))]}
    moved = devices.move(tree, torch.device("meta"))
    assert moved["x"].device == moved["rest"][2][1].device == torch.device("meta")
    assert moved["rest"][:2] == [None, 3]
    assert tree["x"].device == torch.device("cpu")


# --- as it was before ----------------------------------------------------------------------------


@contextmanager
def tf32(value: bool) -> Iterator[None]:
    before = (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = value
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def settings() -> tuple[bool, bool]:
    return torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32


@pytest.mark.parametrize("users", [False, True])
def test_fp32_is_exact_inside_and_the_users_setting_comes_back(users: bool) -> None:
    if torch.backends.flags_frozen():
        pytest.skip("PyTorch's own test helpers, imported by another test, froze its flags")
    with tf32(users):
        with devices.exact_fp32(torch.device("cuda")):
            assert settings() == (False, False)
        assert settings() == (users, users)
        with pytest.raises(KeyError), devices.exact_fp32(torch.device("cuda")):
            raise KeyError
        assert settings() == (users, users)
        with devices.exact_fp32(torch.device("cpu")):
            assert settings() == (users, users)


# --- measuring -----------------------------------------------------------------------------------


def test_milliseconds_calls_once() -> None:
    calls: list[int] = []
    assert devices.milliseconds(lambda: calls.append(1), torch.device("cpu")) >= 0
    assert calls == [1]


# --- the device path without a GPU ---------------------------------------------------------------


class DevicesSeen(TorchDispatchMode):
    """Notes the device of every tensor that an operator makes."""

    def __init__(self) -> None:
        super().__init__()
        self.found: set[torch.device] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        self.found |= {t.device for t in pytree.tree_leaves(result) if torch.is_tensor(t)}
        return result


NO_CUDA = pytest.mark.skipif(
    torch.version.cuda is None, reason="fake CUDA tensors need a CUDA build of PyTorch"
)


@contextmanager
def pretended(kind: str) -> Iterator[torch.device]:
    """Tensors made inside have no values: on the meta device, or fake ones of another device."""
    device = torch.device(kind.removeprefix("fake "))
    if kind == "meta":
        with device:
            yield device
    else:
        with FakeTensorMode(allow_non_fake_inputs=True), device:
            yield device


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["meta", "fake cpu", pytest.param("fake cuda", marks=NO_CUDA)])
@pytest.mark.parametrize("name", ["cnn", "bert", "lstm"])
def test_a_model_without_values(kind: str, name: str) -> None:
    """Captured, planned, rewritten and run; nothing that the tool makes is on another device."""
    original, args, kwargs = build(name)
    with torch.no_grad():
        want = original.eval()(*args, **kwargs)
    with pretended(kind) as device:
        model, args, kwargs = build(name)
        mixed = amp.convert(model, args, kwargs, dtype=torch.bfloat16)
        modes = [mixed.captured.regions[0].traces[mode].values for mode in ("eval", "train")]
        made = {v.device for v in pytree.tree_leaves([list(m.values()) for m in modes])
                if hasattr(v, "device")}  # fmt: skip
        assert {d.type for d in made} == {device.type}
        for train in (False, True):
            with DevicesSeen() as seen:
                have = mixed.train(train)(*args, **kwargs)
            assert {d.type for d in seen.found} == {device.type}
            assert pytree.tree_structure(have) == pytree.tree_structure(want)
            for a, b in zip(pytree.tree_leaves(have), pytree.tree_leaves(want), strict=True):
                if torch.is_tensor(b):
                    assert (a.shape, a.dtype) == (b.shape, b.dtype)
        # It keeps the sizes of its example inputs, without their values, on the meta device.
        frozen = mixed.eval().freeze()
        assert {t.device.type for t in frozen.state_dict().values()} == {device.type}
        with DevicesSeen() as seen:
            frozen(*args, **kwargs)
        assert {d.type for d in seen.found} == {device.type}

    assert mixed.plan.device == device.type
    assert mixed.plan.calibration_batches == 0
    assert mixed.plan.low_nodes() > 0
    assert mixed.plan.share_macs_low() > 0.5
    assert {d.evidence for d in mixed.plan.eval if d.decided} == {
        "no evidence: nothing was measured"
    }
    assert [f.status for f in mixed.captured.fidelity] == ["unchecked", "unchecked"]
    with pytest.raises(UsageError, match="no values that could be compared"):
        api.compare(model, mixed, [(args, kwargs)])


@pytest.mark.slow
def test_the_plan_on_meta_is_the_plan_on_the_cpu_but_for_evidence() -> None:
    """Where no guard fires, values do not matter."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), torch.randn(3, 4)
    real = amp.convert(model, x).plan
    meta = amp.convert(copy.deepcopy(model).to("meta"), x.to("meta")).plan
    assert [(d.node, d.dtype, d.rule, d.macs) for d in real.eval] == [
        (d.node, d.dtype, d.rule, d.macs) for d in meta.eval
    ]
