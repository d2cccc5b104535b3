"""Wrong input on the command line: one line that says what and the mend, and nothing written."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.cli.refused_calls import refused
from tests.command import HEAD, INPUTS, net, write

GOOD = net("return self.a(x)")


SOURCES = "Give the path of a .py file, or package.module:attribute."


RULE = '[[rule]]\nop = "aten.linear"\ncategory = "allow"\nreason = "because"\n'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        pytest.param(
            "def build_model(:\n",
            "model.py is not valid Python: invalid syntax (at model.py:1). Correct that line.",
            id="not Python",
        ),
        pytest.param(
            HEAD + INPUTS,
            "model.py defines neither build_model nor model. "
            "Define build_model(), which returns the torch.nn.Module to convert.",
            id="no model",
        ),
        pytest.param(
            HEAD + "def build_modle():\n    return nn.Linear(8, 8)\n" + INPUTS,
            "model.py defines neither build_model nor model. "
            "Did you mean build_modle? Then rename it to build_model.",
            id="a model by another name",
        ),
        pytest.param(
            HEAD + "model = nn.Linear(8, 8)\n",
            "model.py does not define example_inputs. Define example_inputs(), which returns a "
            "tensor, a tuple (positional arguments) or a dict (keyword arguments).",
            id="no inputs",
        ),
        pytest.param(
            GOOD.replace(".reshape(4, 8)", ".reshape(4, 8)[:, :7]"),
            "the model, called with example_inputs, raised RuntimeError: mat1 and mat2 shapes "
            "cannot be multiplied (4x7 and 8x8) (at model.py:10). Make example_inputs match the "
            "model's forward(); --debug shows the traceback.",
            id="inputs that the model refuses",
        ),
        pytest.param(
            net("return self.a(x) / 0 * 0"),
            "the FP32 model itself gives NaN in its output (output: 32 of 32 values) (at "
            "model.py). Correct the model or example_inputs first: NaN cannot be compared with "
            "anything.",
            id="NaN in FP32",
        ),
        pytest.param(
            HEAD + "model = nn.ReLU()\n" + INPUTS,
            "the model has no FP32 parameters, so there is nothing to convert: it has no "
            "parameters (at model.py). Let model give a model in FP32.",
            id="no float parameters",
        ),
        pytest.param(
            "import sys\nsys.exit(3)\n",
            'model.py called sys.exit(3) (at model.py:2). Guard it with if __name__ == "__main__".',
            id="sys.exit in the file",
        ),
        pytest.param(
            GOOD + "def eval_batches():\n    raise SystemExit\n",
            "eval_batches() called sys.exit() (at model.py:18). "
            'Guard it with if __name__ == "__main__".',
            id="sys.exit in eval_batches",
        ),
        pytest.param(
            GOOD + "def eval_batches():\n    return []\n",
            "eval_batches() gives no batches (at model.py:17). "
            "Let it give (inputs, target) pairs, anew at each call.",
            id="no batches",
        ),
    ],
)
def test_a_wrong_model_file(text: str, message: str, tmp_path: Path) -> None:
    write(tmp_path, text)
    assert refused(tmp_path, "model.py") == message
    assert refused(tmp_path, "audit", "model.py", "--out", "audit") == message


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("nothing.py", f"there is no file nothing.py. {SOURCES}"),
        ("modle.py", "there is no file modle.py. Did you mean model.py?"),
        (".", f"'.' is not the name of a model file. {SOURCES}"),
        ("model.py:builder", "model.py does not define builder. Did you mean build_model?"),
        ("model.py --dtyp float16", "there is no flag --dtyp. Did you mean --dtype?"),
        ("model.py --zzz", "there is no flag --zzz. See amp-convert convert --help."),
        (
            "audit model.py --baseline b",
            "there is no flag --baseline. See amp-convert audit --help.",
        ),
        (
            "model.py --dtype float61",
            "dtype is 'float61' (at --dtype). Give float16 or bfloat16.",
        ),
        (
            "model.py --device gpu",
            "device is 'gpu' (at --device). Give auto, cpu, cuda or cuda:N.",
        ),
        (
            "model.py --batches 0",
            "batches is 0 (at --batches). Give a whole number from 1 to 10**9.",
        ),
        (
            "model.py --batches many",
            "Invalid value for '--batches': Input should be a valid integer. "
            "See amp-convert convert --help.",
        ),
        (
            "model.py --tolerance nan",
            "tolerance is nan (at --tolerance). Give a finite number of at least 0.",
        ),
        ("audit", "Missing argument 'MODEL'. See amp-convert audit --help."),
        (
            "model.py --rules defualt",
            "unknown preset 'defualt'. Did you mean 'default'?",
        ),
        (
            "model.py --rules mine.toml",
            "cannot read rules file 'mine.toml': no such file or directory. "
            "Name a TOML file or one of the presets: apex-o1, apex-o2, apex-o3, "
            "autocast, default, fp32, half, keras-mixed-float16.",
        ),
        ("model.py --io-types fp16", "io-types is 'fp16' (at --io-types). Give keep or low."),
        ("model.py --opset 0", "opset is 0 (at --opset). Give a whole number from 1 to 10**9."),
        ("tnue model.py", "there is no command or file tnue. Did you mean tune?"),
        ("audti model.py", "there is no command or file audti. Did you mean audit?"),
        (
            "model.py --out model.py",
            "model.py is a file, not a folder. Give another folder with --out.",
        ),
        (
            "model.py --out .",
            ". is not an amp-convert report folder (it holds model.py), so it is not replaced. "
            "Give a new or empty folder with --out, or move what is in this one elsewhere.",
        ),
    ],
)
def test_a_wrong_call(arguments: str, message: str, tmp_path: Path) -> None:
    write(tmp_path, GOOD)
    assert refused(tmp_path, *arguments.split()) == message


@pytest.mark.parametrize("command", ["convert", "audit"])
def test_a_folder_that_cannot_be_written_is_found_before_any_work(
    command: str, tmp_path: Path
) -> None:
    write(tmp_path, "raise RuntimeError('the model file was run')")
    error = refused(tmp_path, command, "model.py", "--out", "model.py/report")
    assert "report folder model.py/report cannot be written: Not a directory." in error


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
def test_cuda_where_there_is_none(tmp_path: Path) -> None:
    write(tmp_path, GOOD)
    assert refused(tmp_path, "model.py", "--device", "cuda") == (
        "--device cuda was asked for, but PyTorch finds no CUDA device. "
        "Use --device cpu, or install a CUDA build of PyTorch."
    )


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        (
            "[[rule]\n",
            "not TOML: expected ']]' at the end of an array declaration (at mine.toml:1). "
            "Mend the text there.",
        ),
        (
            RULE.replace("aten.linear", "aten.linaer"),
            "unknown op 'aten.linaer' (at mine.toml:2). Did you mean 'aten.linear'?",
        ),
        (
            RULE.replace("category", "categroy"),
            "unknown key in a rule 'categroy' (at mine.toml:3). Did you mean 'category'?",
        ),
        (
            RULE.replace("allow", "alow"),
            "unknown category 'alow' (at mine.toml:3). Did you mean 'allow'?",
        ),
        (
            'extend = "default"\n',
            "unknown top-level key 'extend' (at mine.toml:1). Did you mean 'extends'?",
        ),
        (
            'extends = "defualt"\n',
            "unknown preset 'defualt' (at mine.toml:1). Did you mean 'default'?",
        ),
    ],
)
def test_a_wrong_rules_file(rules: str, message: str, tmp_path: Path) -> None:
    write(tmp_path, GOOD)
    write(tmp_path, rules, "mine.toml")
    assert refused(tmp_path, "model.py", "--rules", "mine.toml") == message


def test_a_wrong_setting(tmp_path: Path) -> None:
    write(tmp_path, GOOD)
    write(tmp_path, '[tool.amp-convert]\ndtpye = "float16"\n', "pyproject.toml")
    assert refused(tmp_path, "model.py") == (
        "unknown setting dtpye (at pyproject.toml [tool.amp-convert]). Did you mean dtype?"
    )
