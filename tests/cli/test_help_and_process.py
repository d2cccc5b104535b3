"""What the command says of itself, and how its process ends."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from amp_convert import __version__
from amp_convert.loading.settings import SETTINGS
from tests.cli.finished_run import STAGES
from tests.command import (
    BRANCH,
    Outcome,
    amp,
    net,
    process,
    write,
)


def test_help_lists_commands_and_exit_codes(tmp_path: Path) -> None:
    outcome = amp(tmp_path, "--help")
    assert outcome.code == 0
    text = " ".join(outcome.out.split())
    assert "convert Convert MODEL, compare it with FP32, and give a verdict. fp32-seeds" in text
    assert "fp32-seeds Measure FP32's spread over seeds: the margin for --seeds. audit" in text
    assert "0 pass, 1 parity or gate failed, 2 wrong usage or input, 3 inconclusive, 4" in text
    assert max(map(len, outcome.out.splitlines())) <= 80


def test_the_flags_of_the_contract_and_their_defaults(tmp_path: Path) -> None:
    text = " ".join(amp(tmp_path, "convert", "--help").out.split())
    for words in (
        "--dtype float16|bfloat16 The low precision. [default: float16]",
        "--rules NAME|FILE ...",
        "--device auto|cpu|cuda",
        "[default: auto]",
        "--out DIR The report's folder. [default: reports/<MODEL's stem>]",
        "--train / --no-train",
        "--steps N Training steps. [default: as many as there are batches for, up to 50]",
        "--seeds N",
        "--onnx",
        "--baseline FILE",
        "--json",
        "--debug",
        *(f"--{name.replace('_', '-')} " for name in SETTINGS),
    ):
        assert words in text


def test_without_arguments_the_help_is_shown_and_it_is_a_mistake(tmp_path: Path) -> None:
    outcome = amp(tmp_path)
    assert (outcome.code, outcome.out) == (2, amp(tmp_path, "--help").out)


def test_the_version(tmp_path: Path) -> None:
    assert amp(tmp_path, "--version") == Outcome(0, f"amp-convert {__version__}\n", "")


def test_help_does_not_import_torch(tmp_path: Path) -> None:
    code = (
        "import sys; from amp_convert.cli.main import run\n"
        "commands = ([], ['convert'], ['fp32-seeds'], ['gate'], ['tune'], ['explain'])\n"
        "assert not any(run([*c, '--help']) for c in commands)\n"
        "assert (run(['--version']), run(['--jsn']), run(['x.py', '--steps', '0'])) == (0, 2, 2)\n"
        "assert run(['x.py', '--seeds', '5']) == 2  # a margin is missing\n"
        "found = {'torch', 'numpy', 'pandas'} & set(sys.modules)\n"
        "sys.exit(f'imported {found}' if found else 0)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_a_process_keeps_stdout_for_the_result(tmp_path: Path) -> None:
    noisy = "import os, sys\nos.system('echo from a child')\nos.write(1, b'from C\\n')\n"
    write(tmp_path, noisy + net("return self.a(x)"))
    outcome = process(tmp_path, "model.py", "--json")
    assert (outcome.code, outcome.json["verdict"]["status"]) == (0, "pass")
    assert "from a child\n" in outcome.err
    assert "from C\n" in outcome.err
    assert [line for line in outcome.err.splitlines() if line in STAGES] == STAGES


@pytest.mark.slow
def test_a_process_exits_with_the_verdict_and_quietly(tmp_path: Path) -> None:
    # torch.export logs about control flow that it cannot trace; that is not for the user.
    write(tmp_path, net(BRANCH), "modèle.py")
    outcome = process(tmp_path, "modèle.py", PYTHONIOENCODING="ascii")
    assert outcome.code == 0
    assert outcome.out.startswith(" PASS   mod?le  float16 on cpu\n")
    assert outcome.err.splitlines() == STAGES


@pytest.mark.parametrize(
    "code",
    [
        "cli.main(['--help'])",
        # A result that is small enough to stay in the buffer until the end.
        "cli.run = lambda _: print('result') or 0; cli.main([])",
    ],
)
def test_a_reader_that_goes_away_is_no_fault(code: str) -> None:
    command = [sys.executable, "-c", f"from amp_convert.cli import main as cli; {code}"]
    read, written = os.pipe()
    os.close(read)
    done = subprocess.run(command, stdout=written, stderr=subprocess.PIPE, text=True, check=False)
    os.close(written)
    assert (done.returncode, done.stderr) == (141, "")
