"""The model file and the settings -> what training takes."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from amp_convert.core.errors import ModelError, UnsupportedModelError, UsageError
from amp_convert.loading.model_file import Case
from amp_convert.loading.settings import Settings
from amp_convert.validate.training.loss_scaling import LossScaling
from amp_convert.validate.training.margin import Margin, MarginSource
from amp_convert.validate.training.options import Options
from amp_convert.validate.training.seed_spread import Conditions, SeedSpread
from amp_convert.validate.training.setup import (
    conditions,
    make_data,
    make_options,
    make_recipe,
    why_not,
)

CPU = torch.device("cpu")
DEFINE = "Define train_batches(seed) and loss(outputs, target) in the model file."


def batches(seed: int) -> Any:
    for step in range(9):
        yield torch.full((2, 3), float(seed * 100 + step)), step


def case(**functions: Any) -> Case:
    given = {"train_batches": batches, "loss": nn.MSELoss(), **functions}
    model = nn.Linear(3, 2)
    return Case("net", "net.py", "d" * 64, model, (torch.ones(2, 3),), {}, **given)


def captured(*failures: str) -> Any:
    found = SimpleNamespace(regions=[SimpleNamespace(train_failure=text) for text in failures])
    found.in_mode = lambda mode: found
    return found


# Whether


def test_training_needs_batches_and_a_loss() -> None:
    assert why_not(case(loss=None), Settings()) == "net defines no loss"
    assert why_not(case(train_batches=None), Settings()) == "net defines no train_batches"
    both = case(train_batches=None, loss=None)
    assert why_not(both, Settings()) == "net defines no train_batches and no loss"
    with pytest.raises(UsageError) as caught:
        why_not(both, Settings(train=True))
    assert str(caught.value) == (
        f"training was asked for, but net defines no train_batches and no loss. {DEFINE}"
    )


@pytest.mark.parametrize("train", [None, True])
def test_nothing_stands_in_the_way(train: bool | None) -> None:
    assert why_not(case(), Settings(train=train)) == ""
    assert why_not(case(), Settings(train=train), captured("", "")) == ""


def test_complex_parameters_have_no_loss_scale() -> None:
    """The rest of the report is worth having without."""
    model = nn.Module()
    model.weight = nn.Parameter(torch.ones(2, dtype=torch.complex64))
    spectral = dataclasses.replace(case(), model=model)
    assert why_not(spectral, Settings()).startswith("the parameter weight is complex, and torch")
    assert why_not(spectral, Settings(loss_scale="none")) == ""
    assert why_not(spectral, Settings(dtype="bfloat16")) == ""


def test_switched_off_comes_before_all_else() -> None:
    reason = "training is switched off (--no-train)"
    assert why_not(case(), Settings(train=False)) == reason
    assert why_not(case(loss=None), Settings(train=False), captured("x")) == reason


def test_every_part_needs_a_train_graph() -> None:
    parts = captured("", "control flow at net.py:3")
    reason = "the model has no train graph: control flow at net.py:3"
    assert why_not(case(), Settings(), parts) == reason
    with pytest.raises(UnsupportedModelError) as caught:
        why_not(case(), Settings(train=True), parts)
    assert caught.value.exit_code == 4
    assert caught.value.what == f"training was asked for, but {reason}"


def test_tensors_without_values_cannot_be_trained() -> None:
    meta = case()
    meta.model.to("meta")
    assert why_not(meta, Settings()) == "the model's tensors hold no values"
    with pytest.raises(UsageError, match="training was asked for, but the model's tensors hold no"):
        why_not(meta, Settings(train=True))


# The recipe


@pytest.mark.parametrize(
    ("settings", "scaling"),
    [
        ({}, LossScaling("dynamic", 65536.0, 2.0, 0.5, 2000)),
        ({"dtype": "bfloat16"}, LossScaling("none")),
        ({"loss_scale": "none"}, LossScaling("none")),
        ({"loss_scale": "1024"}, LossScaling("static", 1024.0)),
        (
            {"dtype": "bfloat16", "loss_scale": "dynamic", "initial_scale": 8.0},
            LossScaling("dynamic", 8.0, 2.0, 0.5, 2000),
        ),
        (
            {"scale_growth": 4.0, "scale_backoff": 0.25, "scale_interval": 7},
            LossScaling("dynamic", 65536.0, 4.0, 0.25, 7),
        ),
    ],
)
def test_loss_scaling(settings: dict[str, Any], scaling: LossScaling) -> None:
    assert make_recipe(case(), Settings(**settings)).scaling == scaling


def test_a_recipe_has_the_files_functions() -> None:
    of = case(optimizer=torch.optim.SGD, scheduler=len)
    recipe = make_recipe(of, Settings(accumulate=3, clip_norm=0.5))
    assert (recipe.loss, recipe.optimizer, recipe.scheduler) == (of.loss, of.optimizer, len)
    assert (recipe.accumulate, recipe.clip_norm, recipe.path) == (3, 0.5, of.path)


def test_a_file_without_an_optimizer_is_trained_with_adamw() -> None:
    recipe = make_recipe(case(), Settings())
    assert recipe.optimizer is torch.optim.AdamW
    assert (recipe.scheduler, recipe.accumulate, recipe.clip_norm) == (None, 1, None)


# The data


def test_batches_of_a_seed_as_calls() -> None:
    data = make_data(case(), Settings(), CPU)
    rows = list(data.train_batches(4))
    assert [(args[0][0, 0].item(), kwargs, target) for args, kwargs, target in rows] == [
        (400.0 + step, {}, step) for step in range(9)
    ]
    assert (data.eval_batches, data.initial_model) == (None, None)
    assert data.score(1, 2) == {}


def test_no_more_batches_are_drawn_than_the_steps_take() -> None:
    drawn = []

    def endless(seed: int) -> Any:
        while True:
            drawn.append(seed)
            yield torch.ones(1), 0

    def count(settings: Settings) -> int:
        drawn.clear()
        made = make_data(case(train_batches=endless), settings, CPU)
        assert sum(1 for _ in made.train_batches(1)) == len(drawn)
        return len(drawn)

    assert count(Settings(steps=4)) == 4
    assert count(Settings(steps=4, accumulate=3)) == 12
    # Where none are asked for, 200 may be needed until FP32 has learnt something.
    assert count(Settings(accumulate=2)) == 400


def test_eval_batches_metrics_and_first_weights() -> None:
    evals = [(torch.ones(1) * index, index) for index in range(5)]
    of = case(
        eval_batches=lambda: evals,
        metrics=lambda outputs, target: {"sum": outputs + target},
        initial_model=nn.Linear,
    )
    data = make_data(of, Settings(batches=3), CPU)
    assert data.eval_batches is not None
    assert [target for _, _, target in data.eval_batches()] == [0, 1, 2]
    assert data.score(torch.ones(()), 2) == {"sum": 3.0}
    assert data.initial_model is nn.Linear


def test_batches_go_to_the_device() -> None:
    of = case(
        train_batches=lambda seed: [({"x": torch.ones(1), "n": 3}, [torch.ones(2)])],
        eval_batches=lambda: [((torch.ones(1), 2), None)],
    )
    data = make_data(of, Settings(), torch.device("meta"))
    [(args, kwargs, [target])] = data.train_batches(0)
    assert (args, kwargs["n"], kwargs["x"].device.type, target.device.type) == (
        *((), 3, "meta", "meta"),
    )
    assert data.eval_batches is not None
    [((moved, number), _, _)] = data.eval_batches()
    assert (moved.device.type, number) == ("meta", 2)


def test_wrong_batches_name_the_function_and_its_line() -> None:
    of = Case(**{**vars(case(train_batches=lambda seed: [3])), "path": __file__})
    line = test_wrong_batches_name_the_function_and_its_line.__code__.co_firstlineno + 1
    with pytest.raises(ModelError) as caught:
        list(make_data(of, Settings(), CPU).train_batches(0))
    assert str(caught.value) == (
        f"batch 0 of train_batches() is an int, not a pair (at {Path(__file__).name}:{line}). "
        "Let it give (inputs, target) pairs, anew at each call."
    )


# The options


def test_options_of_one_run() -> None:
    of = case(lower_is_better=frozenset({"nll"}))
    assert make_options(of, Settings(), CPU) == Options(
        lower_is_better=frozenset({"nll"}), identity={"model": "d" * 64, "eval_batches": 8}
    )
    settings = Settings(steps=7, train_metric="nll", checkpoint="c", checkpoint_every=3, batches=2)
    assert make_options(of, settings, CPU) == Options(
        steps=7,
        metric="nll",
        lower_is_better=frozenset({"nll"}),
        checkpoint=Path("c"),
        checkpoint_every=3,
        identity={"model": "d" * 64, "eval_batches": 2},
    )


def test_seeds_with_a_margin_of_the_users() -> None:
    options = make_options(case(), Settings(seeds=5, margin=0.25), CPU)
    assert (options.seeds, options.margin, options.steps) == (5, Margin(0.25), None)


@pytest.mark.parametrize(("seeds", "has_margin"), [(5, False), (4, True), (13, True)])
def test_seeds_that_make_no_test(seeds: int, has_margin: bool) -> None:
    with pytest.raises(UsageError):
        make_options(case(), Settings(seeds=seeds, margin=1.0 if has_margin else None), CPU)


def test_conditions_are_those_that_a_metric_depends_on() -> None:
    assert conditions(case(), Settings(), torch.device("cuda", 1)) == Conditions(
        digest="d" * 64, device="cuda", steps=50, accumulate=1, clip_norm=None, batches=8
    )
    settings = Settings(steps=3, accumulate=2, clip_norm=1.0, batches=4)
    assert conditions(case(), settings, CPU) == Conditions(
        digest="d" * 64, device="cpu", steps=3, accumulate=2, clip_norm=1.0, batches=4
    )


def test_seeds_with_a_margin_from_a_file(tmp_path: Path) -> None:
    """The file names the metric, and fixes how many steps there are."""
    values = (1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0)  # standard deviation √6
    baseline = SeedSpread(
        kind="amp-convert FP32 training baseline",
        schema_version=1,
        amp_convert="1",
        created="",
        model="net",
        conditions=conditions(case(), Settings(), CPU),
        metric="nll",
        lower_is_better=True,
        seeds=tuple(range(1000, 1008)),
        values=values,
    )
    baseline.write(tmp_path / "b.json")
    of = case(lower_is_better=frozenset({"nll"}))
    settings = Settings(seeds=8, fp32_seeds=f"{tmp_path}/b.json")
    options = make_options(of, settings, CPU)
    assert (options.seeds, options.steps, options.metric) == (8, 50, "nll")
    assert options.margin == Margin(1.5 * 6**0.5, MarginSource.BASELINE, 8, 6**0.5)
    for other in ({"steps": 3}, {"accumulate": 2}, {"train_metric": "loss"}, {"batches": 1}):
        with pytest.raises(UsageError, match="the FP32 seeds are of other training: "):
            make_options(of, Settings(**{**vars(settings), **other}), CPU)
    with pytest.raises(UsageError, match="device was cpu, is cuda"):
        make_options(of, settings, torch.device("cuda"))
    with pytest.raises(UsageError, match="lower_is_better was True, is False"):
        make_options(case(), settings, CPU)
    assert make_options(case(), Settings(fp32_seeds="none.json"), CPU).margin is None
