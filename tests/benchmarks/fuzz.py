"""`make fuzz`: inputs of the six kinds, made wrong, and whether each is read or refused.

A case is a valid file with a mutation (see `mutations`), and goes to the functions that the
command gives it to. The right ends are a result and an `AmpConvertError`, whose text has to be one
printable line. A fault is anything else: another exception, more than `SECONDS` of CPU time, or a
file that was written, changed or deleted beside the input.

`python -m tests.benchmarks.fuzz [--count N] [--kind KIND] [--seed N]` tries N cases of each kind.
Case i of a kind and a seed is always the same.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import os
import random
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from amp_convert.core.errors import AmpConvertError
from tests.benchmarks.fuzz_kinds import KINDS, MAY_CHANGE

COUNT, SECONDS = 2_000, 2.0
LONGEST = 1_100
"""Characters of a refusal."""


@dataclass(frozen=True)
class Case:
    """One that was tried; `fault` says what went wrong, and is empty where nothing did."""

    kind: str
    index: int
    refusal: str
    seconds: float
    fault: str


class Hang(BaseException):
    """Raised in a case that does not end."""


def tried(kind: str, index: int, seed: int, root: Path) -> Case:
    """Try one case in `root`, an empty folder, and leave it empty."""
    make, read = KINDS[kind]
    luck = random.Random(f"{seed} {kind} {index}")
    folder = root / "at" / "input"
    folder.mkdir(parents=True)
    (folder / "loop").symlink_to("loop")
    (root / "treasure").write_text("years of work")
    make(folder, luck)
    kept = [folder / name for name in MAY_CHANGE.get(kind, ())]
    before, begin, refusal, fault = _seen(root, kept), time.process_time(), "", ""
    try:
        with _no_longer_than(3 * SECONDS), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            read(folder)
    except AmpConvertError as error:
        refusal = str(error)
        fault = _unreadable(refusal)
    except (Exception, Hang) as error:  # noqa: BLE001  whatever else it is, it is a fault
        place = traceback.extract_tb(error.__traceback__)[-1]
        said = str(error)[:200]
        fault = f"{type(error).__name__}: {said!r} at {place.filename}:{place.lineno}"
    seconds = time.process_time() - begin
    if seconds > SECONDS and not fault:
        fault = f"it took {seconds:.1f} s"
    if changes := before ^ _seen(root, kept):
        fault = fault or f"it changed {sorted(str(path) for path, *_ in changes)[:3]}"
    _emptied(root)
    return Case(kind, index, refusal, seconds, fault)


def _unreadable(refusal: str) -> str:
    if not refusal.isprintable():
        return f"the refusal cannot be printed: {refusal[:200]!r}"
    if refusal.startswith("::") or len(refusal) > LONGEST:
        return f"the refusal has {len(refusal)} characters: {refusal[:200]!r}"
    return ""


@contextlib.contextmanager
def _no_longer_than(seconds: float) -> Iterator[None]:
    def stop(*_: object) -> None:
        raise Hang

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def _seen(root: Path, left_out: list[Path]) -> set[tuple[Path, int, int, int]]:
    """What is in a folder, without what a case may change."""
    found = set()
    for place, folders, files in os.walk(root):
        folders[:] = [name for name in folders if Path(place, name) not in left_out]
        for name in (*folders, *files):
            path = Path(place, name)
            stat = path.lstat()
            if path not in left_out:
                folder = path.is_dir()  # whose times change with each file that comes and goes
                found.add(
                    (path, stat.st_mode, *((0, 0) if folder else (stat.st_size, stat.st_mtime_ns)))
                )
    return found


def _emptied(root: Path) -> None:
    for place, folders, files in os.walk(root, topdown=False):
        for name in files:
            Path(place, name).unlink()
        for name in folders:
            path = Path(place, name)
            path.unlink() if path.is_symlink() else path.rmdir()


def fuzz(kind: str, count: int, seed: int = 0) -> list[Case]:
    """Try `count` cases of a kind; the first of them twice, since what it imports takes time. What
    this process holds already is no garbage to look for: a suite's millions of objects would take
    the seconds that a case is allowed."""
    with tempfile.TemporaryDirectory() as place:
        tried(kind, 0, seed, Path(place))
        gc.freeze()
        try:
            return [tried(kind, index, seed, Path(place)) for index in range(count)]
        finally:
            gc.unfreeze()


def main() -> int:
    """Print what became of each kind; 1 where there was a fault."""
    parser = argparse.ArgumentParser(description="Feed mutated inputs to the readers.")
    parser.add_argument("--count", type=int, default=COUNT)
    parser.add_argument("--kind", choices=KINDS)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    faults: list[Case] = []
    print(f"{'kind':11} {'tried':>6} {'read':>6} {'refused':>8} {'faults':>7}  slowest, CPU s")
    for kind in [given.kind] if given.kind else KINDS:
        found = fuzz(kind, given.count, given.seed)
        bad = [case for case in found if case.fault]
        refused = sum(bool(case.refusal) for case in found)
        read, slowest = len(found) - refused - len(bad), max(case.seconds for case in found)
        print(
            f"{kind:11} {len(found):6} {read:6} {refused:8} {len(bad):7}  {slowest:.2f}", flush=True
        )
        faults += bad
    for case in faults[:40]:
        print(f"  {case.kind} {case.index}: {case.fault}")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
