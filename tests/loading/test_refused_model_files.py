"""Model files that are refused, and what is said of them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from amp_convert.loading.first_run import check_forward
from amp_convert.loading.model_file import Case
from amp_convert.loading.user_functions import user_batches
from tests.loading.model_texts import MODEL, OPTIONAL, refusal

HEAD = "import torch\nfrom torch import nn\n"


INPUTS = "def example_inputs():\n    return torch.ones(4, 3)\n"


Load = Callable[..., Case]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            INPUTS,
            "model.py defines neither build_model nor model. "
            "Define build_model(), which returns the torch.nn.Module to convert.",
        ),
        (
            MODEL.replace("build_model", "build_modle"),
            "model.py defines neither build_model nor model. "
            "Did you mean build_modle? Then rename it to build_model.",
        ),
        (
            HEAD + "def build_model():\n    raise ValueError('no weights')",
            "build_model() raised ValueError: no weights (at model.py:4). "
            "Correct it there; --debug shows the traceback.",
        ),
        (
            HEAD + "def build_model():\n    return nn.Linear('3', 2)",
            "build_model() raised TypeError: empty(): ",
        ),
        ("def build_model(size): ...", "build_model() raised TypeError: build_model() missing 1"),
        (
            "def build_model(): return 'x', 1",
            "build_model() gives a tuple (at model.py). "
            "Let build_model() give the torch.nn.Module to convert.",
        ),
        ("def build_model(): ...", "build_model() gives None (at model.py). Let build_model()"),
        ("model = 3", "model gives an int (at model.py). Let model give the torch.nn.Module"),
        (
            "def build_model():\n    import sys\n    sys.exit(1)",
            "build_model() called sys.exit(1) (at model.py:3). Guard it with ",
        ),
        (
            MODEL,
            "model.py does not define example_inputs. Define example_inputs(), which returns "
            "a tensor, a tuple (positional arguments) or a dict (keyword arguments).",
        ),
        (
            MODEL + "def example_input(): ...",
            "model.py does not define example_inputs. "
            "Did you mean example_input? Then rename it to example_inputs.",
        ),
        (
            MODEL + "def example_inputs():\n    return torch.ones(2) @ torch.ones(3)",
            "example_inputs() raised RuntimeError: ",
        ),
        (
            MODEL + "example_inputs = [torch.ones(3)]",
            "example_inputs gives a list. Use a tuple for positional arguments.",
        ),
        (MODEL + "example_inputs = 'text'", "example_inputs gives a str. Give a tensor, a tuple"),
        (
            MODEL + "def example_inputs(): return {1: torch.ones(3)}",
            "example_inputs() gives a dict with keys that are not strings. Give ",
        ),
        (
            MODEL + INPUTS + "eval_batches = []",
            "eval_batches is a list, not a function (at model.py). "
            "Write it as def eval_batches(...).",
        ),
        *[
            (
                MODEL + INPUTS + f"{name} = 3",
                f"{name} is an int, not a function (at model.py). Write it as def {name}(...).",
            )
            for name in OPTIONAL
        ],
        (
            MODEL + INPUTS + "def metrics(o, t): ...",
            "model.py defines metrics, but not eval_batches. "
            "Define eval_batches(), which yields (inputs, target) pairs.",
        ),
        (
            MODEL + INPUTS + "lower_is_better = 'loss'",
            "lower_is_better is 'loss' (at model.py). Write a tuple of names, such as (\"loss\",).",
        ),
        (MODEL + INPUTS + "lower_is_better = (1,)", "lower_is_better is (1,) (at model.py). "),
        (MODEL + INPUTS + "lower_is_better = 5", "lower_is_better is 5 (at model.py). "),
    ],
)
def test_refused_files(load: Load, text: str, said: str) -> None:
    assert refusal(load, text).startswith(said)


def test_the_file_is_named_where_no_line_of_it_is_to_blame(load: Load) -> None:
    assert "(at model.py)" in refusal(load, "def build_model(size): ...")


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ("nn.ReLU()", "the model has no FP32 parameters, so there is nothing to convert: it has no "
         "parameters (at model.py). Let model give a model in FP32."),
        ("nn.BatchNorm1d(3, affine=False)", "the model has no FP32 parameters, so there is nothing "
         "to convert: it has no parameters (at model.py). Let model give a model in FP32."),
        ("nn.Sequential(nn.Linear(3, 2).double(), nn.Linear(2, 2, dtype=torch.complex64))",
         "the model has no FP32 parameters, so there is nothing to convert: its parameters are "
         "complex64, float64 (at model.py). Let model give a model in FP32."),
        ("nn.Linear(3, 2).half()",
         "the model's parameters are already float16 (at model.py). Give it in FP32."),
        ("nn.Linear(3, 2).bfloat16()",
         "the model's parameters are already bfloat16 (at model.py). Give it in FP32."),
        ("nn.LazyLinear(2)", "the model has lazy parameters without a shape (at model.py). "
         "Run it once on an input before model gives it."),
    ],
)  # fmt: skip
def test_refused_models(load: Load, model: str, said: str) -> None:
    assert refusal(load, f"{HEAD}{INPUTS}model = {model}") == said


@pytest.mark.filterwarnings("ignore:`torch.jit")
def test_torchscript_is_refused_and_partly_low_models_are_not(load: Load) -> None:
    scripted = MODEL.replace("nn.Linear(3, 2)", "torch.jit.script(nn.Linear(3, 2))")
    assert "gives a TorchScript module (at" in refusal(load, scripted + INPUTS)
    mixed = load(f"{HEAD}{INPUTS}model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2).half())")
    assert {p.dtype for p in mixed.model.parameters()} == {torch.float32, torch.float16}


def test_refused_inputs_show_the_models_own_error_and_line(load: Load) -> None:
    text = (
        HEAD + "class Net(nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.layer = nn.Linear(3, 2)\n"
        "    def forward(self, x):\n"
        "        return self.layer(x)\n"
        "model = Net()\n"
    )
    case = load(text + "example_inputs = torch.ones(4, 5)")
    assert refusal(check_forward, case) == (
        "the model, called with example_inputs, raised RuntimeError: mat1 and mat2 shapes cannot "
        "be multiplied (4x5 and 3x2) (at model.py:8). Make example_inputs match the model's "
        "forward(); --debug shows the traceback."
    )
    assert all(module.training for module in case.model.modules())
    said = refusal(check_forward, load(text + "example_inputs = {'y': torch.ones(4, 3)}"))
    assert "got an unexpected keyword argument 'y' (at model.py)" in said


def test_errors_while_batches_are_drawn_name_the_line(load: Load) -> None:
    case = load(MODEL + INPUTS + "def eval_batches():\n    yield torch.ones(3), 0\n    1 / 0")
    batches = user_batches("eval_batches", case.eval_batches, case.path, 9)
    assert next(batches)[2] == 0
    assert refusal(next, batches).startswith(
        "eval_batches() raised ZeroDivisionError: division by zero (at model.py:9)"
    )
