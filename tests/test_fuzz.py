"""A sample of `make fuzz`: no mutated input ends in anything but a result or one printable line."""

from __future__ import annotations

import random
import tomllib

import pytest

from tests.benchmarks import fuzz as program
from tests.benchmarks import fuzz_kinds
from tests.benchmarks.fuzz import fuzz
from tests.benchmarks.fuzz_kinds import KINDS, PYPROJECT, RULES
from tests.benchmarks.mutations import mutated_json, mutated_toml


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", KINDS)
def test_mutated_inputs(kind: str) -> None:
    found = fuzz(kind, 15, seed=1)
    assert [case for case in found if case.fault] == []
    # They are not all refused for one reason, and most are refused.
    assert len({case.refusal.partition(":")[0] for case in found}) >= 2
    assert sum(bool(case.refusal) for case in found) > 7


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_not_mutated_is_read(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("mutated_json", "mutated_toml"):
        monkeypatch.setattr(fuzz_kinds, name, lambda text, luck: text.encode())
    monkeypatch.setattr(fuzz_kinds, "mutated_bytes", lambda data, luck: data)
    [case] = fuzz(kind, 1)
    assert (case.fault, case.refusal) == ("", "")


def test_faults_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """A traceback, a hang, a line that no terminal should get, and a file elsewhere."""

    def hang(folder: object) -> None:
        while True:
            pass

    def elsewhere(folder: object) -> None:
        (folder.parents[1] / "treasure").write_text("gone")  # type: ignore[attr-defined]

    def lie(folder: object) -> None:
        raise program.AmpConvertError("x" * 10)

    monkeypatch.setattr(program, "SECONDS", 0.05)
    seen = []
    for read in (lambda folder: [][1], hang, elsewhere, lie):
        monkeypatch.setitem(KINDS, "rules", (lambda folder, luck: None, read))
        seen.append(fuzz("rules", 1)[0].fault)
    assert seen[0].startswith("IndexError: ")
    assert seen[1].startswith("Hang: ")
    assert "it changed" in seen[2]
    assert "treasure" in seen[2]
    assert seen[3] == ""
    assert "cannot be printed" in program._unreadable("\x1b[2J")
    assert "has 5000 characters" in program._unreadable("x" * 5_000)
    assert "::error" in program._unreadable("::error::x")


def test_mutations_repeat_and_keep_what_can_be_read() -> None:
    made = [mutated_toml(RULES, random.Random(number)) for number in range(100)]
    assert made == [mutated_toml(RULES, random.Random(number)) for number in range(100)]
    assert len(set(made)) > 75

    def reads(data: bytes) -> bool:
        try:
            return bool(tomllib.loads(data.decode()))
        except (ValueError, RecursionError):
            return False

    assert 10 < sum(map(reads, made)) < 90
    assert mutated_json('{"a": [1, 2]}', random.Random(0)) != b'{"a": [1, 2]}'
    assert reads(PYPROJECT.encode())
