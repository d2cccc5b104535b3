"""User code that fails: where, and what is said of it."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch

from amp_convert.core.errors import ModelError, UsageError
from amp_convert.loading.source import SOURCES
from amp_convert.loading.user_code import defined_at, placed, run_file, run_module, user_code
from tests.loading.code_texts import failure

Write = Callable[..., str]


@pytest.mark.parametrize(
    ("typed", "mend"),
    [
        ("digits.py", "Did you mean {}/digits_cnn.py?"),
        ("digits_cnn", "Did you mean {}/digits_cnn.py?"),
        ("zzz.py", SOURCES),
    ],
)
def test_missing_file(write: Write, tmp_path: Path, typed: str, mend: str) -> None:
    write("", "digits_cnn.py")
    with pytest.raises(UsageError) as caught:
        run_file(f"{tmp_path}/{typed}")
    assert str(caught.value) == f"there is no file {tmp_path}/{typed}. {mend.format(tmp_path)}"


def test_folder_and_other_file_types(write: Write, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"is a folder\. Give the model file that is in it\.$"):
        run_file(str(tmp_path))
    with pytest.raises(UsageError, match=r"net\.pt is not a \.py file\. Give a Python file whose"):
        run_file(write("", "net.pt"))


def test_syntax_error_names_line_and_message(write: Write) -> None:
    said = failure(run_file, write("x = 1\ndef f(:\n"))
    assert (
        said == "model.py is not valid Python: invalid syntax (at model.py:2). Correct that line."
    )


def test_syntax_error_in_a_neighbour_names_the_neighbour(write: Write) -> None:
    write("x = 1\n\ny = (", "net.py")
    said = failure(run_file, write("import net"))
    assert said.startswith("model.py raised SyntaxError: '(' was never closed")
    assert "(at net.py:3)" in said


@pytest.mark.parametrize("data", [b"x = '\xff'", b"\n\n\nx = '\xff'", b"# coding: nonsense\n"])
def test_not_utf8(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "model.py").write_bytes(data)
    said = failure(run_file, f"{tmp_path}/model.py")
    assert said.startswith("model.py is not UTF-8 text: ")
    assert said.endswith(". Save it as UTF-8.")


def test_binary_file_with_a_python_name(tmp_path: Path) -> None:
    (tmp_path / "model.py").write_bytes(b"PK\x00\x01")
    assert failure(run_file, f"{tmp_path}/model.py").startswith("model.py is not valid Python: ")


def test_declared_encodings_are_honoured(tmp_path: Path) -> None:
    (tmp_path / "model.py").write_bytes(b"# coding: latin-1\nx = '\xe9'")
    assert run_file(f"{tmp_path}/model.py")[0].x == "é"


@pytest.mark.parametrize(
    ("call", "said"),
    [("sys.exit(3)", "sys.exit(3)"), ("sys.exit()", "sys.exit()"), ("exit('x')", "sys.exit('x')")],
)
def test_sys_exit(write: Write, call: str, said: str) -> None:
    assert failure(run_file, write(f"import sys\n\n{call}")) == (
        f'model.py called {said} (at model.py:3). Guard it with if __name__ == "__main__".'
    )


def test_keyboard_interrupt_passes(write: Write) -> None:
    with pytest.raises(KeyboardInterrupt):
        run_file(write("raise KeyboardInterrupt"))


def test_missing_package_is_named(write: Write) -> None:
    assert failure(run_file, write("x = 1\nimport no_such_package.sub")) == (
        "model.py imports no_such_package, which cannot be found (at model.py:2). "
        "Install the package that provides it in this Python environment."
    )


def test_the_deepest_line_of_the_users_file_is_named(write: Write) -> None:
    write("def go(f):\n    f()", "net.py")
    text = "import json, net\ndef load():\n    json.loads('{')\nnet.go(load)"
    assert failure(run_file, write(text)) == (
        "model.py raised JSONDecodeError: Expecting property name enclosed in double quotes: "
        "line 1 column 2 (char 1) (at model.py:3). Correct it there; --debug shows the traceback."
    )


def test_without_a_users_frame_the_deepest_outside_torch_is_named(write: Write) -> None:
    write("import torch\ndef f():\n    torch.nn.Linear(2, 2)(torch.ones(3))", "library.py")
    write("import library", "model.py")
    module, path = run_file(f"{Path(write('import library')).parent}/model.py")
    with pytest.raises(ModelError) as caught, user_code("f()", path):
        module.library.f()
    assert caught.value.where == "library.py:3"


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ValueError(), "raised ValueError"),
        (ValueError("a.\nb"), "raised ValueError: a"),
        (RuntimeError("Errors in loading Net:\n\tMissing key: w\n\tmore"),
         "raised RuntimeError: Errors in loading Net: Missing key: w"),
        (ValueError("\x1b[31mred"), "raised ValueError: [31mred"),
        (ModuleNotFoundError("no"), "raised ModuleNotFoundError: no"),
    ],
)  # fmt: skip
def test_messages_are_one_clean_line(error: Exception, said: str) -> None:
    with pytest.raises(ModelError) as caught, user_code("metrics()", ""):
        raise error
    assert caught.value.what == f"metrics() {said}"
    assert caught.value.__cause__ is error


def test_errors_of_ours_and_their_mend_pass_unchanged() -> None:
    ours = UsageError("x")
    with pytest.raises(UsageError) as caught, user_code("it", ""):
        raise ours
    assert caught.value is ours
    with pytest.raises(ModelError) as advised, user_code("it", "", mend="Do this."):
        raise ValueError
    assert advised.value.mend == "Do this."


def test_errors_without_a_place_get_one() -> None:
    ours, ready = UsageError("x", mend="y"), ModelError("x", where="net.py:3")
    with pytest.raises(UsageError) as caught, placed("batch 0"):
        raise ours
    assert (str(caught.value), caught.value.__cause__) == ("x (at batch 0). y", ours)
    with pytest.raises(ModelError) as unchanged, placed("batch 0"):
        raise ready
    assert unchanged.value is ready
    with pytest.raises(ZeroDivisionError), placed("batch 0"):
        raise ZeroDivisionError


def test_where_a_function_of_the_users_begins(write: Write) -> None:
    path = write(
        "\ndef loss(a, b):\n    return a\n\nother = lambda seed: seed\nfrom math import sin"
    )
    module, _ = run_file(path)
    assert defined_at(module.loss, path) == "model.py:2"
    assert defined_at(partial(partial(module.loss, 1), 2), path) == "model.py:2"
    assert defined_at(module.other, path) == "model.py:5"
    for foreign in (module.sin, torch.optim.AdamW, torch.nn.MSELoss(), inspect.unwrap, None):
        assert defined_at(foreign, path) == "model.py"


def test_prints_go_to_stderr(write: Write, capsys: pytest.CaptureFixture[str]) -> None:
    run_file(write("import sys\nprint('hello')\nsys.stdout.write('again')"))
    sys.stdout.write("ours\n")
    assert capsys.readouterr() == ("ours\n", "hello\nagain")


def test_module_is_found_from_the_current_folder(
    write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write("", "nets/__init__.py")
    path = write("VALUE = 4", "nets/small.py")
    monkeypatch.chdir(tmp_path)
    module, file = run_module("nets.small")
    assert (module.VALUE, file) == (4, path)
    assert sys.path[0] == str(tmp_path)


@pytest.mark.parametrize("place", ["no_such", "no_such.sub", "json.no_such", "math.x", "builtins"])
def test_missing_module(place: str) -> None:
    with pytest.raises(UsageError, match=f"^there is no module {place}\\. It is looked for in /"):
        run_module(place)


def test_module_that_fails_to_import(
    write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write("import no_such_package", "needy.py")
    write("\n1 / 0", "broken.py")
    monkeypatch.chdir(tmp_path)
    assert "needy imports no_such_package, which" in failure(run_module, "needy")
    assert failure(run_module, "broken").startswith(
        "broken raised ZeroDivisionError: division by zero (at broken.py:2)."
    )
