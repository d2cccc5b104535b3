"""The digest of all that a capture depends on: the same for the same, another for any other."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
import threading
import types
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from amp_convert.capture.kept.fingerprint import of_call
from amp_convert.capture.kept.origins import NoFingerprintError
from tests.zoo import BUILDERS, build


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.norm = nn.Linear(4, 4), nn.BatchNorm1d(4)
        self.function: Callable[..., Any] = torch.relu
        self.config = SimpleNamespace(names={"b", "a", "c"}, eps=1e-5, sizes=[1, 2])
        self.table = torch.arange(4.0)


def digest(model: nn.Module, x: Any = None) -> str:
    return of_call(model, ((torch.ones(2, 4) if x is None else x,), {}), "eval")


def times(factor: float) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda x: x * factor


def local_class(factor: float) -> nn.Module:
    class Local(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) * factor if False else x * factor  # type: ignore[misc]

    return Local()


class Set(nn.Module):
    """What is set on a class of the user's."""

    factor = 2.0


class Slotted(nn.Module):
    __slots__ = ("factor",)


class Hiding:
    def __init__(self, secret: float) -> None:
        self.secret = secret

    def __getstate__(self) -> dict[str, Any]:
        return {}


def made_with(factor: float) -> Callable[..., Any]:
    @functools.wraps(torch.relu)
    def made(x: torch.Tensor, by: float = factor) -> torch.Tensor:
        return x * by

    return made


def set_on_a_class(factor: float) -> Callable[[Any], Any]:
    def change(net: Any) -> None:
        Set.factor = factor
        net.set = Set()

    return change


def in_a_slot(factor: float) -> Callable[[Any], Any]:
    def change(net: Any) -> None:
        net.slotted = Slotted()
        net.slotted.factor = factor

    return change


def of_no_module(factor: float) -> Callable[..., Any]:
    """A function of a file that was run and not imported, and a global that it reads."""
    names: dict[str, Any] = {"__name__": "nowhere", "factor": [factor]}
    exec("def scaled(x):\n    return x * factor[0]", names)
    found: Callable[..., Any] = names["scaled"]
    return found


def as_method(factor: float) -> Callable[[Any], Any]:
    return lambda net: setattr(net, "forward", types.MethodType(made_with(factor), net))


def tied(net: Any) -> None:
    net.twin = nn.Linear(4, 4)
    net.twin.weight = nn.Parameter(net.layer.weight.detach().clone())
    net.twin.bias = nn.Parameter(net.layer.bias.detach().clone())


def really_tied(net: Any) -> None:
    tied(net)
    net.twin.weight = net.layer.weight


CHANGES: dict[str, Callable[[Any], Any]] = {
    "nothing": lambda net: None,
    "a weight": lambda net: net.layer.weight.data[0].add_(1e-6),
    "a buffer": lambda net: net.norm.running_mean.add_(1),
    "a table": lambda net: net.table.add_(1),
    "a number": lambda net: setattr(net.config, "eps", 1e-6),
    "a list": lambda net: net.config.sizes.append(3),
    "a set": lambda net: net.config.names.add("d"),
    "the mode of a part": lambda net: net.norm.eval(),
    "what is trained": lambda net: net.layer.weight.requires_grad_(False),
    "a function": lambda net: setattr(net, "function", torch.tanh),
    "a lambda": lambda net: setattr(net, "function", times(2.0)),
    "another lambda": lambda net: setattr(net, "function", times(3.0)),
    "a hook": lambda net: net.layer.register_forward_hook(lambda *_: None),
    "a part": lambda net: setattr(net, "norm", nn.LayerNorm(4)),
    "a class": lambda net: setattr(net, "more", local_class(2.0)),
    "another class": lambda net: setattr(net, "more", local_class(3.0)),
    "a class attribute": set_on_a_class(2.0),
    "another class attribute": set_on_a_class(3.0),
    "a slot": in_a_slot(2.0),
    "another slot": in_a_slot(3.0),
    "a hidden state": lambda net: setattr(net, "hiding", Hiding(2.0)),
    "another hidden state": lambda net: setattr(net, "hiding", Hiding(3.0)),
    "a default": lambda net: setattr(net, "function", made_with(2.0)),
    "another default": lambda net: setattr(net, "function", made_with(3.0)),
    "a method": as_method(2.0),
    "another method": as_method(3.0),
    "a global": lambda net: setattr(net, "function", of_no_module(2.0)),
    "another global": lambda net: setattr(net, "function", of_no_module(3.0)),
    "a tensor's attribute": lambda net: setattr(net.layer.weight, "scale", 2.0),
    "another tensor's attribute": lambda net: setattr(net.layer.weight, "scale", 3.0),
    "a name": lambda net: setattr(net, "other", net.__dict__["_modules"].pop("norm")),
    "equal weights": tied,
    "one weight": really_tied,
}


def changed(name: str) -> str:
    net = Net()
    CHANGES[name](net)
    return digest(net)


def test_each_change_has_a_digest_of_its_own_and_the_same_each_time() -> None:
    found = {name: changed(name) for name in CHANGES}
    assert len(set(found.values())) == len(CHANGES)
    assert found == {name: changed(name) for name in CHANGES}


@pytest.mark.parametrize(
    "other",
    [torch.ones(2, 4) + 1, torch.ones(3, 4), torch.ones(2, 4).double(), torch.ones(4, 2).t(),
     torch.ones(2, 4, requires_grad=True), [torch.ones(2, 4)]],
)  # fmt: skip
def test_other_inputs_are_another_call(other: Any) -> None:
    assert digest(Net(), other) != digest(Net())


def test_what_is_set_in_pytorch_counts() -> None:
    want = digest(Net())
    with torch.no_grad():
        assert digest(Net()) != want
    assert digest(Net()) == want


@pytest.mark.parametrize("attribute", [threading.Lock(), (i for i in [1])])
def test_what_cannot_be_seen_through_has_none(attribute: Any) -> None:
    net: Any = Net()
    net.secret = attribute
    with pytest.raises(NoFingerprintError):
        digest(net)


@pytest.mark.parametrize("name", sorted(BUILDERS))
def test_a_model_that_is_built_again_has_the_same(name: str) -> None:
    one, two = (
        of_call(model, (args, kwargs)) for model, args, kwargs in (build(name), build(name))
    )
    assert one == two


PROGRAM = """
from amp_convert.capture.kept.fingerprint import of_call, of_code
import torch, helper
def main():
    torch.manual_seed(0)
    print(of_code(), of_call(helper.Net(), ((torch.ones(2),), {})))
main()
"""
HELPER = """
import os, torch
SCALE = {{"of": [torch.tensor(float(os.environ["SCALE"]))]}}
unread = os.urandom(8)
class Net(torch.nn.Module):
    names = {{"a", "b", "c"}}
    def __init__(self):
        super().__init__()
        self.names = {{"a", "b", "c", "d"}}
    def forward(self, x):
        return x * SCALE["of"][0] + {code}
"""


@pytest.mark.slow
def test_other_processes_have_the_same_until_the_code_changes(tmp_path: Path) -> None:
    """Hashes of text differ from process to process, and with them the order of sets."""
    (tmp_path / "program.py").write_text(PROGRAM)

    def run(scale: str, code: str = "1") -> str:
        (tmp_path / "helper.py").write_text(HELPER.format(code=code))
        done = subprocess.run(
            [sys.executable, "program.py"], cwd=tmp_path, env={**os.environ, "SCALE": scale},
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        return done.stdout

    want = run("2")
    assert run("2") == want
    assert run("3") != want
    assert run("2", "2") != want
