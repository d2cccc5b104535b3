"""What a trace would fix for no reason of the model's: lengths of recurrent layers, `len(x)`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch._decomp import decomposition_table

import amp_convert as amp
from amp_convert.capture.sizes.python_len import open_len
from amp_convert.capture.sizes.recurrent_shapes import open_lengths
from tests.bits import assert_same_bits

aten = torch.ops.aten
LAYERS: dict[str, tuple[type[nn.RNNBase], dict[str, Any]]] = {
    "lstm": (nn.LSTM, {"num_layers": 2, "bidirectional": True, "batch_first": True}),
    "lstm-projected": (nn.LSTM, {"proj_size": 3}),
    "gru": (nn.GRU, {"batch_first": True}),
    "rnn-tanh": (nn.RNN, {}),
    "rnn-relu": (nn.RNN, {"nonlinearity": "relu", "batch_first": True, "num_layers": 2}),
}


class Recurrent(nn.Module):
    def __init__(self, name: str) -> None:
        super().__init__()
        kind, settings = LAYERS[name]
        self.layer = kind(8, 6, **settings)
        width = 3 if "proj_size" in settings else 12 if "bidirectional" in settings else 6
        self.head = nn.Linear(width, 4)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, Any]:
        hidden, state = self.layer(x)
        return self.head(hidden), state


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYERS)
def test_lengths_stay_open(name: str) -> None:
    torch.manual_seed(0)
    model = Recurrent(name).eval()
    first = 0 if LAYERS[name][1].get("batch_first") else 1

    def x(batch: int, length: int) -> torch.Tensor:
        return torch.randn(batch, length, 8) if first == 0 else torch.randn(length, batch, 8)

    mixed = amp.convert(model, x(2, 5), dtype=torch.bfloat16, calibration=[x(3, 7)])
    assert mixed.captured.fixed_sizes == ()
    assert mixed.captured.takes((x(4, 9),), {}) == ""
    other = x(4, 9)
    runner = mixed.captured.regions[0].runner("eval")  # type: ignore[arg-type]
    with torch.no_grad():
        assert_same_bits(runner(other), model(other))
        assert_same_bits(mixed.eval()(other), mixed.freeze()(other))
    mixed.train()
    mixed(other)[0].sum().backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.slow
@pytest.mark.parametrize(("name", "open_"), [("lstm", True), ("gru", True), ("rnn-relu", False)])
def test_onnx_has_the_lengths_that_it_takes(name: str, open_: bool, tmp_path: Path) -> None:
    """PyTorch's exporter writes the steps of a plain RNN one by one."""
    onnxruntime = pytest.importorskip("onnxruntime")
    torch.manual_seed(0)
    model = Recurrent(name).eval()
    inputs = [torch.randn(3, 7, 8)]
    mixed = amp.convert(model, torch.randn(2, 5, 8), rules="fp32", calibration=inputs, train=False)
    written = amp.export_onnx(mixed, tmp_path / "model.onnx")
    assert written.inputs[0].shape == ("batch", "x_dim_1" if open_ else 5, 8)
    assert written.outputs[0].shape == ("batch", "x_dim_1" if open_ else 5, 4)
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    x = torch.randn(4, 9 if open_ else 5, 8)
    found = session.run(None, {"x": x.numpy()})[0]
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(found), model(x)[0], rtol=1e-4, atol=1e-5)


def test_nothing_is_left_behind() -> None:
    def now() -> tuple[dict[Any, Any], Any]:
        return dict(aten.lstm.input.py_kernels), decomposition_table[aten.lstm.input]

    before = now()
    with open_lengths():
        assert now() != before
    assert now() == before


class Counting(nn.Module):
    """A graph convolution in the words of its authors."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor, edges: torch.Tensor) -> torch.Tensor:
        degree = torch.ones(len(x)).index_add(0, edges[1], torch.ones(edges.shape[1]))
        return torch.zeros(len(x), 4).index_add(0, edges[1], self.a(x)[edges[0]]) / degree[:, None]


def test_len_of_a_tensor_stays_open() -> None:
    def call(nodes: int, edges: int) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.randn(nodes, 8), torch.randint(nodes, (2, edges))

    model = Counting().eval()
    mixed = amp.convert(model, call(5, 7), rules="fp32", calibration=[call(6, 9)], train=False)
    assert mixed.captured.fixed_sizes == ()
    for given in (call(5, 7), call(11, 4)):
        assert mixed.captured.takes(given, {}) == ""
        with torch.no_grad():
            assert torch.equal(mixed(*given), model(*given))


class Asking(Counting):
    """Asks what kind of number a length is."""

    def forward(self, x: torch.Tensor, edges: torch.Tensor) -> torch.Tensor:
        count = len(x)
        return self.a(x) * (1.0 if isinstance(count, int) else 5.0)


def test_code_that_asks_for_a_plain_number_gets_one() -> None:
    x, edges = torch.randn(5, 8), torch.randint(5, (2, 7))
    model = Asking().eval()
    mixed = amp.convert(model, (x, edges), rules="fp32", train=False)
    with torch.no_grad():
        assert torch.equal(mixed(x, edges), model(x, edges))
    assert mixed.captured.takes((torch.randn(6, 8), edges), {})


def test_len_is_pythons_again() -> None:
    with open_len(Counting()):
        assert len(torch.zeros(3, 2)) == 3
        assert len([1, 2]) == 2
        assert "len" in globals()
        with pytest.raises(TypeError, match="0-d tensor"):
            len(torch.zeros(()))
    assert "len" not in globals()
    with open_len(nn.Linear(2, 2)):
        assert "len" not in vars(nn.Linear.forward.__globals__["F"])
