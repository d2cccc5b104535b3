"""The whole comparison: what it hands over, how it ends, and that it can go on after a kill."""

from __future__ import annotations

import dataclasses
import errno
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from amp_convert.core.batches import Batch
from amp_convert.core.errors import UsageError
from amp_convert.rewrite.converted_model import ConvertedModel
from amp_convert.validate.training import checkpoint
from amp_convert.validate.training.compare import compare_training
from amp_convert.validate.training.loss_scaling import LossScaling
from amp_convert.validate.training.margin import Margin
from amp_convert.validate.training.options import DEFAULT_STEPS, Options
from amp_convert.validate.training.recipe import Recipe
from amp_convert.validate.training.results import TrainingParity
from tests.training import OPTIMIZERS, POINTS, classify, convert_net, initial_model, points, score

NONE = LossScaling("none")


@pytest.fixture(scope="module")
def mixed() -> ConvertedModel:
    return convert_net(torch.float16)


def how(**options: Any) -> Recipe:
    return Recipe(classify, OPTIMIZERS["adamw"], **options)


def comparable(parity: TrainingParity) -> str:
    """All of it but times and memory; as text, since a NaN is not itself."""
    plain = dataclasses.asdict(parity)
    for arm in plain["run"]["arms"]:
        arm["milliseconds"] = arm["peak_bytes"] = None
    return json.dumps(plain)


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


def stop_after(steps: int) -> tuple[Callable[[], None], Callable[[], bool]]:
    made = itertools.count()
    return (lambda: None), (lambda: next(made) >= steps)


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


# --- checkpoints ---

FULL: dict[str, Any] = {
    "accumulate": 2,
    "clip_norm": 0.5,
    "scaling": LossScaling(initial=2.0**22, growth_factor=2.0**9, growth_interval=2),
    "scheduler": lambda optimizer: torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.01, 12),
}


@pytest.mark.slow
@pytest.mark.parametrize("stops", [(1,), (4, 7), (13, 26)], ids=str)
def test_a_run_goes_on_in_the_same_bits(
    stops: tuple[int, ...], mixed: ConvertedModel, tmp_path: Path
) -> None:
    """Stopped in the first seed and in later ones; every number but the times is the same."""
    options = Options(steps=6, seeds=5, margin=Margin(0.5), checkpoint_every=2)
    whole = compare_training(mixed, how(**FULL), POINTS, options)
    kept = dataclasses.replace(options, checkpoint=tmp_path / "kept")
    said: list[str] = []
    made = 0
    for stop in stops:
        tick, should_stop = stop_after(stop - made)
        part = compare_training(
            mixed, how(**FULL), POINTS, kept, tick=tick, should_stop=should_stop, say=said.append
        )
        made = stop
        assert part.interrupted
    done = compare_training(mixed, how(**FULL), POINTS, kept, say=said.append)
    assert comparable(done) == comparable(whole)
    assert whole.run.arm("mixed").skipped
    seed, step = divmod(stops[-1], 6)
    of_seed = f" of seed {seed}" if seed else ""
    assert said[-1] == f"going on after step {step}{of_seed}, from the checkpoint {kept.checkpoint}"


@pytest.mark.slow
def test_a_checkpoint_of_another_run_is_refused(mixed: ConvertedModel, tmp_path: Path) -> None:
    options = Options(steps=6, checkpoint=tmp_path, identity={"model": "one"})
    _, should_stop = stop_after(2)
    compare_training(mixed, how(), POINTS, options, should_stop=should_stop)
    others: dict[str, Callable[[], Any]] = {
        "steps was 6, is 7": lambda: compare_training(
            mixed, how(), POINTS, dataclasses.replace(options, steps=7)
        ),
        "clip_norm was None, is 1.0": lambda: compare_training(
            mixed, how(clip_norm=1.0), POINTS, options
        ),
        "model was one, is two": lambda: compare_training(
            mixed, how(), POINTS, dataclasses.replace(options, identity={"model": "two"})
        ),
        "dtype was float16, is bfloat16": lambda: compare_training(
            convert_net(torch.bfloat16), how(), POINTS, options
        ),
    }
    for what, call in others.items():
        with pytest.raises(UsageError, match=f"is of another run: .*{what}|loss_scaling was"):
            call()
    changed = dataclasses.replace(POINTS, train_batches=lambda seed: points(seed + 1))
    with pytest.raises(Exception, match=r"train_batches\(0\) gives other batches than when the"):
        compare_training(mixed, how(), changed, options)


def test_a_disk_that_fills_up_costs_the_checkpoint_only(
    mixed: ConvertedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = Options(steps=6, checkpoint=tmp_path, checkpoint_every=2)
    whole = compare_training(mixed, how(), POINTS, Options(steps=6))
    real, calls = checkpoint.save_file, itertools.count()

    def filling(*arguments: Any) -> None:
        if next(calls):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(*arguments)

    monkeypatch.setattr(checkpoint, "save_file", filling)
    said: list[str] = []
    found = compare_training(mixed, how(), POINTS, options, say=said.append)
    assert comparable(found) == comparable(whole)
    assert said == [
        f"the checkpoint {tmp_path} cannot be written: No space left on device. "
        "Make room, or give another folder."
    ]
    monkeypatch.undo()
    found = compare_training(mixed, how(), POINTS, options, say=said.append)
    assert comparable(found) == comparable(whole)
    assert said[1:] == [f"going on after step 2, from the checkpoint {tmp_path}"]


COMMAND = [sys.executable, "-m", "amp_convert", "examples/digits_cnn.py", "--device", "cpu"]


@pytest.mark.slow
def test_a_killed_command_goes_on_in_the_same_bits(tmp_path: Path) -> None:
    """The real command, killed while it trains until it gets through; then nothing is left."""
    flags = ["--steps", "40", "--batches", "2", "--calibrate", "1"]
    kept = tmp_path / "kept"
    keeping = ["--checkpoint", str(kept), "--checkpoint-every", "3"]

    def started(out: str, *more: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [*COMMAND, *flags, "--out", str(tmp_path / out), *more],
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
        )

    def result(out: str) -> list[dict[str, Any]]:
        report = json.loads((tmp_path / out / "report.json").read_text())
        unmeasured = {"milliseconds": None, "peak_bytes": None}
        return [{**arm, **unmeasured} for arm in report["training"]["run"]["arms"]]

    with started("whole") as process:
        process.communicate()
    for turn in range(2):
        with started("parts", *keeping) as process:
            index = kept / checkpoint.INDEX
            before = index.stat().st_mtime_ns if turn else 0
            while process.poll() is None:  # until it has written at least once more
                if index.exists() and index.stat().st_mtime_ns != before:
                    process.send_signal(signal.SIGKILL)
                    break
                time.sleep(0.005)
            process.communicate()
        assert not (tmp_path / "parts").exists()
        assert index.exists()
    with started("parts", *keeping) as process:
        _, progress = process.communicate()
    assert "going on after step " in progress
    assert process.returncode == 0
    assert result("parts") == result("whole")
    assert not kept.exists()
