"""The models that faults are planted in, and what is judged of each."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from amp_convert.capture.regions import capture
from amp_convert.core.batches import Batch
from amp_convert.core.number_formats import name_of
from amp_convert.profile.calibrate import profile
from amp_convert.rewrite.conversion import convert_captured
from amp_convert.rewrite.converted_model import ConvertedModel
from amp_convert.rules.load import load_rules
from amp_convert.validate.inference.compare import compare
from amp_convert.validate.inference.results import Divergence
from amp_convert.verdict.thresholds import Thresholds
from amp_convert.verdict.verdict import judge

SIZES = (30.0, 8.0, 3.0, 2.05, 1.5, 1.1, 0.7)
"""In units of the tolerance. Beyond 2, a fault must not pass."""


DTYPES = (torch.float16, torch.bfloat16)


Plant = Callable[[str, Tensor], Tensor]


class Padded(nn.Module):
    """Attention that leaves the padding out, and a mean over what is left."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.qkv = nn.Embedding(20, 16), nn.Linear(16, 48)
        self.norm, self.head = nn.LayerNorm(16), nn.Linear(16, 9)

    def forward(self, ids: Tensor) -> dict[str, Tensor]:
        seen = ids > 0
        q, k, v = self.qkv(self.embed(ids)).chunk(3, -1)
        h = self.norm(F.scaled_dot_product_attention(q, k, v, attn_mask=seen[:, None, :]))
        weight = seen[..., None].float()
        return {"tokens": h * weight, "logits": self.head((h * weight).sum(1) / weight.sum(1))}


class Averaging(nn.Module):
    """It keeps a running mean, in eval mode too."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(8, 12)
        self.register_buffer("mean", torch.zeros(12))

    def forward(self, x: Tensor) -> Tensor:
        h = self.body(x)
        self.mean.mul_(0.9).add_(0.1 * h.detach().mean(0))
        return h - self.mean


class Labels(nn.Module):
    """A classifier that gives labels alone."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 5))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x).argmax(1)


class Heads(nn.Module):
    """A shared body with a head each for a class, a number and a map."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU())
        self.label, self.number = nn.Linear(8, 10), nn.Linear(8, 1)
        self.map = nn.Conv2d(8, 3, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        h = self.body(x)
        pooled = h.mean((2, 3))
        return self.label(pooled), self.number(pooled), self.map(h)


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 10))


def normal(*shape: int) -> Callable[[int], Tensor]:
    return lambda seed: torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def ids(seed: int) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, 20, (12, 10), generator=g)
    lengths = torch.randint(3, 11, (12, 1), generator=g)
    return ids * (torch.arange(10) < lengths)


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[int], Tensor]]] = {
    "mlp": (mlp, normal(24, 16)),
    "heads": (Heads, normal(12, 1, 8, 8)),
    "padded": (Padded, ids),
    "averaging": (Averaging, normal(16, 8)),
    "labels": (Labels, normal(60, 16)),
}


@dataclass
class Subject:
    """A converted model with its batches, and what its outputs are in FP32 by name."""

    name: str
    limits: Thresholds
    mixed: ConvertedModel
    inputs: list[Tensor]
    outputs: dict[str, list[Tensor]]
    at: int = 0

    @classmethod
    def of(cls, name: str, dtype: torch.dtype) -> Subject:
        """The model of this name, captured."""
        build, batch = MODELS[name]
        torch.manual_seed(0)
        model = build().eval()
        inputs = [batch(seed) for seed in range(4)]
        captured = capture(model, (inputs[0],), {})
        rules = load_rules(["default"])
        stats = profile(captured, [((x,), {}) for x in inputs], [dtype])
        mixed = convert_captured(captured, rules, stats, dtype)
        held: dict[str, list[Tensor]] = {}
        with torch.no_grad():
            for x in inputs:
                for key, value in named(kept(model, x)):
                    held.setdefault(key, []).append(value)
        return cls(name, Thresholds.for_dtype(name_of(dtype)), mixed, inputs, held)

    def batches(self) -> Iterator[Batch]:
        """The batches; a fault asks which one it is at."""
        for index, x in enumerate(self.inputs):
            self.at = index
            yield (x,), {}, None

    def verdict(self, change: Callable[[Divergence], Divergence] = lambda d: d) -> str:
        """What the verdict says of the model as it is now."""
        found = change(compare(self.mixed, self.batches(), score=score, autocast=False))
        captured, plan = self.mixed.captured, self.mixed.plan
        return str(judge(captured.fidelity, plan, found, self.limits, metrics_supplied=True).status)

    @contextlib.contextmanager
    def planted(self, plant: Plant) -> Iterator[None]:
        """Each output of the mixed eval graph goes through `plant` while this is open."""
        rewritten = self.mixed.rewritten[""]["eval"]
        module, signature = rewritten.graph_module, rewritten.captured.signature
        (output,) = module.graph.find_nodes(op="output")
        before = output.args
        values = list(before[0])
        first = len(signature.buffer_outputs) + len(signature.input_outputs)
        names = [f"buffer {name}" for name in signature.buffer_outputs] + list(self.outputs)
        added = []
        for i, value in enumerate(values):
            if isinstance(value, fx.Node) and (i >= first or i < len(signature.buffer_outputs)):
                with module.graph.inserting_before(output):
                    node = module.graph.call_function(named_call(plant, names[i]), (value,))
                added.append(node)
                values[i] = node
        output.args = (tuple(values),)
        module.recompile()
        self.mixed._run_rewritten()
        try:
            yield
        finally:
            output.args = before
            for node in added:
                module.graph.erase_node(node)
            module.recompile()
            self.mixed._run_rewritten()


def named_call(plant: Plant, name: str) -> Callable[[Tensor], Tensor]:
    """A function of one tensor, with a name for the graph."""

    def planted(value: Tensor) -> Tensor:
        return plant(name, value)

    return planted


def kept(model: nn.Module, x: Tensor) -> Any:
    """The model's outputs, its buffers as they were."""
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    return torch.func.functional_call(model, buffers, (x,))


def named(outputs: Any) -> list[tuple[str, Tensor]]:
    if isinstance(outputs, dict):
        return list(outputs.items())
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    return [(str(i), value) for i, value in enumerate(outputs)]


def score(outputs: Any, _: Any) -> dict[str, float]:
    """A metric that hardly moves with rounding: the mean of the first output's largest index."""
    first = named(outputs)[0][1].float()
    return {"score": 2 + float(first.reshape(len(first), -1).std(1).mean() if first.dim() > 1
                               else (first + 1).mean())}  # fmt: skip
