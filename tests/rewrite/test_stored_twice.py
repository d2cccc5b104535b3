"""What a frozen model holds twice is what the plan says: the oracle is its `state_dict`."""

from __future__ import annotations

import html
import io
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn

import amp_convert as amp
from amp_convert.report.model import ModelInfo
from amp_convert.report.sections.audit import audit_report
from amp_convert.report.writers.audit_files import audit_markdown
from amp_convert.report.writers.audit_terminal import render_audit
from amp_convert.rewrite.converted_model import ConvertedModel
from tests.traps.test_traps import TRAPS
from tests.traps.test_traps import converted as converted_trap
from tests.zoo import both_dtypes, converted, every_model


class Tied(nn.Module):
    """A table that is looked up and multiplied; its entries are `offset` and a little more, and the
    offset is taken off again."""

    def __init__(self, offset: float) -> None:
        super().__init__()
        torch.manual_seed(0)
        away = offset * torch.tensor([1.0, -1.0]).repeat(8)
        self.table = nn.Parameter(torch.randn(64, 16) * 1e-2 + away)
        self.register_buffer("away", away)
        self.norm, self.middle = nn.LayerNorm(16), nn.Linear(16, 16)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.norm(nn.functional.embedding(ids, self.table) - self.away)
        return nn.functional.linear(self.middle(x), self.table)


def tied(offset: float) -> ConvertedModel:
    ids = torch.arange(32).reshape(4, 8)
    return amp.convert(Tied(offset).eval(), ids, train=False)


def held_twice(converted: ConvertedModel) -> dict[str, int]:
    """The weights that the frozen model has in two dtypes, and the bytes of the low copy."""
    state = converted.freeze().state_dict()
    found: dict[str, int] = {}
    for name, tensor in state.items():
        base, _, dtype = name.rpartition("_")
        if dtype in ("float16", "bfloat16", "float32") and base in state:
            both = [tensor, state[base]]
            found[base] = min(t.numel() * t.element_size() for t in both)
    return found


def said(converted: ConvertedModel) -> dict[str, int]:
    return {each.weight: each.low_bytes for each in converted.plan.stored_twice}


@every_model
@both_dtypes
def test_each_model_says_what_its_state_has(name: str, dtype: torch.dtype) -> None:
    mixed = converted(name, "default", dtype)
    assert said(mixed) == held_twice(mixed)


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n in TRAPS if "tied" in n or "table" in n])
def test_so_does_a_model_with_a_tied_weight(name: str) -> None:
    mixed = converted_trap(name, torch.float16)
    assert said(mixed) == held_twice(mixed)


def test_a_tied_table_is_low_for_both_readers() -> None:
    mixed = tied(0.0)
    assert said(mixed) == held_twice(mixed) == {}
    assert mixed.freeze().state_dict()["table"].dtype == torch.float16


def test_the_measured_effect_forbids_it_and_the_cost_is_said() -> None:
    mixed = tied(4.0)
    [twice] = mixed.plan.stored_twice
    assert (twice.weight, twice.low_bytes) == ("table", 64 * 16 * 2)
    assert twice.reader == "/aten.embedding#0"
    assert twice.reason.startswith("its result rounded to float16 throws aten.sub")
    assert said(mixed) == held_twice(mixed)
    sentence = "table: 2 KiB more; /aten.embedding#0 reads FP32: its result rounded to float16"
    report = audit_report(
        mixed.plan,
        ModelInfo(name="tied", source="", digest="", model_class="Tied", parameters=1),
        "0.1.0",
    )
    assert sentence in html.unescape(audit_markdown(report))
    stream = io.StringIO()
    render_audit(Console(file=stream, width=200), report)
    assert sentence in stream.getvalue()


class Reads(nn.Module):
    """A layer, and something else that is made of its weight."""

    def __init__(self, read: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.read = nn.Linear(8, 8), read

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.layer(x), self.read(x, self.layer.weight)


READS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "row": lambda x, w: (x * w[0]).exp(),
    "slice": lambda x, w: (x[:, :4] * w[:4, 0]).exp(),
    "diagonal": lambda x, w: (x * w.diagonal()).exp(),
    "expanded": lambda x, w: (x.unsqueeze(1) * w.expand(4, 8, 8)).exp(),
    "returned": lambda x, w: w,
    "returned view": lambda x, w: w.t(),
    "copy": lambda x, w: (x * w.clone()[0]).exp(),
    "chunk": lambda x, w: (x * w.chunk(2)[1][0]).exp(),
}


@pytest.mark.parametrize("name", READS)
def test_whatever_reads_a_weight_in_fp32(name: str) -> None:
    mixed = amp.convert(Reads(READS[name]).eval(), torch.randn(4, 8), train=False)
    state = mixed.freeze().state_dict()
    assert {t.dtype for t in state.values()} == {torch.float16, torch.float32}
    [twice] = mixed.plan.stored_twice
    assert (twice.weight, twice.low_bytes) == ("layer.weight", 128)
    assert twice.reason == "the model returns it" if "returned" in name else twice.reader


def test_a_name_that_the_model_has_is_not_taken() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.w = nn.Parameter(torch.randn(8, 8))
            self.w_float32 = nn.Parameter(torch.randn(8, 8) * 5)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            wide = torch.exp(x.unsqueeze(1) * self.w).sum(1)
            return (x @ self.w).relu() @ self.w_float32, wide

    model, x = Named().eval(), torch.randn(4, 8)
    frozen = amp.convert(model, x, train=False).freeze()
    with torch.no_grad():
        for have, want in zip(frozen(x), model(x), strict=True):
            torch.testing.assert_close(have, want, rtol=2e-2, atol=2e-2)


class Part(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer, self.out = layer, nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.layer(x).relu())


class Parts(nn.Module):
    """Two parts that have a layer in common."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        layer = nn.Linear(8, 8)
        self.a, self.b = Part(layer), Part(layer)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        if y.detach().sum().item() > 1e9:
            y = y * 2
        return y + self.b(x)


def test_a_layer_in_two_parts_of_two_dtypes(tmp_path: Path) -> None:
    rules = tmp_path / "rules.toml"
    rules.write_text('[[rule]]\nlayer = "b.layer"\ncategory = "deny"\nreason = "mine"\n')
    model, x = Parts().eval(), torch.randn(4, 8)
    mixed = amp.convert(model, x, rules=["default", rules], train=False)
    assert not mixed.captured.is_whole
    assert {each.weight for each in mixed.plan.stored_twice} == {"b.layer.weight", "b.layer.bias"}
    assert torch.equal(mixed.freeze()(x), mixed(x))


class Twice(nn.Module):
    """One weight, read as it is, through a view, and by what is computed from it alone."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)
        self.b.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        y = self.b(self.a(x)) @ self.a.weight.t()
        return y * self.a.weight.sum()


def test_views_and_names_of_one_weight_are_that_weight(tmp_path: Path) -> None:
    rules = tmp_path / "rules.toml"
    rules.write_text('[[rule]]\nlayer = "b"\ncategory = "deny"\nreason = "mine"\n')
    model, x = Twice().eval(), torch.randn(4, 8)
    plain = amp.convert(model, x, train=False)
    assert said(plain) == held_twice(plain) == {}
    mixed = amp.convert(model, x, rules=["default", rules], train=False)
    assert said(mixed) == held_twice(mixed)
    [twice] = mixed.plan.stored_twice
    assert (twice.weight, twice.reader, twice.reason) == ("b.weight", "b/aten.linear#0", "mine")
