"""Checkpoints on full disks, and killed while they are written."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from amp_convert.core.errors import UsageError
from amp_convert.validate.training import checkpoint
from tests.validate.training.checkpoint_states import a_state, assert_same

MINE = {"model": "abc", "steps": 50, "clip_norm": None, "scale": 0.1}


@pytest.mark.parametrize("call", ["save_file", "write_file"])
def test_a_full_disk_leaves_the_old_state(
    call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint.save(tmp_path, a_state(0), fingerprint=MINE)
    before = sorted(tmp_path.iterdir())

    def full(*arguments: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(checkpoint, call, full)
    with pytest.raises(UsageError) as refused:
        checkpoint.save(tmp_path, a_state(1), fingerprint=MINE)
    assert str(refused.value) == (
        f"the checkpoint {tmp_path} cannot be written: No space left on device. "
        "Make room, or give another folder."
    )
    assert sorted(tmp_path.iterdir()) == before
    assert_same(a_state(0), checkpoint.load(tmp_path, MINE))


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="a file size limit is POSIX")
def test_a_disk_that_is_really_full(tmp_path: Path) -> None:
    """The operating system refuses to write, as far as this process can see, at 64 KiB."""
    code = f"""
import resource, signal, torch
from pathlib import Path
from amp_convert.validate.training import checkpoint
from amp_convert.core.errors import UsageError
folder = Path({str(tmp_path)!r})
checkpoint.save(folder, {{"a": torch.ones(10)}}, fingerprint={{}})
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (65536, 65536))
try:
    checkpoint.save(folder, {{"a": torch.ones(100_000)}}, fingerprint={{}})
except UsageError as error:
    print(error)
found = checkpoint.load(folder, {{}})
print(found["a"].sum().item(), len(list(folder.iterdir())))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    said, kept = done.stdout.splitlines()
    assert said.startswith(f"the checkpoint {tmp_path} cannot be written: ")
    assert said.endswith(" Make room, or give another folder.")
    assert kept == "10.0 2"


WRITER = """
import sys, torch
from pathlib import Path
from amp_convert.validate.training import checkpoint
folder = Path(sys.argv[1])
print("ready", flush=True)
for seed in range(10**9):
    state = {"seed": seed, "tensor": torch.full((40_000,), float(seed))}
    checkpoint.save(folder, state, fingerprint={})
"""


@pytest.mark.slow
def test_killed_at_any_moment(tmp_path: Path) -> None:
    """SIGKILL at six moments: there is always one whole state, and it never goes back."""
    last = -1
    for turn in range(6):
        with subprocess.Popen(
            [sys.executable, "-c", WRITER, str(tmp_path)], stdout=subprocess.PIPE
        ) as writer:
            assert writer.stdout is not None
            writer.stdout.readline()
            time.sleep(0.05 + 0.021 * turn)
            writer.send_signal(signal.SIGKILL)
        state = checkpoint.load(tmp_path, {})
        assert state is not None
        assert (state["tensor"] == float(state["seed"])).all()
        checkpoint.check(tmp_path)  # what the killed run left is ours, and no reason to refuse
        last = max(last, state["seed"])
    assert last > 0
    checkpoint.save(tmp_path, {}, fingerprint={})
    assert len(list(tmp_path.iterdir())) == 2
