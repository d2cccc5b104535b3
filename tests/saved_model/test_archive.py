"""Archives of frozen models, read back by `torch.export.load` alone: the reader is the oracle."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import amp_convert as amp
from amp_convert.saved_model.archive import ArchiveInput
from tests import bits, zoo
from tests.archives import Named, loaded, saved

READER = """
import sys
for name in ("amp_convert", "transformers", "tests"):
    sys.modules[name] = None  # importing it raises
import torch
from torch.utils import _pytree as pytree
program = torch.export.load(sys.argv[1])
args, kwargs = torch.load(sys.argv[2])
found = program.module()(*args, **kwargs)
torch.save(found, sys.argv[3])
"""
"""Who deploys: without amp_convert, without the model's code, in a process of its own."""


def read_elsewhere(path: Path, *args: Any, **kwargs: Any) -> Any:
    """What the archive gives in a fresh process."""
    inputs, outputs = path.with_suffix(".in"), path.with_suffix(".out")
    torch.save((args, kwargs), inputs)
    command = [sys.executable, "-I", "-c", READER, str(path), str(inputs), str(outputs)]
    subprocess.run(command, check=True, cwd=path.parent, capture_output=True)
    return torch.load(outputs)


class TwoInputs(nn.Module):
    """A keyword, a flag and a class of its own, which no reader has."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 16), nn.Linear(16, 4)

    def forward(self, x: torch.Tensor, *, scale: torch.Tensor, flag: bool = True) -> Named:
        hidden = self.a(x) * scale if flag else self.a(x)
        return Named(self.b(hidden.relu()), (hidden, x))


class Counter(nn.Module):
    """Writes to a buffer, and to its input."""

    calls: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(8, 8)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        x.add_(1)
        return self.a(x) + self.calls


class Many(nn.Module):
    """Takes what others do not name."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(8, 8)

    def forward(self, *xs: torch.Tensor, **more: torch.Tensor) -> torch.Tensor:
        return self.a(torch.stack(xs).sum(0)) - self.a(more["z"]) + more["b"]


@zoo.every_model
@zoo.both_dtypes
def test_it_gives_the_frozen_models_bits(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    _, args, kwargs = zoo.example(name)
    frozen = zoo.converted(name, "default", dtype).freeze()
    archive = amp.save(frozen, tmp_path / "model.pt2")
    assert archive is not None
    assert archive.fixed == ()
    program = torch.export.load(tmp_path / "model.pt2")
    assert not [n for n in program.graph.nodes if "grad" in str(n.target)]
    assert {p.requires_grad for p in program.parameters()} <= {False}
    low = {v.dtype for v in program.state_dict.values() if v.is_floating_point()}
    assert dtype in low
    with torch.no_grad():
        bits.assert_same_bits(
            dict(enumerate(bits.tensors(frozen(*args, **kwargs)))),
            dict(enumerate(bits.tensors(program.module()(*args, **kwargs)))),
        )


@pytest.mark.slow
def test_who_reads_it_needs_no_code_of_others(tmp_path: Path) -> None:
    """Output classes of transformers become dicts; sizes vary as they do in the frozen model."""
    frozen = zoo.converted("gpt2", "default", torch.bfloat16).freeze()
    amp.save(frozen, tmp_path / "model.pt2")
    ids = torch.randint(0, 99, (5, 10))
    mask = torch.ones_like(ids)
    found = read_elsewhere(tmp_path / "model.pt2", input_ids=ids, attention_mask=mask)
    want = frozen(input_ids=ids, attention_mask=mask)
    assert list(found) == ["logits", "past_key_values"]
    assert torch.equal(found["logits"], want.logits)
    assert [t.shape for t in bits.tensors(found)] == [t.shape for t in bits.tensors(want)]


def test_classes_become_plain_and_flags_are_kept(tmp_path: Path) -> None:
    x, scale = torch.randn(3, 8), torch.rand(16)
    frozen, archive = saved(TwoInputs(), tmp_path / "m.pt2", x, scale=scale)
    assert archive.inputs == (
        ArchiveInput("x", "float32", (None, 8)),
        ArchiveInput("scale", "float32", (16,)),
    )
    other = torch.randn(7, 8)
    found = read_elsewhere(tmp_path / "m.pt2", other, scale=scale)
    want = frozen(other, scale=scale)
    bits.assert_same_bits(found, {"logits": want.logits, "states": want.states})


def test_a_batch_of_one_does_not_fix_the_size(tmp_path: Path) -> None:
    frozen, archive = saved(nn.Linear(8, 4), tmp_path / "m.pt2", torch.randn(1, 8))
    assert archive.inputs == (ArchiveInput("input", "float32", (None, 8)),)
    x = torch.randn(6, 8)
    assert torch.equal(loaded(tmp_path / "m.pt2")(x), frozen(x))


def test_a_size_that_does_not_vary_is_refused_by_the_reader(tmp_path: Path) -> None:
    saved(nn.Linear(8, 4), tmp_path / "m.pt2", torch.randn(2, 8))
    with pytest.raises(AssertionError, match=r"size\(\)\[1\] == 8"):
        loaded(tmp_path / "m.pt2")(torch.randn(2, 9))


def test_buffers_and_inputs_are_written_as_the_original_does(tmp_path: Path) -> None:
    model = Counter()
    frozen, _ = saved(model, tmp_path / "m.pt2", torch.randn(2, 8))
    program = loaded(tmp_path / "m.pt2")
    for _ in range(2):
        x = torch.randn(2, 8)
        mine, theirs = x.clone(), x.clone()
        with torch.no_grad():
            assert torch.equal(program(mine), frozen(theirs))
        assert torch.equal(mine, theirs)
        assert not torch.equal(mine, x)
    assert program.calls == frozen.calls == 2


def test_inputs_without_names_of_their_own(tmp_path: Path) -> None:
    given = [torch.randn(2, 8) for _ in range(4)]
    frozen, _ = saved(Many(), tmp_path / "m.pt2", *given[:2], z=given[2], b=given[3])
    found = loaded(tmp_path / "m.pt2")(*given[:2], z=given[2], b=given[3])
    assert torch.equal(found, frozen(*given[:2], z=given[2], b=given[3]))


@pytest.mark.parametrize("rules", ["fp32", "autocast"])
def test_rules_that_ask_for_pytorchs_bits_keep_them(rules: str, tmp_path: Path) -> None:
    """Matmul takes another path for weights that require grad: they do here as in the original."""
    model = nn.Sequential(nn.Linear(8, 16, bias=False), nn.Linear(16, 4, bias=False)).eval()
    x = torch.randn(2, 6, 8).transpose(0, 1)
    frozen = amp.convert(model, x, rules=rules, train=False).freeze()
    amp.save(frozen, tmp_path / "m.pt2")
    with torch.no_grad():
        assert torch.equal(loaded(tmp_path / "m.pt2")(x), frozen(x))
