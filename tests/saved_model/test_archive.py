"""Archives of frozen models, read back by `torch.export.load` alone: the reader is the oracle."""

from __future__ import annotations

import copy
import inspect
import json
import subprocess
import sys
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn
from torch.utils import _pytree as pytree

import amp_convert as amp
from amp_convert.core.errors import UnsupportedModelError, UsageError
from amp_convert.core.files import digests
from amp_convert.rewrite.frozen_model import FrozenModel
from amp_convert.saved_model.archive import Archive, ArchiveInput, exported
from amp_convert.saved_model.plain_call import plain
from tests import zoo

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


def saved(model: nn.Module, path: Path, *args: Any, **kwargs: Any) -> tuple[FrozenModel, Archive]:
    """`model` converted, frozen and saved as `path`."""
    frozen = amp.convert(model.eval(), args, kwargs, train=False).freeze()
    archive = amp.save(frozen, path)
    assert archive is not None
    return frozen, archive


def loaded(path: Path) -> Any:
    return torch.export.load(path).module()


class Pair(NamedTuple):
    first: torch.Tensor
    second: torch.Tensor


@dataclass
class Named:
    logits: torch.Tensor
    states: tuple[torch.Tensor, ...]


pytree.register_dataclass(Named)


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
        zoo.assert_same_bits(
            dict(enumerate(zoo.tensors(frozen(*args, **kwargs)))),
            dict(enumerate(zoo.tensors(program.module()(*args, **kwargs)))),
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
    assert [t.shape for t in zoo.tensors(found)] == [t.shape for t in zoo.tensors(want)]


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
    zoo.assert_same_bits(found, {"logits": want.logits, "states": want.states})


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


def test_it_says_what_it_is(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(8, 4), nn.Softmax(-1))
    frozen, archive = saved(model, tmp_path / "m.pt2", torch.randn(2, 8))
    texts = {"amp_convert.json": "", "plan.toml": ""}
    program = torch.export.load(tmp_path / "m.pt2", extra_files=texts)
    assert texts["plan.toml"] == frozen.plan.to_toml()
    assert "verdict.json" not in texts
    said = json.loads(texts["amp_convert.json"])
    assert said == {
        "schema_version": 1,
        "amp_convert": amp.__version__,
        "torch": torch.__version__,
        "model_class": "torch.nn.modules.container.Sequential",
        "dtype": "float16",
        "device": "cpu",
        "inputs": [{"name": "input", "dtype": "float32", "shape": [None, 8]}],
        "fixed": [],
        "weights_digest": digests.of_tensors(sorted(program.state_dict.items())),
        "plan_digest": digests.of_text(texts["plan.toml"]),
    }
    assert archive.bytes == (tmp_path / "m.pt2").stat().st_size


def test_no_data_of_the_users_are_in_it(tmp_path: Path) -> None:
    secret = torch.full((2, 8), 7.25)
    saved(nn.Linear(8, 4), tmp_path / "m.pt2", secret)
    program = torch.export.load(tmp_path / "m.pt2")
    assert [t.count_nonzero() for t in zoo.tensors(program.example_inputs)] == [0]


def test_a_verdict_goes_with_it(tmp_path: Path) -> None:
    model, x = nn.Linear(8, 4).eval(), torch.randn(4, 8)
    run = amp.check(model, x)
    amp.save(run.converted.freeze(), tmp_path / "m.pt2", verdict=run.verdict)
    texts = {"verdict.json": ""}
    torch.export.load(tmp_path / "m.pt2", extra_files=texts)
    said = json.loads(texts["verdict.json"])["verdict"]
    assert said["status"] == run.verdict.status
    assert [c["name"] for c in said["checks"]] == [c.name for c in run.verdict.checks]


class Loop(nn.Module):
    """A part of it looks at values: it is captured in parts."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.a(x)
        return self.b(x) if bool(x.sum() > 0) else x


def test_a_model_in_parts_is_refused(tmp_path: Path) -> None:
    frozen = amp.convert(Loop().eval(), torch.randn(2, 8), train=False).freeze()
    with pytest.raises(UnsupportedModelError, match="only parts of this model could be captured"):
        amp.save(frozen, tmp_path / "m.pt2")
    assert not list(tmp_path.iterdir())


def test_paths_of_the_wrong_kind_are_refused(tmp_path: Path) -> None:
    mixed = amp.convert(nn.Linear(8, 4).eval(), torch.randn(2, 8), train=False)
    with pytest.raises(UsageError, match=r"a frozen model is saved as a \.pt2 file"):
        amp.save(mixed.freeze(), tmp_path / "m.safetensors")
    with pytest.raises(UsageError, match=r"a converted model is saved as a \.safetensors file"):
        amp.save(mixed, tmp_path / "m.pt2")
    with pytest.raises(UsageError, match="no converted model"):
        amp.save(nn.Linear(8, 4), tmp_path / "m.pt2")  # type: ignore[arg-type]
    (tmp_path / "folder.pt2").mkdir()
    with pytest.raises(UsageError, match="is a folder"):
        amp.save(mixed.freeze(), tmp_path / "folder.pt2")


def test_what_fails_half_way_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    frozen, _ = saved(nn.Linear(8, 4), tmp_path / "m.pt2", torch.randn(2, 8))
    before = (tmp_path / "m.pt2").read_bytes()

    def full(program: Any, path: Path, **_: Any) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch.export, "save", full)
    with pytest.raises(UsageError, match="No space left"):
        amp.save(frozen, tmp_path / "m.pt2")
    assert [p.name for p in tmp_path.iterdir()] == ["m.pt2"]
    assert (tmp_path / "m.pt2").read_bytes() == before


def test_copies_can_be_saved(tmp_path: Path) -> None:
    frozen, archive = saved(nn.Linear(8, 4), tmp_path / "m.pt2", torch.randn(2, 8))
    again = amp.save(copy.deepcopy(frozen), tmp_path / "m.pt2")
    assert again == archive


@pytest.mark.parametrize(
    ("value", "wanted"),
    [
        (Pair(torch.zeros(1), torch.ones(1)), (torch.zeros(1), torch.ones(1))),
        ([OrderedDict(a=(1, None))], [{"a": (1, None)}]),
        (Named(torch.zeros(1), ()), {"logits": torch.zeros(1), "states": ()}),
    ],
)
def test_plain_containers(value: Any, wanted: Any) -> None:
    found = plain(value)
    assert pytree.tree_structure(found) == pytree.tree_structure(wanted)
    assert pytree.tree_leaves(found) == pytree.tree_leaves(wanted)


class TestDeploying:
    """What other tools make of the frozen model as it is."""

    @pytest.mark.slow
    @pytest.mark.parametrize("name", ["cnn", "bert", "lstm"])
    def test_export_and_trace_take_it(self, name: str, tmp_path: Path) -> None:
        model, args, kwargs = zoo.example(name)
        frozen = zoo.converted(name, "default", torch.bfloat16).freeze()
        assert inspect.signature(frozen.forward) == inspect.signature(model.forward)
        want = zoo.tensors(frozen(*args, **kwargs))
        torch.export.save(
            torch.export.export(frozen, args, kwargs, strict=False), tmp_path / "m.pt2"
        )
        traced = torch.jit.trace(
            frozen,
            example_inputs=args or None,
            example_kwarg_inputs=kwargs or None,
            strict=False,  # it may return a dict
        )
        torch.jit.save(traced, tmp_path / "m.pt")
        for program in (loaded(tmp_path / "m.pt2"), torch.jit.load(tmp_path / "m.pt")):
            with torch.no_grad():
                have = zoo.tensors(program(*args, **kwargs))
            for a, b in zip(want, have, strict=True):
                assert float((a - b).norm() / a.norm()) < 4e-3  # half a unit of BF16 is 2e-3

    @pytest.mark.slow
    def test_aotinductor_compiles_the_archive(self, tmp_path: Path) -> None:
        x = torch.randn(4, 8)
        frozen, _ = saved(nn.Sequential(nn.Linear(8, 16), nn.GELU()), tmp_path / "m.pt2", x)
        program = torch.export.load(tmp_path / "m.pt2")
        package = str(tmp_path / "compiled.pt2")
        torch._inductor.aoti_compile_and_package(program, package_path=package)
        compiled = torch._inductor.aoti_load_package(package)
        other = torch.randn(6, 8)
        error = (compiled(other) - frozen(other)).norm() / frozen(other).norm()
        assert float(error) < 1e-3


def test_the_program_is_the_plans(tmp_path: Path) -> None:
    """Products in FP16, what the plan denies in FP32: read off the exported graph itself."""
    model = nn.Sequential(nn.Linear(8, 8), nn.Softmax(-1), nn.Linear(8, 2)).eval()
    rules = tmp_path / "mine.toml"
    rules.write_text('[[rule]]\nop = "aten.softmax"\ncategory = "deny"\nreason = "a test"\n')
    x = torch.randn(2, 8)
    frozen = amp.convert(model, x, rules=["default", rules], train=False).freeze()
    dtypes = [
        (node.target.__name__.partition(".")[0], node.meta["val"].dtype)
        for node in exported(frozen).graph.nodes
        if node.op == "call_function" and node.target.__name__.startswith(("linear", "softmax"))
    ]
    assert dtypes == [
        ("linear", torch.float16),
        ("softmax", torch.float32),
        ("linear", torch.float16),
    ]


class TestWhatAReviewerBroke:
    """Each gave other numbers than the frozen model, without an error."""

    def test_conditions_on_sizes_are_in_the_file(self, tmp_path: Path) -> None:
        class Branch(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.a = nn.Linear(4, 4)

            def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
                x = self.a(x) * (2 if x.shape[0] > 4 else 1)
                return x if x.shape[0] != y.shape[0] else x + y

        frozen, _ = saved(Branch(), tmp_path / "m.pt2", torch.randn(3, 4), torch.randn(3, 4))
        program = loaded(tmp_path / "m.pt2")
        x = torch.randn(4, 4)
        with torch.no_grad():
            assert torch.equal(program(x, x), frozen(x, x))
        for rows in ((5, 5), (3, 2)):
            with pytest.raises(AssertionError, match="Guard failed"):
                program(*(torch.randn(n, 4) for n in rows))

    @pytest.mark.parametrize("by_keyword", [True, False])
    def test_a_tensor_in_place_of_none_is_refused(self, by_keyword: bool, tmp_path: Path) -> None:
        class Optional(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.a = nn.Linear(4, 4)

            def forward(
                self, x: torch.Tensor, mask: Any = None, y: torch.Tensor | None = None
            ) -> torch.Tensor:
                x = self.a(x) if mask is None else self.a(x).masked_fill(mask, 0.0)
                return x if y is None else x + y

        x = torch.randn(3, 4)
        args, kwargs = ((x,), {"mask": None, "y": x}) if by_keyword else ((x, None, x), {})
        frozen, _ = saved(Optional(), tmp_path / "m.pt2", *args, **kwargs)
        program = loaded(tmp_path / "m.pt2")
        with torch.no_grad():
            assert torch.equal(program(x, y=x), frozen(*args, **kwargs))
        mask = torch.ones(3, 4, dtype=torch.bool)
        with pytest.raises((TypeError, ValueError, AssertionError)):
            program(x, mask=mask, y=x)
        with pytest.raises((TypeError, ValueError, AssertionError)):
            program(x, mask, x)

    def test_a_file_that_pytorch_does_not_read_is_not_written(self, tmp_path: Path) -> None:
        class Text(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.a = nn.Linear(4, 4)

            def forward(self, x: torch.Tensor) -> Any:
                return {"y": self.a(x), "name": "aa"}

        frozen = amp.convert(Text().eval(), torch.randn(3, 4), train=False).freeze()
        with pytest.raises(UnsupportedModelError, match="does not read the file that it wrote"):
            amp.save(frozen, tmp_path / "m.pt2")
        assert not list(tmp_path.iterdir())

    @pytest.mark.parametrize("kind", [Pair, Named])
    def test_inputs_in_containers(self, kind: type, tmp_path: Path) -> None:
        class Takes(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.a = nn.Linear(4, 4)

            def forward(self, given: Any) -> torch.Tensor:
                first, second = given if isinstance(given, tuple) else (given.logits, given.states)
                return self.a(first) - (second[0] if isinstance(second, tuple) else second)

        x, y = torch.randn(3, 4), torch.randn(3, 4)
        given = Pair(x, y) if kind is Pair else Named(x, (y,))
        frozen, archive = saved(Takes(), tmp_path / "m.pt2", given)
        # PyTorch 2.13 fixes the sizes in a dataclass: "Node type mismatch".
        assert [each.shape for each in archive.inputs] == [(None if kind is Pair else 3, 4)] * 2
        with torch.no_grad():
            assert torch.equal(loaded(tmp_path / "m.pt2")(plain(given)), frozen(given))
