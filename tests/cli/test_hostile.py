"""Models that break the process around them, and data that turns against its user: the exit code is
right, there is one line, and it says nothing that a terminal or a CI system would obey."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli.refused_calls import refused
from tests.command import HEAD, INPUTS, MLP, amp, net, process, write

GOOD = net("return self.a(x)")
CUSTOM = "\nclass Stop(BaseException):\n    pass\n"


@pytest.mark.slow
def test_a_model_that_moves_to_another_folder_does_not_take_ours_along(tmp_path: Path) -> None:
    """What it opens itself is looked for where it went."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "one.txt").write_text("1")
    write(tmp_path, "extends = 'default'\n", "mine.toml")
    moves = "import os\nos.chdir('data')\n" + GOOD
    write(
        tmp_path,
        moves + "def eval_batches():\n    open('one.txt')\n    yield example_inputs(), 0\n",
    )
    assert amp(tmp_path, "model.py", "--rules", "mine.toml", "--out", "here").code == 0
    assert (tmp_path / "here" / "report.json").exists()
    assert [entry.name for entry in (tmp_path / "data").iterdir()] == ["one.txt"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (f"{CUSTOM}raise Stop('now')\n", "model.py raised Stop: now (at model.py:4)."),
        (
            CUSTOM + GOOD + "def eval_batches():\n    raise Stop\n",
            "eval_batches() raised Stop (at model.py:21).",
        ),
        (
            "import asyncio\nraise asyncio.CancelledError('\\x1b[2J\\n::error::x')\n",
            "model.py raised CancelledError: [2J (at model.py:2).",
        ),
        (net("import sys; sys.exit(0)"), "called sys.exit(0) (at model.py:10)."),
        (net("raise Stop", CUSTOM), "raised Stop (at model.py:10)."),
    ],
)
def test_what_is_no_exception_is_the_models_error(text: str, said: str, tmp_path: Path) -> None:
    write(tmp_path, text)
    assert said in refused(tmp_path, "model.py")


@pytest.mark.parametrize(
    ("raised", "said"),
    [
        ("SystemExit(0)", "the model's code raised SystemExit: 0. "),
        ("Stop('now')", "the model's code raised Stop: now. "),
    ],
)
def test_even_where_it_is_run_by_a_library(
    raised: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def capture(*_: object, **__: object) -> None:
        names: dict[str, type[BaseException]] = {}
        exec(CUSTOM, names)
        raise eval(raised, names)

    write(tmp_path, GOOD)
    monkeypatch.setattr("amp_convert.prepare.capture", capture)
    assert refused(tmp_path, "model.py").startswith(said)


CLOSING = "import sys, os, warnings\nwarnings.simplefilter('error')\nsys.stdout.close()\n"


@pytest.mark.slow
def test_closed_streams_and_strict_warnings_of_the_users(tmp_path: Path) -> None:
    write(
        tmp_path,
        CLOSING
        + "os.close(1)\nsys.stderr.close()\n"
        + MLP.replace("    torch.manual_seed(0)\n", "    warnings.simplefilter('error')\n"),
    )
    outcome = process(tmp_path, "model.py")
    assert outcome.code == 0, outcome.err
    assert "of 23 checks passed" in outcome.out
    assert "judge ..." in outcome.err


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="the system has no /dev/full")
def test_a_result_that_cannot_be_written(tmp_path: Path) -> None:
    write(tmp_path, MLP)
    command = [sys.executable, "-m", "amp_convert", "audit", "model.py"]
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            command, cwd=tmp_path, stdout=full, stderr=subprocess.PIPE, text=True, check=False,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("error: the disk is full.")
    assert "Traceback" not in done.stderr


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="streams are closed by a POSIX shell")
@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&- >&- 2>&-"])
def test_streams_that_are_closed_from_the_start(closed: str, tmp_path: Path) -> None:
    shell = f'exec "{sys.executable}" -m amp_convert audit none.py {closed}'
    done = subprocess.run(["sh", "-c", shell], cwd=tmp_path, capture_output=True, check=False)
    assert done.returncode == 2
    assert b"Traceback" not in done.stderr


DIGITS = "1" * 5_000


@pytest.mark.parametrize(
    ("table", "said"),
    [
        (f"steps = {DIGITS}", "it holds a number of thousands of digits"),
        (f"steps = {DIGITS[:4000]}", "Give a whole number from 1 to 10**9."),
        (f"tolerance = {DIGITS[:4000]}", "Give a finite number of at least 0."),
        ('out = "a\\u0000b"', r"out is 'a\x00b', which holds a NUL or is not Unicode"),
        ('rules = ["half", "a\\u0000b"]', r"rules is 'a\x00b', which holds a NUL"),
        (f"{'a.' * 20_000}b = 1", "has a key of more than 16 parts"),
        ("x = " + "[" * 100_000, "it is nested too deeply"),
        ('"\\u001b[2J\\n::error::" = 1', r"unknown setting \x1b[2J\n::error::"),
        (f'dtype = "{"x" * 100_000}"', "Give float16 or bfloat16."),
        ("x = 1\nx = 2", "is not valid TOML: Cannot overwrite a value"),
    ],
    ids=range(10),
)
def test_a_hostile_pyproject(table: str, said: str, tmp_path: Path) -> None:
    write(tmp_path, "raise RuntimeError('the model file was run')")
    write(tmp_path, f"[tool.amp-convert]\n{table}\n", "pyproject.toml")
    message = refused(tmp_path, "model.py")
    assert said in message
    assert message.isprintable()
    assert len(message) < 1300


@pytest.mark.parametrize(
    "arguments",
    [
        ["model.py", "--steps", DIGITS],
        ["model.py", "--steps", DIGITS[:4000]],
        ["model.py", "--tolerance", "1e999"],
        ["model.py", "--loss-scale", DIGITS],
        ["model.py", "--out", "a\0b"],
        ["model.py", "--out", "loop"],
        ["model.py", "--out", "loop/below"],
        ["model.py", "--out", "\udcff"],
        ["model.py", "--rules", "loop/x.toml"],
        ["model.py", "--rules", "/dev/zero"],
        ["model.py", "--baseline", "a\0b"],
        ["model.py", "--baseline", "/dev/zero"],
        ["model.py", "--train-metric", "\ud800"],
        ["a\0b.py"],
        ["\udcff.py"],
        ["loop"],
        ["loop/model.py"],
        ["x\x1b[2J.py"],
        ["model.py:\x1b[2J\n::error::"],
        ["audit", "model.py", "--out", "a\0b"],
        ["audit", "model.py", "--out", "loop"],
        ["fp32-seeds", "model.py", "--out", "a\0b"],
        ["fp32-seeds", "model.py", "--out", "x", "--seeds", DIGITS],
        ["gate", "loop", "--baseline", "loop"],
        ["gate", "a\0b", "--baseline", "x"],
    ],
    ids=range(25),
)
def test_hostile_arguments(arguments: list[str], tmp_path: Path) -> None:
    write(tmp_path, "raise RuntimeError('the model file was run')")
    (tmp_path / "loop").symlink_to("loop")
    message = refused(tmp_path, *arguments)
    assert message.isprintable()
    assert "was run" not in message
    assert len(message) < 1300


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            GOOD.replace("super().__init__()", "super().__init__(); self.add_module('\\ud800', "
                         "nn.ReLU())"),
            r"a submodule is called '\ud800' (at model.py).",
        ),
        (
            GOOD.replace("return self.a(x)", "return {'\\ud800': self.a(x)}"),
            r"an output is called '\ud800' (at model.py).",
        ),
        (
            HEAD + "class Net(nn.Linear):\n    pass\n" + INPUTS
            + "\nNet.__qualname__ = '\\ud800'\nmodel = Net(8, 8)\n",
            r"a class is called '\ud800' (at model.py).",
        ),
        (
            MLP.replace('{"score"', '{"\\ud800"'),
            r"a metric is called '\ud800' (at model.py).",
        ),
    ],
)  # fmt: skip
def test_names_that_no_file_could_hold(text: str, said: str, tmp_path: Path) -> None:
    write(tmp_path, text)
    assert said in refused(tmp_path, "model.py")


@pytest.mark.slow
def test_two_runs_into_one_folder(tmp_path: Path) -> None:
    """The second, which the first one starts, is refused; the first one's report is whole."""
    write(
        tmp_path,
        "import subprocess, sys, os\n"
        "done = subprocess.run([sys.executable, '-m', 'amp_convert', 'other.py', '--out', 'r'],"
        " capture_output=True, text=True)\n"
        "open('said', 'w').write(f'{done.returncode} {done.stderr}')\n" + MLP,
    )
    write(tmp_path, "raise RuntimeError('the model file was run')", "other.py")
    outcome = amp(tmp_path, "model.py", "--out", "r")
    assert outcome.code == 0
    said = (tmp_path / "said").read_text()
    assert re.match(
        r"2 error: another run of amp-convert is at work on the report folder r\.", said
    )
    assert {entry.name for entry in tmp_path.iterdir()} == {"model.py", "other.py", "said", "r"}
    assert len(list((tmp_path / "r").iterdir())) == 6
