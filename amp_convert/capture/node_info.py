"""Where a captured node comes from: its operator, its layer, and the user's file and line."""

from __future__ import annotations

import os
import re
import site
import sysconfig
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import fx

import amp_convert
from amp_convert.capture.export_repairs import AUTOCAST_OFF, GOES_LOW
from amp_convert.core.op_facts import op_name, short_name


@dataclass(frozen=True)
class NodeInfo:
    """What is known of a node by name.

    `identity` is `layer/op#ordinal`: it survives recapture, which FX names do not. `modules` are
    the class paths around the node, innermost first; `location` is the user's file and line.
    `autocast_off` is whether the model's own code has switched autocast off there; `goes_low` says
    of a cast to the dtype of another tensor where that is a low one: `all_low` and `autocast`.
    """

    identity: str
    layer: str
    modules: tuple[str, ...]
    op: str
    location: str
    autocast_off: bool = False
    goes_low: frozenset[str] = frozenset()

    @property
    def short_op(self) -> str:
        """The operator without its overload: `aten.linear`."""
        return short_name(self.op)


def describe(graph: fx.Graph, path: str) -> dict[str, NodeInfo]:
    """What is known of each operator, by FX name; `path` is the module's place in the model."""
    ordinals: Counter[tuple[str, str]] = Counter()
    described = {}
    for node in graph.nodes:
        if node.op != "call_function":
            continue
        inner, modules = _modules(node)
        layer = ".".join(part for part in (path, inner) if part)
        op = op_name(node.target)
        short = short_name(op)
        ordinal = ordinals[layer, short]
        ordinals[layer, short] += 1
        identity = f"{layer}/{short}#{ordinal}"
        custom = node.meta.get("custom", {})
        described[node.name] = NodeInfo(
            identity, layer, modules, op, user_location(node),
            AUTOCAST_OFF in custom, custom.get(GOES_LOW, frozenset()),
        )  # fmt: skip
    return described


# What export writes where it made a node without a module around it, such as an input's size.
_NO_STACK = "_empty_nn_module_stack_from_metadata_hook"


def _modules(node: fx.Node) -> tuple[str, tuple[str, ...]]:
    """The module path of a node and the classes around it, innermost first."""
    stack = node.meta.get("nn_module_stack") or {}
    stack = {key: entry for key, entry in stack.items() if key != _NO_STACK}
    entries = [(name, cls if isinstance(cls, str) else class_path(cls))
               for name, cls in stack.values()]  # fmt: skip
    if not entries:
        return "", ()
    # A module that is called again gets a suffix such as "@1"; it is the same layer.
    return re.sub(r"@\d+", "", entries[-1][0]), tuple(cls for _, cls in reversed(entries))


def class_path(cls: type) -> str:
    """A class by its full name."""
    return f"{cls.__module__}.{cls.__qualname__}"


_LIBRARY = tuple(os.path.dirname(f) + os.sep for f in (torch.__file__, amp_convert.__file__))
_PYTHON = sysconfig.get_path("stdlib") + os.sep
_PACKAGES = sorted(
    {*site.getsitepackages(), site.getusersitepackages(), sysconfig.get_path("purelib")},
    key=len,
    reverse=True,
)


def user_location(node: fx.Node) -> str:
    """`file:line` of the innermost frame of the node's stack trace that is not PyTorch's own."""
    frame = user_frame(node.meta.get("stack_trace") or "")
    return f"{short_path(frame[0])}:{frame[1]}" if frame else ""


def user_frame(stack_trace: str) -> tuple[str, int] | None:
    """File and line of the innermost frame that is not PyTorch's own."""
    for file, line in reversed(re.findall(r'File "([^"]+)", line (\d+)', stack_trace)):
        if not is_library_frame(file):
            return file, int(line)
    return None


def is_library_frame(file: str) -> bool:
    """Whether a stack frame is of PyTorch, Python or ours, and so not what a user wants to read."""
    python = file.startswith(_PYTHON) and not file.startswith(tuple(_PACKAGES))
    return python or file.startswith((*_LIBRARY, "torch/", "<"))


def short_path(file: str) -> str:
    """A path without the part that only says where things are installed on this machine."""
    for root in (*_PACKAGES, os.getcwd()):
        if Path(file).is_relative_to(root):
            return str(Path(file).relative_to(root))
    return file
