"""Converted models as safetensors files: what comes back trains on, and nothing else is taken."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import amp_convert as amp
from amp_convert.core.errors import ModelError, UsageError
from tests import bits, zoo

X = torch.linspace(-1, 1, 32).reshape(4, 8)


class Tied(nn.Module):
    """One weight of two names, a buffer, and a part with FP32 in it."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.a, self.norm, self.b = nn.Linear(8, width), nn.LayerNorm(width), nn.Linear(8, width)
        self.b.weight = self.a.weight
        self.register_buffer("scale", torch.full((width,), 2.0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.b(self.norm(self.a(x)) * self.scale)).exp().sum(-1)


def built(width: int = 8, seed: int = 0) -> Tied:
    torch.manual_seed(seed)
    return Tied(width)


def saved(path: Path, **settings: Any) -> amp.ConvertedModel:
    mixed = amp.convert(built().eval(), X, **settings)
    amp.save(mixed, path)
    return mixed


@pytest.mark.parametrize("dtype", zoo.DTYPES)
def test_it_comes_back_as_it_was(dtype: torch.dtype, tmp_path: Path) -> None:
    mixed = saved(tmp_path / "m.safetensors", dtype=dtype)
    other = built(seed=1)
    again = amp.load(tmp_path / "m.safetensors", other, X)
    assert other.a.weight is other.b.weight
    decided = [[(d.node, d.low) for d in m.plan.eval] for m in (mixed, again)]
    assert decided[0] == decided[1]
    assert again.plan.dtype == mixed.plan.dtype
    with torch.no_grad():
        assert torch.equal(again.eval()(X), mixed.eval()(X))


def test_it_trains_on_as_if_it_had_never_stopped(tmp_path: Path) -> None:
    def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad()
        model(X).square().mean().backward()
        optimizer.step()

    def optimizer(model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.SGD(model.parameters(), lr=0.01)

    mixed = amp.convert(built(), X).train()
    first = optimizer(mixed)
    step(mixed, first)
    amp.save(mixed, tmp_path / "m.safetensors")
    again = amp.load(tmp_path / "m.safetensors", built(seed=1), X).train()
    second = optimizer(again)
    for _ in range(3):
        step(mixed, first)
        step(again, second)
    bits.assert_same_bits(dict(mixed.state_dict()), dict(again.state_dict()))


def test_a_weight_of_two_names_is_stored_once(tmp_path: Path) -> None:
    saved(tmp_path / "m.safetensors")
    names = set(load_file(tmp_path / "m.safetensors"))
    assert names == {"a.weight", "a.bias", "norm.weight", "norm.bias", "b.bias", "scale"}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["bert", "cnn", "t5"])
def test_real_models_come_back(name: str, tmp_path: Path) -> None:
    _, args, kwargs = zoo.example(name)
    mixed = zoo.converted(name, "default", torch.float16)
    amp.save(mixed, tmp_path / "m.safetensors")
    other, _, _ = zoo.build(name)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    again = amp.load(tmp_path / "m.safetensors", other, args, kwargs)
    with torch.no_grad():
        bits.assert_same_bits(again.eval()(*args, **kwargs), mixed.eval()(*args, **kwargs))


def test_one_for_inference_stays_one(tmp_path: Path) -> None:
    saved(tmp_path / "m.safetensors", train=False)
    again = amp.load(tmp_path / "m.safetensors", built().eval(), X)
    assert not again.has_train


class TestOtherModels:
    def test_other_names(self, tmp_path: Path) -> None:
        saved(tmp_path / "m.safetensors")
        with pytest.raises(ModelError, match=r"the model has no a\.bias"):
            amp.load(tmp_path / "m.safetensors", nn.Linear(8, 8), X)

    def test_other_shapes_leave_the_model_alone(self, tmp_path: Path) -> None:
        saved(tmp_path / "m.safetensors")
        other = nn.Module.__new__(Tied)
        Tied.__init__(other)
        other.norm = nn.LayerNorm(8, bias=True)
        other.scale = torch.ones(3)
        before = {name: tensor.clone() for name, tensor in other.state_dict().items()}
        with pytest.raises(ModelError, match=r"scale is torch.float32 of shape \(3,\)"):
            amp.load(tmp_path / "m.safetensors", other, X)
        bits.assert_same_bits(before, dict(other.state_dict()))

    def test_the_same_weights_used_otherwise(self, tmp_path: Path) -> None:
        class Other(Tied):
            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return self.b(torch.tanh(self.a(x)) * self.scale)

        saved(tmp_path / "m.safetensors")
        with pytest.raises(ModelError, match=r"the model (computes|does not compute)"):
            amp.load(tmp_path / "m.safetensors", Other(), X)


def _header(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change what the file's own header says."""
    data = path.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])
    document = json.loads(header["__metadata__"]["amp_convert"])
    change(document)
    header["__metadata__"]["amp_convert"] = json.dumps(document)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


class TestFilesOfOthers:
    def refused(self, path: Path, why: str) -> None:
        with pytest.raises(UsageError, match=why):
            amp.load(path, built(), X)

    def test_no_file(self, tmp_path: Path) -> None:
        self.refused(tmp_path / "none.safetensors", "is no saved model: No such file")

    def test_no_safetensors(self, tmp_path: Path) -> None:
        (tmp_path / "m.safetensors").write_bytes(b"\x80\x04 a pickle")
        self.refused(tmp_path / "m.safetensors", "is no saved model")

    def test_weights_of_somebody_else(self, tmp_path: Path) -> None:
        save_file({"a": torch.ones(1)}, tmp_path / "m.safetensors")
        self.refused(tmp_path / "m.safetensors", "amp-convert did not write it")

    def test_cut_short(self, tmp_path: Path) -> None:
        saved(tmp_path / "m.safetensors")
        data = (tmp_path / "m.safetensors").read_bytes()
        (tmp_path / "m.safetensors").write_bytes(data[:-4])
        self.refused(tmp_path / "m.safetensors", "is no saved model")

    def test_a_changed_weight(self, tmp_path: Path) -> None:
        saved(tmp_path / "m.safetensors")
        data = bytearray((tmp_path / "m.safetensors").read_bytes())
        data[-1] ^= 1
        (tmp_path / "m.safetensors").write_bytes(bytes(data))
        self.refused(tmp_path / "m.safetensors", "it has changed since")

    def test_a_changed_plan(self, tmp_path: Path) -> None:
        saved(tmp_path / "m.safetensors")
        _header(
            tmp_path / "m.safetensors",
            lambda d: d.update(plan=d["plan"].replace('"deny"', '"allow"')),
        )
        self.refused(tmp_path / "m.safetensors", "it has changed since")

    def test_another_version(self, tmp_path: Path) -> None:
        saved(tmp_path / "m.safetensors")
        _header(tmp_path / "m.safetensors", lambda d: d.update(schema_version=2))
        self.refused(tmp_path / "m.safetensors", "another version of amp-convert wrote it")

    @pytest.mark.parametrize("name", ["plan", "aliases", "digest", "for_training", "model_class"])
    def test_an_entry_of_another_kind(self, name: str, tmp_path: Path) -> None:
        saved(tmp_path / "m.safetensors")
        _header(tmp_path / "m.safetensors", lambda d: d.update({name: 7}))
        self.refused(tmp_path / "m.safetensors", f"its entry {name} is not as")


def test_state_that_is_no_tensor_is_refused(tmp_path: Path) -> None:
    class Extra(Tied):
        def get_extra_state(self) -> Any:
            return {"steps": 3}

        def set_extra_state(self, state: Any) -> None:
            pass

    mixed = amp.convert(Extra().eval(), X, train=False)
    with pytest.raises(ModelError, match="_extra_state of the model's state is no dense tensor"):
        amp.save(mixed, tmp_path / "m.safetensors")
    assert not list(tmp_path.iterdir())


class Table(nn.Module):
    def __init__(self, *, tied: bool) -> None:
        super().__init__()
        self.embed, self.out = nn.Embedding(10, 4), nn.Linear(4, 10, bias=False)
        if tied:
            self.out.weight = self.embed.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.out(self.embed(ids))


@pytest.mark.parametrize("tied", [True, False])
def test_ties_have_to_be_those_of_the_file(tied: bool, tmp_path: Path) -> None:
    """Else one of two tables would be lost without a word, or one be trained as two."""
    ids = torch.randint(10, (4, 3))
    amp.save(amp.convert(Table(tied=tied), ids), tmp_path / "m.safetensors")
    amp.load(tmp_path / "m.safetensors", Table(tied=tied), ids)
    with pytest.raises(ModelError, match="are one tensor in the"):
        amp.load(tmp_path / "m.safetensors", Table(tied=not tied), ids)


def test_a_model_without_memory_is_refused(tmp_path: Path) -> None:
    saved(tmp_path / "m.safetensors")
    with torch.device("meta"):
        empty = built()
    with pytest.raises(ModelError, match="the model has no memory yet"):
        amp.load(tmp_path / "m.safetensors", empty, X)
