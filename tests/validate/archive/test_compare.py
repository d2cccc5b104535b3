"""An archive that is read back, against FP32: a faulty file is found, whatever wrote it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

import amp_convert as amp
from amp_convert.capture import graph_signature
from amp_convert.core.batches import Batch
from amp_convert.rewrite.converted_model import ConvertedModel
from amp_convert.saved_model.archive import Archive, write_archive
from amp_convert.validate.archive.compare import compare_archive
from amp_convert.validate.archive.results import ArchiveParity
from amp_convert.verdict.archive_check import archive_checks
from amp_convert.verdict.thresholds import Thresholds

LIMITS = Thresholds.for_dtype("float16")


def converted() -> ConvertedModel:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)).eval()
    return amp.convert(model, torch.randn(4, 8), train=False)


def batches() -> list[Batch]:
    generator = torch.Generator().manual_seed(1)
    return [((torch.randn(n, 8, generator=generator),), {}, None) for n in (16, 5)]


def written(mixed: ConvertedModel, folder: Path) -> tuple[Archive, Path]:
    return write_archive(mixed.freeze(), folder / "m.pt2"), folder / "m.pt2"


def status(parity: ArchiveParity | None, reason: str = "", *, required: bool = True) -> str:
    [check] = archive_checks(parity, reason, LIMITS, required=required)
    assert check.name == "archive.outputs"
    return check.status.value


def test_a_file_that_was_written_well(tmp_path: Path) -> None:
    mixed, ticks = converted(), list[int]()
    parity = compare_archive(
        mixed, *written(mixed, tmp_path), batches(), on_batch=lambda: ticks.append(1)
    )
    assert (parity.batches, parity.identical, parity.failure) == (2, True, "")
    assert len(ticks) == 2
    [output] = parity.outputs
    assert 1e-5 < output.rel_l2 < 1e-3
    assert status(parity) == "pass"


def test_a_file_with_other_weights_fails(tmp_path: Path) -> None:
    mixed, other = converted(), converted()
    with torch.no_grad():
        next(other.parameters()).mul_(1.1)
    archive, path = written(other, tmp_path)
    parity = compare_archive(mixed, archive, path, batches())
    assert not parity.identical
    assert parity.outputs[0].rel_l2 > 1e-2
    assert status(parity) == "fail"


def test_a_file_that_cannot_be_read_fails(tmp_path: Path) -> None:
    mixed = converted()
    archive, path = written(mixed, tmp_path)
    path.write_bytes(b"")
    parity = compare_archive(mixed, archive, path, batches())
    assert parity.failure.startswith("it does not run: ")
    assert parity.batches == 0
    assert status(parity) == "fail"


class Paths(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.a(x) * (2 if x.shape[0] > 4 else 1)


def test_it_has_to_refuse_what_the_frozen_model_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mixed = amp.convert(Paths().eval(), torch.randn(3, 8), train=False)
    given = [((torch.randn(n, 8),), {}, None) for n in (3, 9)]
    parity = compare_archive(mixed, *written(mixed, tmp_path), given)
    assert (parity.batches, parity.failure) == (1, "")
    with monkeypatch.context() as patch:  # a file without the condition
        patch.setattr(graph_signature._Condition, "__call__", lambda *_: True)
        archive, path = written(mixed, tmp_path)
    parity = compare_archive(mixed, archive, path, given)
    assert parity.failure.startswith("it takes a batch that the frozen model refuses: ")
    assert status(parity) == "fail"


class Takes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor, y: torch.Tensor | None = None) -> torch.Tensor:
        return self.a(x) if y is None else self.a(x) - self.a(y)


def test_a_call_of_another_structure_is_one_that_it_refuses(tmp_path: Path) -> None:
    x = torch.randn(3, 8)
    mixed = amp.convert(Takes().eval(), x, train=False)
    given: list[Batch] = [((x,), {}, None), ((x, x), {}, None), ((x,), {"y": x}, None)]
    parity = compare_archive(mixed, *written(mixed, tmp_path), given)
    assert (parity.batches, parity.failure) == (1, "")


def test_the_users_metrics_are_its_own(tmp_path: Path) -> None:
    mixed = converted()

    def score(outputs: torch.Tensor, target: object) -> dict[str, float]:
        return {"mean": float(outputs.mean())}

    parity = compare_archive(mixed, *written(mixed, tmp_path), batches(), score=score)
    [pair] = parity.metrics
    assert (pair.name, pair.fp32 != pair.mixed) == ("mean", True)


def test_what_was_not_compared_is_no_pass(tmp_path: Path) -> None:
    mixed = converted()
    archive, path = written(mixed, tmp_path)
    assert status(compare_archive(mixed, archive, path, [])) == "unchecked"
    assert status(None, "torch.export refuses it") == "unchecked"
    assert archive_checks(None, "--save was not given", LIMITS, required=False) == []
    parity = compare_archive(mixed, archive, path, batches())
    assert status(replace(parity, outputs=())) == "unchecked"


@pytest.mark.slow
def test_a_run_saves_it_and_puts_its_verdict_in(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)).eval()
    x = torch.randn(16, 8)
    run = amp.check(model, x, out=tmp_path / "report", save=True)
    assert isinstance(run.report.archive, ArchiveParity)
    assert run.report.archive.file.path == "model.pt2"
    assert "archive.outputs" in {c.name for c in run.verdict.checks if c.status == "pass"}
    texts = {"verdict.json": ""}
    program = torch.export.load(tmp_path / "report" / "model.pt2", extra_files=texts)
    said = json.loads(texts["verdict.json"])["verdict"]
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    assert said == report["verdict"]
    with torch.no_grad():
        assert torch.equal(program.module()(x), run.converted.freeze()(x))
    for name in ("report.md", "report.html"):
        text = (tmp_path / "report" / name).read_text()
        assert "gives the frozen model's bits" in text.replace("&#39;", "'")


class Loop(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.a(x)
        return self.b(x) if bool(x.sum() > -1e9) else x


@pytest.mark.slow
def test_a_model_in_parts_ends_inconclusive_with_all_else(tmp_path: Path) -> None:
    run = amp.check(Loop().eval(), torch.randn(16, 8), out=tmp_path / "report", save=True)
    [check] = [c for c in run.verdict.checks if c.name == "archive.outputs"]
    assert (check.status, check.required) == ("unchecked", True)
    assert "only parts of this model could be captured" in check.reason
    assert run.exit_code == 3
    assert not (tmp_path / "report" / "model.pt2").exists()
    assert (tmp_path / "report" / "report.html").exists()
