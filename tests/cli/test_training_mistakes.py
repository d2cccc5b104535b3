"""Mistakes in what a model file gives to train with."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.training_files import (
    batches,
    loss,
    optimizer,
    refused,
    scheduler,
)
from tests.command import TRAINED

LOOK = "Correct it there; --debug shows the traceback."


PAIRS = "Let it give (inputs, target) pairs, anew at each call."


FIT = (
    "Pad it to that size, or convert the model with example inputs, and with batches, like those "
    "you will pass."
)


YIELD, LOSS = "yield batch(100 * seed + step + 2)", "return F.cross_entropy(outputs, target)"


OPTIMIZER = "return torch.optim.SGD(parameters, lr=0.1)"


def initial_model(text: str) -> str:
    return f"{TRAINED}def initial_model(seed):\n    {text}\n"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("text", "message"),
    [
        pytest.param(
            loss("return F.cross_entropy(outputs, target, reduction='none')"),
            "loss() gives a tensor of shape (16,) (at model.py:26). "
            "Let it return a floating point tensor of one element.",
            id="a loss a sample",
        ),
        pytest.param(
            loss("return F.cross_entropy(outputs, target).item()"),
            "loss() gives a float, not a tensor (at model.py:26). "
            "Let it return a floating point tensor of one element.",
            id="a loss that is no tensor",
        ),
        pytest.param(
            loss("return (outputs.argmax(1) == target).sum()"),
            "loss() gives a tensor of torch.int64 (at model.py:26). "
            "Let it return a floating point tensor of one element.",
            id="a loss of integers",
        ),
        pytest.param(
            loss("return F.cross_entropy(outputs, target).detach()"),
            "loss() gives a tensor that no parameter has a gradient from (at model.py:26). "
            "Compute it from the model's outputs, without detach(), item() or no_grad().",
            id="a loss without a gradient",
        ),
        pytest.param(
            loss("return F.cross_entropy(outputs, target.int())"),
            "loss(), given the outputs of the FP32 model, raised RuntimeError: expected target "
            f"dtype to be Long or Byte, but got Int (at model.py:27). {LOOK}",
            id="a target dtype that the loss refuses",
        ),
        pytest.param(
            batches("yield batch(0)[0], torch.ones(4)"),
            "loss(), given the outputs of the FP32 model, raised ValueError: Expected input "
            f"batch_size (16) to match target batch_size (4) (at model.py:27). {LOOK}",
            id="a target shape that the loss refuses",
        ),
        pytest.param(
            batches("if False: yield"),
            f"train_batches() gives no batches (at model.py:22). {PAIRS}",
            id="no batch",
        ),
        pytest.param(
            batches("yield batch(0)[0]"),
            f"batch 0 of train_batches() is a Tensor, not a pair (at model.py:22). {PAIRS}",
            id="no pair",
        ),
        pytest.param(
            batches("yield (*batch(0), None) if step == 3 else batch(0)"),
            f"batch 3 of train_batches() is a tuple, not a pair (at model.py:22). {PAIRS}",
            id="a triple later",
        ),
        pytest.param(
            batches("yield list(batch(0)[0]), 0"),
            "batch 0 of train_batches() gives a list (at model.py:22). "
            "Use a tuple for positional arguments.",
            id="a list of inputs",
        ),
        pytest.param(
            batches("yield torch.ones(16, 9), batch(0)[1]"),
            "input input has shape (16, 9), but the graph takes (any, 8) (at batch 0 of "
            f"train_batches(0)). {FIT}",
            id="a batch that does not fit",
        ),
        pytest.param(
            batches("yield torch.ones(16, 9 if step == 3 else 8), batch(0)[1]"),
            "the FP32 model, given step 4 of train_batches(0), raised RuntimeError: mat1 and mat2 "
            "shapes cannot be multiplied (16x9 and 8x16) (at model.py). "
            "Make it what its forward() takes; --debug shows the traceback.",
            id="a batch that does not fit later",
        ),
        pytest.param(
            batches("yield batch(0)\n        raise OSError('no such file')"),
            f"train_batches() raised OSError: no such file (at model.py:25). {LOOK}",
            id="batches that fail",
        ),
        pytest.param(
            TRAINED.replace("train_batches(seed):", "train_batches():\n    seed = 0"),
            "train_batches() raised TypeError: train_batches() takes 0 positional arguments but 1 "
            f"was given (at model.py). {LOOK}",
            id="batches without a seed",
        ),
        pytest.param(
            optimizer("torch.optim.SGD(parameters, lr=0.1)"),
            "optimizer() gives None (at model.py:29). Let it return a torch.optim.Optimizer.",
            id="no optimizer",
        ),
        pytest.param(
            optimizer("return torch.optim.SGD(parameters, lr=-1)"),
            f"optimizer() raised ValueError: Invalid learning rate: -1 (at model.py:30). {LOOK}",
            id="an optimizer that cannot be made",
        ),
        pytest.param(
            optimizer(
                "parameters = list(parameters)\n    for p in parameters: p.data = p.data.half()\n"
                f"    {OPTIMIZER}"
            ),
            "optimizer() made 0.weight a float16 tensor of shape (16, 8) on cpu; it was float32, "
            "(16, 8) on cpu (at model.py:29). Use one that keeps FP32 weights as they are.",
            id="an optimizer that changes the dtype",
        ),
        pytest.param(
            optimizer("return Low(parameters, lr=0.1)") + "class Low(torch.optim.SGD):\n"
            "    def step(self):\n        super().step()\n"
            "        for p in self.param_groups[0]['params']: p.data = p.data.bfloat16()\n",
            "the optimizer's step made 0.weight a bfloat16 tensor of shape (16, 8) on cpu; it was "
            "float32, (16, 8) on cpu (at model.py:29). Use one that keeps FP32 weights as they "
            "are.",
            id="a step that changes the dtype",
        ),
        pytest.param(
            scheduler("torch.optim.lr_scheduler.StepLR(optimizer, 2)"),
            "scheduler() gives None (at model.py:31). "
            "Let it return a scheduler of torch.optim.lr_scheduler.",
            id="no scheduler",
        ),
        pytest.param(
            scheduler("return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: 1 / (2 - n))"),
            "the scheduler's step raised ZeroDivisionError: division by zero (at model.py:32). "
            f"{LOOK}",
            id="a scheduler that fails in its step",
        ),
        pytest.param(
            initial_model("build_model()"),
            "initial_model() gives None (at model.py:31). "
            "Let it return the model that training starts from.",
            id="no initial model",
        ),
        pytest.param(
            initial_model("return nn.Sequential(nn.Linear(8, 17), nn.ReLU(), nn.Linear(17, 4))"),
            "initial_model() gives another model than the one to convert: its 0.weight is a "
            "float32 tensor of shape (17, 8), not a float32 tensor of shape (16, 8) (at "
            "model.py:31). Let it build the same model with other weights.",
            id="another initial model",
        ),
        pytest.param(
            initial_model("return nn.Sequential(*build_model(), nn.Linear(4, 4))"),
            "initial_model() gives another model than the one to convert: it has 3.weight as well "
            "(at model.py:31). Let it build the same model with other weights.",
            id="a larger initial model",
        ),
        pytest.param(
            TRAINED.replace("    return {", "    assert len(target) == 3\n    return {"),
            f"metrics() raised AssertionError (at model.py:20). {LOOK}",
            id="metrics that fail",
        ),
    ],
)
def test_a_mistake_in_the_model_file(text: str, message: str, tmp_path: Path) -> None:
    assert refused(tmp_path, text).error == message


@pytest.mark.slow
@pytest.mark.parametrize("value", ["nan", "inf"])
def test_a_loss_that_is_no_number_in_fp32_is_said_before_any_mixed_step(
    value: str, tmp_path: Path
) -> None:
    text = loss(f"print('the loss was called')\n    {LOSS} * float('{value}')")
    outcome = refused(tmp_path, text)
    assert outcome.err.splitlines()[-2:] == [
        "the loss was called",
        f"error: the FP32 model itself has a loss of {value} (at model.py). "
        "Correct the model, its weights or that batch first.",
    ]
    assert outcome.err.count("the loss was called") == 1
