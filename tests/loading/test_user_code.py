"""The border around the user's code: how files are run, and what their errors become."""

from __future__ import annotations

import dataclasses
import inspect
import pickle
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from amp_convert.loading.user_code import run_file
from tests.loading.code_texts import failure

Write = Callable[..., str]


def test_file_becomes_a_module_named_after_its_stem(write: Write) -> None:
    path = write("class Net: ...\nMAIN = __name__ == '__main__'\nFILE = __file__")
    module, absolute = run_file(path)
    assert (module.Net.__module__, module.MAIN, module.FILE) == ("model", False, path)
    assert absolute == path
    assert sys.modules["model"] is module


def test_classes_of_the_file_can_be_pickled_inspected_and_made_dataclasses(write: Write) -> None:
    text = (
        "from __future__ import annotations\n"
        "import dataclasses, typing\n"
        "@dataclasses.dataclass\n"
        "class Point:\n"
        "    x: int = 3\n"
        "    limit: typing.ClassVar[int] = 3\n"
    )
    module, _ = run_file(write(text))
    assert pickle.loads(pickle.dumps(module.Point(5))) == module.Point(5)
    assert inspect.getsource(module.Point).startswith("@dataclasses.dataclass")
    assert [field.name for field in dataclasses.fields(module.Point)] == ["x"]


def test_the_files_annotations_are_not_postponed_by_ours(write: Write) -> None:
    module, _ = run_file(write("def f(x: int): ..."))
    assert module.f.__annotations__ == {"x": int}


def test_running_leaves_nothing_beside_the_file(write: Write) -> None:
    path = Path(write("x = 1"))
    run_file(str(path))
    assert [entry.name for entry in path.parent.iterdir()] == ["model.py"]


def test_two_files_of_one_stem_each_get_their_own_neighbours(write: Write) -> None:
    text = "import net, layers.conv\nclass Net: where = net.WHERE, layers.conv.WHERE"
    for folder in ("a", "b"):
        write(f"WHERE = {folder!r}", f"{folder}/net.py")
        write("", f"{folder}/layers/__init__.py")
        write(f"WHERE = {folder!r}", f"{folder}/layers/conv.py")
    first, _ = run_file(write(text, "a/model.py"))
    second, _ = run_file(write(text, "b/model.py"))
    assert (first.Net.where, second.Net.where) == (("a", "a"), ("b", "b"))
    assert (first.__name__, second.__name__) == ("model", "model_2")
    assert pickle.loads(pickle.dumps(first.Net)) is first.Net
    assert pickle.loads(pickle.dumps(second.Net)) is second.Net


def test_a_file_loaded_again_is_run_again_under_the_same_name(write: Write) -> None:
    first, _ = run_file(write("x = 1"))
    second, _ = run_file(write("x = 2"))
    assert (first.__name__, first.x, second.__name__, second.x) == ("model", 1, "model", 2)


@pytest.mark.parametrize(
    ("file", "name"),
    [("torch.py", "torch_2"), ("turtle.py", "turtle_2"), ("my-net.v2.py", "my_net_v2")],
)
def test_a_files_name_never_takes_anothers_place(write: Write, file: str, name: str) -> None:
    module, _ = run_file(write("x = 1", file))
    assert module.__name__ == name
    assert sys.modules["torch"] is torch


def test_the_files_folder_stays_first_on_the_path_for_late_imports(write: Write) -> None:
    write("VALUE = 7", "late.py")
    path = write("def value():\n    import late\n    return late.VALUE")
    module, _ = run_file(path)
    assert sys.path[0] == str(Path(path).parent)
    assert module.value() == 7
    run_file(path)
    assert sys.path.count(str(Path(path).parent)) == 1


def test_a_file_that_fails_leaves_no_half_module(write: Write) -> None:
    failure(run_file, write("x = 1\nraise ValueError('no')"))
    assert "model" not in sys.modules
