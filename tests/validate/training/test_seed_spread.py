"""The FP32 training baseline: what is measured, what the file holds, and where it is refused."""

from __future__ import annotations

import dataclasses
import itertools
import json
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from amp_convert.core.batches import Batch
from amp_convert.core.errors import ModelError, UsageError
from amp_convert.validate.training.data import Data
from amp_convert.validate.training.margin import MarginSource
from amp_convert.validate.training.recipe import Recipe
from amp_convert.validate.training.seed_spread import (
    Conditions,
    SeedSpread,
    check_writable,
    load_seed_spread,
    make_seed_spread,
)
from tests.zoo import assert_same_bits

HERE = Conditions(digest="d" * 64, device="cpu", steps=3, accumulate=2, clip_norm=0.5, batches=8)
MAKE_ANEW = "Make it anew with amp-convert fp32-seeds."


def build(seed: int) -> nn.Module:
    """With dropout, so that the random state of each seed matters."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 3))


def batches(seed: int) -> Iterator[Batch]:
    source = torch.Generator().manual_seed(seed)
    while True:
        inputs = torch.randn(6, 4, generator=source)
        yield (inputs,), {}, inputs[:, :3].argmax(1)


def eval_batches() -> Iterator[Batch]:
    stream = batches(7)
    first, second = next(stream), next(stream)
    yield first
    yield (second[0][0][:2],), {}, second[2][:2]  # a smaller batch counts for less


def accuracy(outputs: torch.Tensor, target: torch.Tensor) -> dict[str, float]:
    return {"margin": float(outputs.gather(1, target[:, None]).mean()), "constant": 1.0}


RECIPE = Recipe(
    loss=F.cross_entropy,
    optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1),
    scheduler=lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 1),
    accumulate=2,
    clip_norm=0.5,
)
DATA = Data(batches, eval_batches, accuracy, build)
FEW = dataclasses.replace(DATA, train_batches=lambda seed: itertools.islice(batches(seed), 5))


def make(**options: Any) -> SeedSpread:
    given = {"model": build(3), "recipe": RECIPE, "data": DATA, "conditions": HERE}
    return make_seed_spread(**{**given, "name": "net", "seeds": 8, **options})


def by_hand(seed: int) -> tuple[nn.Module, list[float]]:
    """The model after three steps of plain PyTorch, and its losses."""
    model = build(seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    stream, losses = batches(seed), []
    torch.manual_seed(seed)
    for _ in range(3):
        both = []
        for _ in range(2):
            (inputs,), _, target = next(stream)
            loss = F.cross_entropy(model(inputs), target)
            (loss / 2).backward()
            both.append(loss.item())
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        losses.append(sum(both) / 2)
    return model.eval(), losses


def mean(score: Callable[[torch.Tensor, torch.Tensor], float], model: nn.Module) -> float:
    """Over the eval batches, weighted by their size."""
    rows = [(score(model(inputs), target), len(target)) for (inputs,), _, target in eval_batches()]
    return sum(value * size for value, size in rows) / sum(size for _, size in rows)


# What is measured


@pytest.mark.parametrize("metric", [None, "margin", "loss", "train_loss"])
def test_the_values_are_those_of_plain_training(metric: str | None) -> None:
    made = make(metric=metric, lower_is_better=frozenset({"margin"}))
    assert made.seeds == (1000, 1001, 1002, 1003, 1004, 1005, 1006, 1007)
    expected = []
    for seed in made.seeds:
        model, losses = by_hand(seed)
        with torch.no_grad():
            scores = {
                "margin": mean(lambda out, target: accuracy(out, target)["margin"], model),
                "loss": mean(lambda out, target: F.cross_entropy(out, target).item(), model),
                "train_loss": losses[-1],  # the last quarter of three steps
            }
        expected.append(scores[metric or "margin"])
    assert made.values == pytest.approx(expected, rel=1e-12)
    assert len(set(made.values)) == 8
    assert (made.metric, made.lower_is_better) == (metric or "margin", True)
    assert (made.model, made.conditions) == ("net", HERE)


def test_higher_is_better_unless_it_is_said() -> None:
    assert make(metric="margin").lower_is_better is False


@pytest.mark.slow
def test_more_seeds_and_a_tick_a_step() -> None:
    ticks: list[int] = []
    made = make(seeds=9, tick=lambda: ticks.append(1))
    assert (len(ticks), made.seeds[-1], len(made.values)) == (27, 1008, 9)
    assert made.values[:8] == make().values


def test_the_margin_is_one_and_a_half_standard_deviations() -> None:
    made = make()
    margin = made.margin_for(HERE, None, ())
    assert margin.value == pytest.approx(1.5 * statistics.stdev(made.values))
    assert (margin.source, margin.seeds) == (MarginSource.BASELINE, 8)
    assert made.summary == (
        f"margin {statistics.mean(made.values):.6g} ± {statistics.stdev(made.values):.3g} over 8 "
        f"seeds of 3 steps; margin {margin.value:.3g}"
    )


def test_the_model_and_the_random_state_are_afterwards_as_they_were() -> None:
    model = build(3)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = torch.get_rng_state()
    make(model=model)
    assert_same_bits(before, dict(model.state_dict()))
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            {"seeds": 7},
            UsageError,
            "7 FP32 seeds were asked for; a margin needs at least 8. Give --seeds 8 or more.",
        ),
        (
            {"metric": "constant"},
            UsageError,
            "the metric of the FP32 seeds is 1 for each of its 8 seeds. "
            "That gives no margin: give a tolerance instead.",
        ),
        (
            {"metric": "f1"},
            UsageError,
            "the model file has no metric f1. There are: loss, margin, constant, train_loss.",
        ),
        (
            {"data": FEW},
            ModelError,
            "train_batches(1000) has batches for 2 of 3 steps only. "
            "Let it give more, or give --steps 2.",
        ),
    ],
)
def test_what_gives_no_baseline(
    options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error) as caught:
        make(**options)
    assert str(caught.value) == message


# The file


@pytest.fixture(scope="module")
def made() -> SeedSpread:
    return make()


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
