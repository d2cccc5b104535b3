"""Runs that go on from a checkpoint."""

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
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from amp_convert.core.errors import UsageError
from amp_convert.rewrite.converted_model import ConvertedModel
from amp_convert.validate.training import checkpoint
from amp_convert.validate.training.compare import compare_training
from amp_convert.validate.training.loss_scaling import LossScaling
from amp_convert.validate.training.margin import Margin
from amp_convert.validate.training.options import Options
from amp_convert.validate.training.results import TrainingParity
from tests.training import POINTS, convert_net, points
from tests.validate.training.mixed_runs import how, stop_after


def comparable(parity: TrainingParity) -> str:
    """All of it but times and memory; as text, since a NaN is not itself."""
    plain = dataclasses.asdict(parity)
    for arm in plain["run"]["arms"]:
        arm["milliseconds"] = arm["peak_bytes"] = None
    return json.dumps(plain)


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
