"""Runs of the command that train."""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path

import pytest
from jsonschema import Draft202012Validator

from tests.cli.training_files import (
    batches,
    checks,
    loss,
    refused,
    scheduler,
)
from tests.command import TRAINED, amp, net, write

YIELD, LOSS = "yield batch(100 * seed + step + 2)", "return F.cross_entropy(outputs, target)"


@pytest.mark.slow
def test_lengths_that_vary_from_batch_to_batch_are_trained_on(tmp_path: Path) -> None:
    """The second dimension varies as the batches do."""
    text = net("return self.a(x).mean(1)").replace(
        ".reshape(4, 8)", ".reshape(4, 8)[:, None].expand(4, 5, 8)"
    )
    text += "def train_batches(seed):\n    for length in (5, 5, 6):\n"
    text += "        yield torch.ones(4, length, 8), 0\n"
    text += "def loss(outputs, target):\n    return outputs.square().sum()\n"
    write(tmp_path, text)
    outcome = amp(tmp_path, "model.py")
    assert outcome.code == 3
    assert "undecided by training.steps: too little is learnt in 3 steps" in outcome.out


def test_a_checkpoint_folder_with_something_else_is_refused(tmp_path: Path) -> None:
    flags = ("--checkpoint", "reports/model")
    assert refused(tmp_path, TRAINED, "model.py", *flags).error == (
        "the folder reports/model is no checkpoint: it holds report.json. "
        "Give a new or empty folder."
    )


@pytest.mark.slow
def test_a_metric_that_there_is_not(tmp_path: Path) -> None:
    flags = ("--seeds", "5", "--margin", "0.1", "--train-metric", "acuracy")
    assert refused(tmp_path, TRAINED, "model.py", *flags).error == (
        "the model file has no metric acuracy. There are: loss, accuracy, train_loss."
    )


@pytest.mark.slow
def test_batches_that_run_out_before_the_steps_leave_it_open(tmp_path: Path) -> None:
    write(tmp_path, TRAINED)
    outcome = amp(tmp_path, "model.py", "--steps", "10", "--json")
    reason = "train_batches(0) has batches for 6 steps only, of 10"
    assert (outcome.code, outcome.json["verdict"]["status"]) == (3, "inconclusive")
    assert checks(outcome)["training.steps"] == {
        "name": "training.steps",
        "status": "unchecked",
        "value": 6.0,
        "threshold": 10.0,
        "required": True,
        "reason": reason,
    }
    assert outcome.json["training"]["ended"] == reason
    markdown = (tmp_path / "reports/model/report.md").read_text(encoding="utf-8")
    assert reason in markdown


def test_fewer_batches_than_a_step_takes(tmp_path: Path) -> None:
    write(tmp_path, TRAINED)
    outcome = amp(tmp_path, "model.py", "--accumulate", "7", "--json")
    assert outcome.code == 3
    steps = checks(outcome)["training.steps"]
    assert (steps["status"], steps["reason"]) == (
        "unchecked",
        "train_batches(0) has batches for 0 steps only, of 50",
    )


@pytest.mark.slow
def test_without_steps_the_batches_decide_how_many(tmp_path: Path) -> None:
    write(tmp_path, TRAINED)
    outcome = amp(tmp_path, "model.py", "--json")
    assert outcome.code == 0
    training = outcome.json["training"]
    assert (training["steps"], training["run"]["steps"], training["ended"]) == (6, 6, "")
    endless = batches("while True: yield batch(step)")
    write(tmp_path, endless)
    assert amp(tmp_path, "model.py", "--json").json["training"]["run"]["steps"] == 50


@pytest.mark.slow
def test_a_run_that_passes_has_every_check_on_training(tmp_path: Path) -> None:
    write(tmp_path, TRAINED)
    write(tmp_path, TRAINED.replace("range(6)", "range(20)"))  # six steps teach too little
    outcome = amp(tmp_path, "model.py", "--steps", "20", "--json")
    assert outcome.code == 0
    schema = json.loads(files("amp_convert.report").joinpath("report.schema.json").read_bytes())
    assert list(Draft202012Validator(schema).iter_errors(outcome.json)) == []
    judged = checks(outcome)
    assert {check["status"] for check in judged.values()} == {"pass"}
    parts = ("steps", "sound", "random", "gradients", "loss", "weights", "metric")
    assert {f"training.{part}" for part in parts} <= set(judged)
    training = outcome.json["training"]
    assert {key: training[key] for key in ("dtype", "optimizer", "schedule", "loss_scaling")} == {
        "dtype": "float16",
        "optimizer": "SGD, learning rate 0.1",
        "schedule": "none",
        "loss_scaling": "dynamic, from 65536: times 2 after 2000 clean steps, times 0.5 after an "
        "overflow",
    }
    assert [arm["arm"] for arm in training["run"]["arms"]] == ["fp32", "mixed", "autocast", "noise"]


@pytest.mark.slow
def test_settings_of_training_from_pyproject_and_flags(tmp_path: Path) -> None:
    text = scheduler("return torch.optim.lr_scheduler.StepLR(optimizer, 2)")
    write(tmp_path, text + "def initial_model(seed):\n    return build_model()\n")
    table = "[tool.amp-convert]\nsteps = 2\naccumulate = 3\nclip-norm = 0.5\nloss-scale = 1024\n"
    write(tmp_path, table, "pyproject.toml")
    training = amp(tmp_path, "model.py", "--json", "--accumulate", "2").json["training"]
    said = ("steps", "accumulate", "clip_norm", "loss_scaling", "schedule", "initial_weights")
    assert [training[key] for key in said] == [
        *(2, 2, 0.5, "static, 1024", "StepLR", "initial_model(seed)")
    ]
    assert training["run"]["arms"][1]["scales"] == [1024, 1024]
    low = amp(tmp_path, "model.py", "--json", "--dtype", "bfloat16", "--loss-scale", "none")
    assert low.json["training"]["loss_scaling"] == "none"


@pytest.mark.slow
def test_a_loss_that_refuses_low_precision_is_given_fp32(tmp_path: Path) -> None:
    """Native autocast gives it FP16, and fails, as with the losses that PyTorch bans there."""
    refuse = "if outputs.dtype != torch.float32: raise TypeError('it takes FP32')"
    write(tmp_path, loss(f"{refuse}\n    {LOSS}"))
    outcome = amp(tmp_path, "model.py", "--json")
    assert outcome.code == 0
    notes = {arm["arm"]: arm["note"] for arm in outcome.json["training"]["run"]["arms"]}
    why = "the original fails under torch.autocast: loss(), given the outputs of the autocast"
    assert notes.pop("autocast").startswith(why)
    assert notes == {"fp32": "", "mixed": "", "noise": ""}
