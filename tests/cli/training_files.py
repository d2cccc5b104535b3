"""What tests of this folder share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.command import TRAINED, Outcome, amp, write

YIELD, LOSS = "yield batch(100 * seed + step + 2)", "return F.cross_entropy(outputs, target)"


OPTIMIZER = "return torch.optim.SGD(parameters, lr=0.1)"


def batches(text: str) -> str:
    assert YIELD in TRAINED
    return TRAINED.replace(YIELD, text)


def loss(text: str) -> str:
    assert LOSS in TRAINED
    return TRAINED.replace(LOSS, text)


def optimizer(text: str) -> str:
    assert OPTIMIZER in TRAINED
    return TRAINED.replace(OPTIMIZER, text)


def scheduler(text: str) -> str:
    return f"{TRAINED}def scheduler(optimizer):\n    {text}\n"


def without(*names: str) -> str:
    text = TRAINED
    for name in names:
        text = text.replace(f"def {name}(", f"def _{name}(")
    return text


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else b""
        for path in folder.rglob("*")
    }


BEFORE = '{"schema_version": 1, "amp_convert": "0.1", "model": {}, "verdict": {}}'


def refused(folder: Path, text: str, *arguments: str, code: int = 2) -> Outcome:
    """The outcome of a run on this model file; the folder has a report, and must stay as it was."""
    write(folder, text)
    write(folder, "", "pyproject.toml")
    (folder / "reports/model").mkdir(parents=True)
    write(folder, BEFORE, "reports/model/report.json")
    before = contents(folder)
    outcome = amp(folder, *(arguments or ("model.py",)))
    assert outcome.code == code, outcome
    assert contents(folder) == before
    return outcome


def checks(outcome: Outcome) -> dict[str, Any]:
    """The checks on training by name."""
    found = {check["name"]: check for check in outcome.json["verdict"]["checks"]}
    return {name: check for name, check in found.items() if name.startswith("training")}
