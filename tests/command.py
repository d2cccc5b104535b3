"""The command in this process, and small model files to give it.

`amp` runs `amp_convert.cli.run` as the console script does, in a folder of the test's own, and
leaves the interpreter as it was, so that each call loads its model file anew.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

from amp_convert.cli.main import run
from amp_convert.loading import user_code as usercode

HEAD = "import torch\nfrom torch import nn\n"
INPUTS = "\ndef example_inputs():\n    return torch.linspace(0.5, 1.5, 32).reshape(4, 8)\n"

# Two linear layers that are seen through metrics: nodes 0/aten.linear#0, 1/aten.relu#0 and
# 2/aten.linear#0. What the tests change in it has a name.
MLP = (
    HEAD
    + """
OFFSET = 0.0  # added to the inputs; the weights of each row sum to zero, so it cancels
SCORE = 1.0   # what the metric gives for outputs that are not all zero

def build_model():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    with torch.no_grad():
        model[0].weight -= model[0].weight.mean(dim=1, keepdim=True)
    return model

def batch(seed):
    return torch.randn(4, 8, generator=torch.Generator().manual_seed(seed)) + OFFSET

def example_inputs():
    return batch(0)

def eval_batches():
    for seed in range(3):
        yield batch(seed), None

def metrics(outputs, target):
    return {"score": SCORE if outputs.any() else 0.0}
"""
)

# A classifier with all that training takes; the line numbers of its functions are in messages.
TRAINED = (
    HEAD
    + """from torch.nn import functional as F

def build_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))

def batch(seed):
    inputs = torch.randn(16, 8, generator=torch.Generator().manual_seed(seed))
    return inputs, inputs[:, :4].argmax(1)

def example_inputs():
    return batch(0)[0]

def eval_batches():
    yield batch(1)

def metrics(outputs, target):
    return {"accuracy": (outputs.argmax(1) == target).float().mean()}

def train_batches(seed):
    for step in range(6):
        yield batch(100 * seed + step + 2)

def loss(outputs, target):
    return F.cross_entropy(outputs, target)

def optimizer(parameters):
    return torch.optim.SGD(parameters, lr=0.1)
"""
)

CNN = (
    HEAD
    + """
model = nn.Sequential(
    nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(144, 3)
)
example_inputs = torch.randn(2, 1, 8, 8)
"""
)


def net(forward: str, *extra: str) -> str:
    """A model file whose forward(x), with a layer `self.a` from 8 to 8 features, is `forward`."""
    body = f"""
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(8, 8)

    def forward(self, x):
        {forward}

def build_model():
    return Net()
"""
    return HEAD + body + INPUTS + "".join(extra)


OVERFLOWING = net("return self.a(x) * 1e6")
BRANCH = "if self.a(x).sum() > 0:\n            return self.a(x)\n        return x"


@dataclass(frozen=True)
class Outcome:
    """Exit code, stdout and stderr of one call."""

    code: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """The one line that says what was wrong; all others on stderr are progress."""
        *progress, last = self.err.splitlines()
        assert all(line.endswith(" ...") for line in progress), self.err
        assert last.startswith("error: "), self.err
        assert self.out == ""
        return last.removeprefix("error: ")

    @property
    def json(self) -> Any:
        """All of stdout as one strict JSON document."""
        return json.loads(self.out, parse_constant=_refuse)


def amp(folder: Path, *arguments: str) -> Outcome:
    """Run the command in `folder`, on a screen of 80 columns that is no terminal."""
    out, err = io.StringIO(), io.StringIO()
    path = list(sys.path)
    environment = {
        k: v for k, v in os.environ.items() if k not in ("FORCE_COLOR", "TTY_COMPATIBLE")
    }
    with (
        contextlib.chdir(folder),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        mock.patch.dict(os.environ, environment | {"COLUMNS": "80"}, clear=True),
        mock.patch.object(usercode, "_names", {}),
    ):
        try:
            code = run(arguments)
        finally:
            sys.path[:] = path
            for name, module in list(sys.modules.items()):
                if (getattr(module, "__file__", None) or "").startswith(str(folder)):
                    del sys.modules[name]
    return Outcome(code, out.getvalue(), err.getvalue())


def process(folder: Path, *arguments: str, **environment: str) -> Outcome:
    """Run the command as a process of its own."""
    command = [sys.executable, "-c", "from amp_convert.cli.main import main; main()", *arguments]
    done = subprocess.run(
        command,
        cwd=folder,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    return Outcome(done.returncode, done.stdout, done.stderr)


def write(folder: Path, text: str, name: str = "model.py") -> None:
    """Put a file with this text into `folder`."""
    (folder / name).write_text(text, encoding="utf-8")


def _refuse(token: str) -> None:
    raise AssertionError(f"{token} is not JSON")
