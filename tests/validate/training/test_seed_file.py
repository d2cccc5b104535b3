"""The file of FP32 seeds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from amp_convert.core.errors import UsageError
from amp_convert.validate.training.seed_spread import (
    Conditions,
    SeedSpread,
    check_writable,
    load_seed_spread,
)

HERE = Conditions(digest="d" * 64, device="cpu", steps=3, accumulate=2, clip_norm=0.5, batches=8)


MAKE_ANEW = "Make it anew with amp-convert fp32-seeds."


def test_a_written_file_reads_back(made: SeedSpread, tmp_path: Path) -> None:
    path = tmp_path / "new" / "b.json"
    check_writable(path)
    assert not path.parent.exists()
    made.write(path)
    assert path.read_text(encoding="utf-8") == made.text
    assert load_seed_spread(path) == made
    assert [entry.name for entry in path.parent.iterdir()] == ["b.json"]
    made.write(path)  # over itself
    assert load_seed_spread(path) == made


def test_the_file_says_what_it_is(made: SeedSpread) -> None:
    document = json.loads(made.text)
    assert list(document) == [
        *("kind", "schema_version", "amp_convert", "created", "model", "conditions", "metric"),
        *("lower_is_better", "seeds", "values"),
    ]
    assert document["kind"] == "amp-convert FP32 training baseline"
    assert document["conditions"] == {
        "digest": "d" * 64,
        "device": "cpu",
        "steps": 3,
        "accumulate": 2,
        "clip_norm": 0.5,
        "batches": 8,
    }


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(
    made: SeedSpread, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "b.json"
    made.write(path)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(UsageError, match=r"cannot write .*b\.json: No space left on device\."):
        made.model_copy(update={"model": "other"}).write(path)
    assert load_seed_spread(path) == made
    assert [entry.name for entry in tmp_path.iterdir()] == ["b.json"]


@pytest.mark.parametrize("content", ["notes", '{"kind": "baseline"}', "[]", "\xff", "[" * 100_000])
def test_another_file_is_not_overwritten(content: str, made: SeedSpread, tmp_path: Path) -> None:
    path = tmp_path / "b.json"
    path.write_text(content, encoding="latin-1")
    for refuse in (check_writable, made.write):
        with pytest.raises(UsageError) as caught:
            refuse(path)
        assert str(caught.value) == (
            f"{path} is no file of FP32 seeds, so it is not overwritten. "
            "Choose another path, or remove that file."
        )
    assert path.read_text(encoding="latin-1") == content


def test_a_damaged_baseline_of_ours_may_be_made_anew(made: SeedSpread, tmp_path: Path) -> None:
    path = tmp_path / "b.json"
    path.write_text(json.dumps({**json.loads(made.text), "schema_version": 2}), encoding="utf-8")
    check_writable(path)
    made.write(path)
    assert load_seed_spread(path) == made


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": None}, "kind: Input should be 'amp-convert FP32 training baseline'"),
        ({"schema_version": 2}, "schema_version: Input should be 1"),
        ({"note": "x"}, "note: Extra inputs are not permitted"),
        ({"values": "1 2 3"}, "values: Input should be a valid array"),
        ({"values": [float("nan")] * 8}, "NaN is not JSON"),
        ({"values": ["1.0"] * 8}, "values.0: Input should be a valid number"),
        ({"values": [1.0, 2.0]}, "the file: Value error, there is not one value for each seed"),
        ({"seeds": [1000] * 8}, "the file: Value error, there is not one value for each seed"),
        # The seeds of the test itself are no separate evidence.
        ({"seeds": list(range(8))}, "seeds.0: Input should be greater than or equal to 12"),
        ({"seeds": [1000.5] * 8}, "seeds.0: Input should be a valid integer"),
        ({"lower_is_better": "no"}, "lower_is_better: Input should be a valid boolean"),
        ({"conditions": {}}, "conditions.digest: Field required"),
        (
            {"conditions": {**HERE.model_dump(), "threads": 2}},
            "conditions.threads: Extra inputs are not permitted",
        ),
        (
            {"conditions": {**HERE.model_dump(), "steps": "3"}},
            "conditions.steps: Input should be a valid integer",
        ),
    ],
)
def test_a_crafted_file_is_refused(
    change: dict[str, Any], message: str, made: SeedSpread, tmp_path: Path
) -> None:
    path = tmp_path / "b.json"
    path.write_text(json.dumps({**json.loads(made.text), **change}), encoding="utf-8")
    with pytest.raises(UsageError) as caught:
        load_seed_spread(path)
    assert str(caught.value).startswith(f"{path} is no file of FP32 seeds: {message}")
    assert str(caught.value).endswith(f". {MAKE_ANEW}")


def test_a_truncated_file_is_refused(made: SeedSpread, tmp_path: Path) -> None:
    path = tmp_path / "b.json"
    for length in range(0, len(made.text) - 2, 40):
        path.write_text(made.text[:length], encoding="utf-8")
        with pytest.raises(UsageError, match=r"is no file of FP32 seeds: \w.* line \d"):
            load_seed_spread(path)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"cannot read .*b\.json: No such file or directory\."):
        load_seed_spread(tmp_path / "b.json")
    with pytest.raises(UsageError, match=r": Is a directory\."):
        load_seed_spread(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"digest": "e" * 64},
            f"the model file's SHA-256 was dddddddddddd, is eeeeeeeeeeee. {MAKE_ANEW}",
        ),
        (
            {"device": "cuda"},
            "device was cpu, is cuda. Give --device cpu, or make it anew with amp-convert "
            "fp32-seeds.",
        ),
        (
            {"steps": 50},
            "steps was 3, is 50. Give --steps 3, or make it anew with amp-convert fp32-seeds.",
        ),
        (
            {"accumulate": 1},
            "accumulate was 2, is 1. Give --accumulate 2, or make it anew with amp-convert "
            "fp32-seeds.",
        ),
        (
            {"clip_norm": None},
            "clip-norm was 0.5, is none. Give --clip-norm 0.5, or make it anew with amp-convert "
            "fp32-seeds.",
        ),
        (
            {"batches": 1},
            "batches was 8, is 1. Give --batches 8, or make it anew with amp-convert fp32-seeds.",
        ),
    ],
)
def test_a_margin_is_refused_under_other_conditions(
    change: dict[str, Any], message: str, made: SeedSpread
) -> None:
    assert set(change) <= set(Conditions.model_fields)
    with pytest.raises(UsageError) as caught:
        made.margin_for(HERE.model_copy(update=change), None, ())
    assert str(caught.value) == f"the FP32 seeds are of other training: {message}"


def test_a_margin_is_refused_for_another_metric(made: SeedSpread) -> None:
    assert made.margin_for(HERE, "margin", ()) == made.margin
    with pytest.raises(UsageError, match=r"train-metric was margin, is loss\. Give --train-m"):
        made.margin_for(HERE, "loss", ())
    with pytest.raises(UsageError, match="lower_is_better was False, is True"):
        made.margin_for(HERE, None, ("margin",))
