"""What goes into an exported model and what comes out of it: tensors alone, by name and in order.

A captured graph also takes what is no tensor, with the value that it was captured with, and also
returns what it writes to buffers and inputs. A file has neither.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from amp_convert.capture.captured import Region, Value
from amp_convert.capture.export_call import doubled_batch
from amp_convert.capture.graph_signature import Source
from amp_convert.core import device as devices
from amp_convert.core.mode import Mode
from amp_convert.core.random_state import preserved_rng
from amp_convert.core.tree_paths import named_leaves


def input_names(region: Region) -> list[str]:
    """The names of the tensors that the model takes, in the order of its `forward`."""
    leaves = region.graphs[Mode.EVAL].signature.user_inputs
    return [leaf.path for leaf in leaves if leaf.shape is not None]


def output_names(region: Region) -> list[str]:
    """The names of the tensors that the model returns, as in the report's table of outputs."""
    runner = region.runner(Mode.EVAL)
    device = devices.of_model(region.module)
    with torch.no_grad(), preserved_rng(device), devices.exact_fp32(device):
        outputs = runner.graph_module(*runner.inputs(region.args, region.kwargs))
    leaves = named_leaves(runner.results(outputs))
    return [name for name, leaf in leaves if isinstance(leaf, torch.Tensor)]


def tensor_outputs(region: Region) -> list[int]:
    """Which of the eval graph's outputs are tensors that the user gets."""
    signature = region.graphs[Mode.EVAL].signature
    written = len(signature.buffer_outputs) + len(signature.input_outputs)
    return [i for i in range(written, len(_outputs(region))) if _recorded(region, i) is not None]


def written_state(region: Region) -> tuple[str, ...]:
    """The buffers and inputs that the eval graph writes to."""
    signature = region.graphs[Mode.EVAL].signature
    users = [i for i, spec in enumerate(signature.inputs) if spec.source is Source.USER]
    changed = (signature.user_inputs[users.index(i)].path for i in signature.input_outputs)
    return (*signature.buffer_outputs, *changed)


def _outputs(region: Region) -> Sequence[Any]:
    outputs: Any = region.graphs[Mode.EVAL].graph_module.graph.find_nodes(op="output")[0].args[0]
    return tuple(outputs)


def _recorded(region: Region, index: int) -> Value | None:
    """Shape and dtype of an output of the FP32 graph; None where it is no tensor."""
    node = _outputs(region)[index]
    value = region.traces[Mode.EVAL].values.get(node.name) if isinstance(node, fx.Node) else None
    return value if isinstance(value, Value) else None


def is_fp32_output(region: Region, index: int) -> bool:
    """Whether the FP32 model returns FP32 there."""
    value = _recorded(region, index)
    return value is not None and value.dtype == torch.float32


def example_tensors(region: Region) -> list[torch.Tensor]:
    """Copies of the tensors among the example inputs; a batch of one doubled if it may vary."""
    runner = region.runner(Mode.EVAL)
    leaves = runner.signature.user_inputs
    varies = any(None in leaf.shape for leaf in leaves if leaf.shape is not None)
    args, kwargs = (
        doubled_batch(region.args, region.kwargs) if varies else (region.args, region.kwargs)
    )
    users = [value for _, value in runner.signature.users(runner.inputs(args, kwargs))]
    return [value.detach().clone() for value in users if isinstance(value, torch.Tensor)]
