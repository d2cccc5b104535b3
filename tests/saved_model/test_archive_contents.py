"""What a saved archive says of itself, and what cannot be saved."""

from __future__ import annotations

import copy
import json
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils import _pytree as pytree

import amp_convert as amp
from amp_convert.core.errors import UnsupportedModelError, UsageError
from amp_convert.core.files import digests
from amp_convert.saved_model.archive import exported
from amp_convert.saved_model.plain_call import plain
from tests import bits
from tests.archives import Named, Pair, saved


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
    assert [t.count_nonzero() for t in bits.tensors(program.example_inputs)] == [0]


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
