"""One captured part of a model as it runs: its rewritten graphs, by mode."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn

from amp_convert.capture.captured import Region
from amp_convert.capture.graph_call import GraphRunner
from amp_convert.core.errors import UnsupportedModelError
from amp_convert.core.mode import Mode
from amp_convert.rewrite.graph_execution import runner_of
from amp_convert.rewrite.insert_casts import Rewritten
from amp_convert.rewrite.kernels.tuned_graph import RunningGraph


class Part:
    """The rewritten graphs of one captured part."""

    def __init__(self, region: Region, rewritten: Mapping[Mode, Rewritten], *, exact: bool) -> None:
        self.runners: dict[Mode, GraphRunner] = {}
        for mode, each in rewritten.items():
            graph_module, signature = each.graph_module, each.captured.signature
            training = mode is Mode.TRAIN
            running = RunningGraph(graph_module, signature, exact=exact, training=training)
            self.runners[mode] = runner_of(each, region.module, running, running.in_place)
        self._why_no_train = region.train_failure

    def __call__(self, mode: Mode, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        runner = self.runners.get(mode)
        if runner is None:
            raise UnsupportedModelError(
                f"this model was captured for inference only: {self._why_no_train}",
                mend="Call .eval() on it, or make its forward pass exportable in training mode.",
            )
        return runner(*args, **kwargs)

    def as_forward(self, module: nn.Module) -> Callable[..., Any]:
        """A `forward` for the part's module, which follows that module's mode: a part that was
        captured for training alone is the original where it is put in eval mode."""
        forward = module.forward

        def called(*args: Any, **kwargs: Any) -> Any:
            mode = Mode.of(module.training)
            if mode is Mode.EVAL and mode not in self.runners:
                return forward(*args, **kwargs)
            return self(mode, args, kwargs)

        return called
