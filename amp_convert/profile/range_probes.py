"""How large do values become on inputs unlike those of calibration?

A range that was seen says little of data that nobody gave: an image that was not normalised, a
sensor that fails. The model itself knows the answer. A normalisation bounds what comes after it, a
chain of products does not, and no head room on measured values can tell the two apart. So the FP32
graph runs twice more, on the inputs of the first batch `LARGER` times larger, and with a few values
of `SPIKE` in each, and the largest finite values are kept. What is not finite in FP32 asks nothing
of FP16. Inputs that hold nothing but zeros and ones are left as they are: they are masks and flags.

Only floating point inputs are changed. A model of token ids costs nothing here.

Such inputs may lead where the model cannot go: to an index out of bounds, a matrix that has no
factor. Then a probe ends there, and what it saw until then counts. On a GPU an index out of bounds
would end the whole process, so there a probe stops before anything that could ask for one.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from amp_convert.capture.branches.choices import OneBranch
from amp_convert.capture.captured import Captured, Region
from amp_convert.capture.node_info import NodeInfo
from amp_convert.core.errors import first_line
from amp_convert.core.mode import Mode
from amp_convert.core.module_state import Attributes
from amp_convert.core.number_formats import is_float_tensor
from amp_convert.core.op_facts import Family, facts_of_target

LARGER = 100.0
SPIKE = 1e4

_log = logging.getLogger(__name__)
Extremes = dict[str, tuple[float, float]]
"""The largest finite magnitude and the largest finite value, by node identity or input."""


def probed_extremes(captured: Captured, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Extremes:
    """The largest finite values of each node and input on the probes made of one call."""
    found: Extremes = {}
    if not any(map(_may_grow, pytree.tree_leaves((args, kwargs)))):
        return found
    on_gpu = captured.device.type != "cpu"
    if on_gpu and not captured.is_whole:
        return found  # the eager parts would run unwatched
    attributes = Attributes(captured.model)
    for change in (_larger, _with_spikes):
        changed = pytree.tree_map(lambda v, c=change: c(v) if _may_grow(v) else v, (args, kwargs))
        try:
            for region, (a, k) in captured.calls(*changed):
                runner = region.runner(Mode.EVAL)
                inputs = runner.inputs(a, k)
                for given, value in runner.signature.users(inputs):
                    _record(found, region.input_key(given.path), value)
                probe = _Probe(region, runner.graph_module, found, careful=on_gpu)
                probe.run(*inputs, enable_io_processing=False)
        except Exception as error:  # noqa: BLE001  on such inputs any code may raise anything
            _log.debug("a probe of ranges ended early: %s", first_line(error))
        finally:
            attributes.restore()
    return found


class _OutOfBoundsError(Exception):
    """What comes next could end the process."""


class _Probe(OneBranch):
    """Keeps the largest finite values of each node."""

    def __init__(
        self, region: Region, graph_module: fx.GraphModule, found: Extremes, *, careful: bool
    ) -> None:
        super().__init__(graph_module)
        self._infos: Mapping[str, NodeInfo] = region.graphs[Mode.EVAL].nodes
        self._found, self._careful = found, careful

    def run_node(self, n: fx.Node) -> Any:
        if self._careful and facts_of_target(n.target).checks_values:
            raise _OutOfBoundsError(f"{n.target} ends the process when values are out of bounds")
        result = super().run_node(n)
        if self._careful and self._counts(n, result):
            raise _OutOfBoundsError(f"{n.target} makes integers, which may be an index")
        info = self._infos.get(n.name)
        if info is not None:
            for leaf in pytree.tree_leaves(result):
                _record(self._found, info.identity, leaf)
        return result

    def _counts(self, n: fx.Node, result: Any) -> bool:
        """Whether a node makes integers of floating point values, other than by their order."""
        return (
            isinstance(result, torch.Tensor)
            and result.dtype != torch.bool
            and not result.is_floating_point()
            and not facts_of_target(n.target).is_a(Family.RANKING)
            and any(is_float_tensor(self.env[source]) for source in n.all_input_nodes)
        )


def _may_grow(value: Any) -> bool:
    """Whether an input holds more than zeros and ones."""
    if not is_float_tensor(value) or value.layout is not torch.strided or not value.numel():
        return False
    flags = (value == 0) | (value == 1)
    return not bool(flags.all()) or not bool((value == 1).any())


def _larger(value: torch.Tensor) -> torch.Tensor:
    return value * LARGER


def _with_spikes(value: torch.Tensor) -> torch.Tensor:
    """With `SPIKE` first, last and in the middle."""
    value = value.clone(memory_format=torch.contiguous_format)
    flat = value.view(-1)
    for index in (0, flat.numel() // 2, flat.numel() - 1):
        flat[index] = SPIKE
    return value


def _record(found: Extremes, name: str, value: Any) -> None:
    if not is_float_tensor(value) or value.layout is not torch.strided or not value.numel():
        return
    finite = torch.where(value.isfinite(), value, 0.0)
    low, high = map(float, torch.aminmax(finite))
    size, highest = found.get(name, (0.0, 0.0))
    found[name] = max(size, -low, high), max(highest, high)
