"""`make kill`: the command, killed at random moments, and whether anything is lost or left over.

A small model is converted and trained into one folder, with a checkpoint at each step: once to its
end, then killed (SIGKILL) as often as asked for, then to its end again. After each kill the report
has to be the whole old one or a whole new one, and no more may lie about than one run leaves. At
the end nothing may, and the numbers of training have to be those of the run that nobody disturbed,
bit for bit.

`python -m tests.benchmarks.kill [--count N] [--seed N]`
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ET
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.command import TRAINED

COUNT = 100
FILES = {"report.json", "layers.csv", "plan.toml", "report.md", "report.html", "junit.xml"}
FLAGS = "--device cpu --out r --checkpoint kept --checkpoint-every 1 --steps 6 --calibrate 1"
START = "start"
STAGES = {
    START: 1,
    "load the model": 1,
    "capture and check against eager FP32": 1,
    "compare with FP32": 1,
    "train beside FP32": 5,
    "judge": 4,
}
"""The stages after whose beginning a run is killed, and how often in how many: mostly while it
writes a checkpoint at every step, or its report."""
LEFT_BY_ONE = 3
"""Hidden folders that one killed run leaves at most: its work, a report, and a file of the
checkpoint's."""


@dataclass
class Outcome:
    """What became of the kills. `ended` counts runs by where they were: "training", say; `faults`
    say what was lost or left over."""

    ended: Counter[str] = field(default_factory=Counter)
    resumed: int = 0
    faults: list[str] = field(default_factory=list)


def kill(count: int, seed: int, folder: Path) -> Outcome:
    """Kill `count` runs in `folder`, an empty one."""
    luck, outcome = random.Random(seed), Outcome()
    (folder / "model.py").write_text(TRAINED)
    begin = time.monotonic()
    code, said = _finished(_started(folder))
    took, whole = time.monotonic() - begin, _report(folder)
    if code != 0 or not isinstance(whole, dict):
        outcome.faults.append(f"the first run ended with {code}: {said[-300:]}")
        return outcome
    for number in range(count):
        stage = luck.choices(list(STAGES), list(STAGES.values()))[0]
        stage, said = _killed(folder, stage, luck.uniform(0, 0.15 * took))
        outcome.ended[stage] += 1
        outcome.resumed += "going on after step" in said
        _check(outcome, number, whole, _report(folder))
        left = [name for name in _entries(folder) if name.startswith(".")]
        if len(left) > LEFT_BY_ONE:
            outcome.faults.append(f"kill {number}: {len(left)} hidden folders: {left}")
    code, said = _finished(_started(folder))
    outcome.resumed += "going on after step" in said
    _check(outcome, count, whole, _report(folder))
    if code != 0:
        outcome.faults.append(f"the last run ended with {code}: {said[-300:]}")
    if left := sorted({*_entries(folder)} - {"model.py", "r"}):
        outcome.faults.append(f"left over: {left}")
    return outcome


def _started(folder: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "amp_convert", "model.py", *FLAGS.split()],
        cwd=folder,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def _finished(run: subprocess.Popen[str]) -> tuple[int, str]:
    with run:
        said = run.communicate()[1]
    return run.returncode, said


def _killed(folder: Path, wanted: str, after: float) -> tuple[str, str]:
    """A run that is killed so many seconds after the stage `wanted` has begun, or from its start:
    the stage that it was in then, and what it said."""
    with _started(folder) as run:
        assert run.stderr is not None
        said = ""
        while wanted != START and not said.endswith(f"{wanted} ...\n"):
            line = run.stderr.readline()
            if not line:
                break
            said += line
        try:
            run.wait(after)
        except subprocess.TimeoutExpired:
            run.send_signal(signal.SIGKILL)
        said += run.stderr.read()
    if run.returncode == 0:
        return "at its end", said
    stages = [line.removesuffix(" ...") for line in said.splitlines() if line.endswith(" ...")]
    return (stages or [START])[-1], said


def _report(folder: Path) -> dict[str, Any] | str:
    """What training gave, times and memory left out; a text where the report is not whole."""
    out = folder / "r"
    try:
        names = {path.name for path in out.iterdir()}
        report = json.loads((out / "report.json").read_bytes())
        suite = ET.parse(out / "junit.xml").getroot()[0]
    except (OSError, ValueError, ET.ParseError) as error:
        return f"{type(error).__name__}: {error}"
    if names != FILES or suite.get("timestamp") != report["created"]:
        return f"files of {suite.get('timestamp')} and {report['created']}: {sorted(names)}"
    arms = report["training"]["run"]["arms"]
    return {"arms": [{**arm, "milliseconds": None, "peak_bytes": None} for arm in arms]}


def _check(outcome: Outcome, number: int, whole: dict[str, Any], found: Any) -> None:
    if isinstance(found, str):
        outcome.faults.append(f"after kill {number} the report is not whole: {found}")
    elif json.dumps(found) != json.dumps(whole):  # as text, since a NaN is not itself
        outcome.faults.append(f"after kill {number} training has other numbers")


def _entries(folder: Path) -> list[str]:
    """The entries of a folder, and the hidden ones of the checkpoint in it."""
    kept = folder / "kept"
    inner = (
        [path.name for path in kept.iterdir() if path.name.startswith(".")] if kept.is_dir() else []
    )
    return [*(path.name for path in folder.iterdir()), *inner]


def main() -> int:
    """Print where the runs were killed; 1 where something was lost or left over."""
    parser = argparse.ArgumentParser(description="Kill the command at random moments.")
    parser.add_argument("--count", type=int, default=COUNT)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as place:
        outcome = kill(given.count, given.seed, Path(place))
    for stage, times in outcome.ended.most_common():
        print(f"{times:5}  {stage}")
    took = time.monotonic() - begin
    print(
        f"{given.count} runs killed in {took:.0f} s, {outcome.resumed} of the next went on from a "
        f"checkpoint, {len(outcome.faults)} faults"
    )
    for fault in outcome.faults[:40]:
        print(f"  {fault}")
    return 1 if outcome.faults else 0


if __name__ == "__main__":
    sys.exit(main())
