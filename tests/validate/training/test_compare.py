"""The whole comparison: what it hands over, how it ends, and that it can go on after a kill."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import pytest
import torch

from amp_convert.core.batches import Batch
from amp_convert.core.errors import UsageError
from amp_convert.rewrite.converted_model import ConvertedModel
from amp_convert.validate.training.compare import compare_training
from amp_convert.validate.training.loss_scaling import LossScaling
from amp_convert.validate.training.margin import Margin
from amp_convert.validate.training.options import DEFAULT_STEPS, Options
from tests.training import OPTIMIZERS, POINTS, classify, convert_net, initial_model, points, score
from tests.validate.training.mixed_runs import how, stop_after

NONE = LossScaling("none")


@pytest.mark.slow
def test_what_a_comparison_says(mixed: ConvertedModel) -> None:
    """Words, numbers and their order, on a run with all that there is to say."""
    recipe = how(
        accumulate=2,
        clip_norm=0.5,
        scheduler=lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 3),
    )
    ticks = []
    found = compare_training(
        mixed,
        recipe,
        POINTS,
        Options(steps=6, lower_is_better=frozenset({"nll"})),
        tick=lambda: ticks.append(1),
    )
    run = found.run
    plain = {f.name: getattr(found, f.name) for f in dataclasses.fields(found)}
    for measured in ("gradients", "run"):
        plain.pop(measured)
    assert plain == {
        "dtype": "float16",
        "steps": 6,
        "ended": "",
        "optimizer": "AdamW, learning rate 0.002",
        "schedule": "StepLR",
        "initial_weights": "initial_model(seed)",
        "loss_scaling": "dynamic, from 65536: times 2 after 2000 clean steps, times 0.5 after an "
        "overflow",
        "accumulate": 2,
        "clip_norm": 0.5,
        "metric": "accuracy",
        "lower_is_better": ("loss", "train_loss", "nll"),
        "pairs": (),
        "noninferiority": None,
        "interrupted": False,
    }
    assert (run.seed, run.steps, run.random_parted, len(ticks)) == (0, 6, None, 6)
    assert [arm.arm for arm in run.arms] == ["fp32", "mixed", "autocast", "noise"]
    assert all(len(arm.losses) == len(arm.gradient_norms) == 6 for arm in run.arms)
    assert all(set(arm.metrics) == {"loss", "accuracy"} for arm in run.arms)
    assert [bool(arm.scales) for arm in run.arms] == [False, True, True, False]
    assert found.gradients.reference_rel_l2 == 0
    assert 0 < found.gradients.total.rel_l2 < 0.01


@pytest.mark.slow
def test_the_last_metrics_are_those_of_a_loop_by_hand(mixed: ConvertedModel) -> None:
    """Weighted by batch size, in eval mode: one batch is smaller than the others."""

    def uneven() -> Iterator[Batch]:
        for (x,), kwargs, target in points(999, 3):
            yield (x,), kwargs, target
        yield (x[:5],), kwargs, target[:5]

    data = dataclasses.replace(POINTS, eval_batches=uneven)
    found = compare_training(mixed, how(), data, Options(steps=5))
    model = initial_model(0).train()
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    torch.manual_seed(0)
    for _, (args, _, target) in zip(range(5), points(0), strict=False):
        classify(model(*args), target).backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    whole = [(args[0], target) for args, _, target in uneven()]
    with torch.no_grad():
        outputs, target = model(torch.cat([x for x, _ in whole])), torch.cat([t for _, t in whole])
    metrics = found.run.arm("fp32").metrics
    assert metrics["accuracy"] == pytest.approx(score(outputs, target)["accuracy"], rel=1e-12)
    assert metrics["loss"] == pytest.approx(float(classify(outputs, target)), rel=1e-6)


@pytest.mark.slow
def test_nothing_converted_is_nothing_scaled() -> None:
    found = compare_training(convert_net(torch.float16, "fp32"), how(), POINTS, Options(steps=4))
    fp32, other = found.run.arm("fp32"), found.run.arm("mixed")
    assert found.loss_scaling == "none"
    assert (other.losses, other.weights_sha256) == (fp32.losses, fp32.weights_sha256)
    assert (other.drift, other.moved, found.gradients.total.rel_l2) == (0, 1, 0)


@pytest.mark.slow
def test_the_gradients_are_compared_at_a_scale_that_they_bear(mixed: ConvertedModel) -> None:
    """Gradients of up to 0.4 overflow from 2**18 on; the step's scale is what training finds."""
    found = compare_training(
        mixed, how(scaling=LossScaling(initial=2.0**40)), POINTS, Options(steps=40)
    )
    arm = found.run.arm("mixed")
    assert 2.0**16 <= arm.scales[-1] <= found.gradients.scale < 2.0**20
    assert found.gradients.total.nonfinite == 0
    assert arm.skipped == (), "no step is left out to look for it"
    assert found.loss_scaling.startswith(f"dynamic, from {found.gradients.scale:g}")
    static = compare_training(
        mixed, how(scaling=LossScaling("static", 2.0**40)), POINTS, Options(steps=2)
    )
    assert static.gradients.scale == 2.0**40
    assert static.gradients.total.nonfinite > 0
    assert static.run.arm("mixed").skipped == (1, 2)
    assert static.run.arm("mixed").scales == (2.0**40, 2.0**40)


def test_a_scale_under_one_ends_the_run_with_its_history(mixed: ConvertedModel) -> None:
    """No scale helps a loss whose gradients are infinite in FP16 whatever it is multiplied by."""

    def steep(outputs: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return classify(outputs, target) * 1e7

    found = compare_training(
        mixed,
        dataclasses.replace(how(scaling=LossScaling(initial=4.0)), loss=steep),
        POINTS,
        Options(steps=20),
    )
    arm = found.run.arm("mixed")
    assert arm.note == "its loss scale is under 1 after step 1: 1, 0.5"
    assert found.ended == f"the mixed arm stopped: {arm.note}"
    assert (arm.skipped, arm.scales, arm.metrics) == ((1,), (1.0, 0.5), {})
    assert found.run.failure == f"its loss scale fell under 1: {arm.note}"
    assert found.run.steps == 1


# --- how it ends ---


@pytest.mark.slow
def test_batches_that_run_out(mixed: ConvertedModel) -> None:
    """Without a wish for a number of steps there are as many as there are; else it is said."""
    short = dataclasses.replace(POINTS, train_batches=lambda seed: points(seed, 5))
    found = compare_training(mixed, how(), short, Options())
    assert (found.steps, found.run.steps, found.ended) == (5, 5, "")
    found = compare_training(mixed, how(accumulate=2), short, Options(steps=9))
    assert (found.steps, found.run.steps) == (9, 2)
    assert found.ended == "train_batches(0) has batches for 2 steps only, of 9"
    endless = compare_training(mixed, how(), POINTS, Options())
    assert endless.steps == endless.run.steps == DEFAULT_STEPS


def test_seeds_that_have_fewer_batches_than_the_first(mixed: ConvertedModel) -> None:
    uneven = dataclasses.replace(POINTS, train_batches=lambda seed: points(seed, 8 - 2 * seed))
    options = Options(seeds=5, margin=Margin(0.5))
    found = compare_training(mixed, how(), uneven, options)
    assert found.ended == "train_batches(1) has batches for 6 steps only, of 8"
    assert [pair.seed for pair in found.pairs] == [0]
    assert found.noninferiority.status == "inconclusive"


def test_interrupted_it_reports_what_it_has(mixed: ConvertedModel) -> None:
    tick, should_stop = stop_after(3)
    found = compare_training(
        mixed, how(), POINTS, Options(steps=9), tick=tick, should_stop=should_stop
    )
    assert (found.interrupted, found.run.steps) == (True, 3)
    assert found.ended == "interrupted after 3 of 9 steps"
    whole = compare_training(mixed, how(), POINTS, Options(steps=3))
    assert [arm.losses for arm in found.run.arms] == [arm.losses for arm in whole.run.arms]
    assert [arm.metrics for arm in found.run.arms] == [arm.metrics for arm in whole.run.arms]


def test_interrupted_before_the_first_step(mixed: ConvertedModel) -> None:
    found = compare_training(mixed, how(), POINTS, Options(steps=9), should_stop=lambda: True)
    assert (found.run.steps, found.ended) == (0, "interrupted after 0 of 9 steps")
    assert [arm.losses for arm in found.run.arms] == [()] * 4
    assert found.gradients.total.rel_l2 < 0.01


@pytest.mark.slow
def test_seeds(mixed: ConvertedModel) -> None:
    """Each is a pair of its own; the first has all arms, and the answer comes at a look."""
    options = Options(steps=4, seeds=8, margin=Margin(0.5), metric="loss")
    found = compare_training(mixed, how(), POINTS, options)
    assert found.metric == "loss"
    assert [pair.seed for pair in found.pairs] == [0, 1, 2, 3, 4]
    assert found.noninferiority.status == "pass"
    assert [look.n for look in found.noninferiority.looks] == [5]
    for pair in found.pairs[:2]:
        alone = dataclasses.replace(
            POINTS,
            train_batches=lambda _, seed=pair.seed: points(seed),
            initial_model=lambda _, seed=pair.seed: initial_model(seed),
        )
        if pair.seed == 0:
            run = compare_training(mixed, how(), alone, Options(steps=4)).run
            assert pair.fp32 == run.arm("fp32").metrics["loss"]
            assert pair.mixed == run.arm("mixed").metrics["loss"]
    assert len({pair.fp32 for pair in found.pairs}) == 5


def test_a_seed_that_fails_ends_the_test(mixed: ConvertedModel) -> None:
    """The mixed arm of seed 2 meets inputs beyond 65504."""

    def unbounded(seed: int) -> Iterator[Batch]:
        for (x,), kwargs, target in points(seed):
            yield (x * 1e6 if seed == 2 else x,), kwargs, target

    data = dataclasses.replace(POINTS, train_batches=unbounded)
    options = Options(steps=3, seeds=5, margin=Margin(0.5))
    found = compare_training(mixed, how(), data, options)
    assert [bool(pair.failure) for pair in found.pairs] == [False, False, True]
    assert found.pairs[-1].failure.startswith("its loss is nan at step 1, where FP32's is ")
    assert found.noninferiority.status == "fail"
    assert found.noninferiority.failed_pairs == (3,)
    assert found.ended == "the mixed arm stopped: its loss is nan at step 1 of seed 2"


@pytest.mark.parametrize("seeds", [2, 4, 13])
def test_numbers_of_seeds_that_no_look_has(seeds: int) -> None:
    with pytest.raises(UsageError, match=rf"{seeds} seeds were asked for; the test looks at 5, 8"):
        Options(seeds=seeds, margin=Margin(0.1))


def test_seeds_need_a_margin() -> None:
    with pytest.raises(UsageError, match="a test over seeds needs a margin that is fixed before"):
        Options(seeds=5)
