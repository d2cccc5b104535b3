"""Calls of ATen operators, recorded while PyTorch's own samples run, and each as a tiny graph.

`torch.export` on one sample of each of the 677 entries takes two minutes. A dispatch mode sees the
same operators in a second: in inference mode nothing stands between an operator and the mode, so
composite operators (`linear`, `layer_norm`) arrive whole. What export would not keep whole
(an operator that writes or aliases) is decomposed as export does it, and an operator that writes
is recorded as its functional form, which is what is left of it after functionalisation.
`test_op_lists` compares the two on every 25th entry.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import itertools
import operator
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx, nn
from torch._export.utils import _is_cia_op, _is_preservable_cia_op
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from amp_convert.capture.captured import Captured, Region
from amp_convert.capture.export import CapturedGraph
from amp_convert.capture.graph_signature import InputSpec, Signature, Source, UserInput
from amp_convert.capture.node_info import NodeInfo
from amp_convert.capture.traced_region import record
from amp_convert.core.mode import Mode
from amp_convert.core.op_facts import op_name

aten = torch.ops.aten


def database() -> list[Any]:
    """The OpInfo of every operator that has FP32 samples for the CPU."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torch.testing._internal.common_methods_invocations import op_db
    return [info for info in op_db if torch.float32 in info.supported_dtypes("cpu")]


# --- recording -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Call:
    """One call of one operator, with tensors that nobody else holds."""

    op: torch._ops.OpOverload
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    @property
    def name(self) -> str:
        """The operator's full name, such as "aten.linear.default"."""
        return str(self.op)

    def fresh(self) -> Call:
        """The same call with copies of its tensors: some operators write to what they read."""
        args, kwargs = pytree.tree_map_only(torch.Tensor, torch.clone, (self.args, self.kwargs))
        return Call(self.op, args, kwargs)

    def tensors(self) -> list[torch.Tensor]:
        """The tensors among the arguments, in order."""
        leaves = pytree.tree_leaves((self.args, self.kwargs))
        return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]

    def run(self) -> Any:
        """The result, with the random state that `staged.Recorder` uses too."""
        call = self.fresh()
        with torch.no_grad(), torch.random.fork_rng():
            torch.manual_seed(0)
            return call.op(*call.args, **call.kwargs)


# The functional form of a writing operator has its name without "_", but for these.
_FUNCTIONAL = {"aten.bernoulli_.float": aten.bernoulli.p}


def functional(op: torch._ops.OpOverload) -> torch._ops.OpOverload:
    """What functionalisation makes of an operator."""
    if not op._schema.is_mutable:
        return op
    if str(op) in _FUNCTIONAL:
        return _FUNCTIONAL[str(op)]
    namespace, _, name = op._schema.name.partition("::")
    for candidate in (name.removesuffix("_"), f"{name.removesuffix('_')}_functional"):
        packet = getattr(getattr(torch.ops, namespace), candidate, None)
        found = getattr(packet, op._overloadname, None)
        if found is not None and not found._schema.is_mutable:
            return found  # type: ignore[no-any-return]
    return op


class _Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in FunctionalTensor.metadata_fns:
            return func(*args, **kwargs)
        if _is_cia_op(func) and not _is_preservable_cia_op(func):
            with self:
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        if func._schema.is_mutable:  # the functional form may have no defaults
            missing = func._schema.arguments[len(args) :]
            args = (*args, *(a.default_value for a in missing if not a.kwarg_only))
        self.calls.append(Call(functional(func), args, kwargs).fresh())
        return func(*args, **kwargs)


@contextlib.contextmanager
def recording() -> Iterator[list[Call]]:
    """The operators called while this is open are appended to the list that this gives."""
    with warnings.catch_warnings(), torch.random.fork_rng():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        with torch.inference_mode(), _Recorder() as recorder:
            yield recorder.calls


def samples(info: Any, limit: int) -> list[Any]:
    """The first samples of an OpInfo. Its own `sample_inputs` looks for a unittest up the whole
    stack each time, which under pytest takes ten times as long as all else."""
    with warnings.catch_warnings(), torch.random.fork_rng():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        found = info.sample_inputs_func(info, "cpu", torch.float32, False)
        return list(itertools.islice(found, limit))


def calls_of(info: Any, limit: int) -> list[Call]:
    """What the first samples of an OpInfo reach. Raises what the operator raises."""
    given = samples(info, limit)
    with recording() as calls:
        for sample in given:
            info.op(sample.input, *sample.args, **sample.kwargs)
    return calls


# Lazy modules look at their own class while they are filled in; `nn.Linear` and so on stand for
# them. The samples of the fractional pools hold FP64 numbers, which the operator refuses.
_NO_MODULE_SAMPLES = ("nn.Lazy", "nn.FractionalMaxPool")


def calls_of_modules(limit: int) -> list[Call]:
    """What the first samples of each module in PyTorch's own database reach, in both modes."""
    from torch.testing._internal.common_modules import module_db

    found: list[Call] = []
    for info, training in itertools.product(module_db, (False, True)):
        if info.name.startswith(_NO_MODULE_SAMPLES):
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            inputs = info.module_inputs_func(
                info, device="cpu", dtype=torch.float32, requires_grad=False, training=training
            )
        for given in inputs[:limit]:
            made = given.constructor_input
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                module = info.module_cls(*made.args, **made.kwargs).train(training)
            with recording() as calls:
                module(*given.forward_input.args, **given.forward_input.kwargs)
            found += calls
    return found


@functools.lru_cache(maxsize=1)
def float_calls() -> tuple[Call, ...]:
    """Calls that read an FP32 tensor and make a tensor: at most 3 an operator, no two alike in the
    dtypes of what they read, sorted by operator."""
    recorded = [call for info in database() if info.name not in NOT_ON_CPU
                for call in calls_of(info, 3)]  # fmt: skip
    kept: dict[Any, Call] = {}
    count: Counter[str] = Counter()
    for call in [*recorded, *calls_of_modules(2)]:
        key = (call.op, *map(_kind, pytree.tree_leaves((call.args, dict(call.kwargs)))))
        if key not in kept and count[call.name] < 3 and _is_plain(call.tensors()):
            kept[key] = call.fresh()  # outside of inference mode
            count[call.name] += 1
    made = [call for call in kept.values() if _tensors(call.run())]
    return tuple(sorted(made, key=lambda call: call.name))


# Their functions raise without a CUDA device.
NOT_ON_CPU = (
    "jiterator_unary", "jiterator_binary", "jiterator_4inputs_with_extra_args",
    "jiterator_binary_return_by_ref", "jiterator_2inputs_2outputs",
)  # fmt: skip


def _kind(leaf: Any) -> Any:
    return (leaf.dtype, leaf.dim() == 0) if isinstance(leaf, torch.Tensor) else type(leaf)


def _is_plain(tensors: Iterable[torch.Tensor]) -> bool:
    tensors = list(tensors)
    dense = all(tensor.layout == torch.strided for tensor in tensors)
    return dense and any(tensor.dtype == torch.float32 for tensor in tensors)


def _tensors(result: Any) -> list[torch.Tensor]:
    leaves = pytree.tree_leaves(result)
    return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]


# --- a graph of one call -------------------------------------------------------------------------


class OneCall(nn.Module):
    """A module that does one call; its inputs are the tensors that the call reads."""

    def __init__(self, call: Call) -> None:
        super().__init__()
        self.leaves, self.spec = pytree.tree_flatten((call.args, dict(call.kwargs)))
        self.call = call

    def filled(self, values: Iterable[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Arguments with `values` for the tensors."""
        given = iter(values)
        leaves = [next(given) if isinstance(x, torch.Tensor) else x for x in self.leaves]
        return pytree.tree_unflatten(leaves, self.spec)  # type: ignore[no-any-return]

    def forward(self, *tensors: torch.Tensor) -> Any:
        args, kwargs = self.filled(tensors)
        return self.call.op(*args, **kwargs)


def captured(call: Call, reader: Any = None) -> Captured:
    """A capture whose only graph does `call`: the node "/<op>#0", with an access to each output of
    a multi-output operator. `reader` is an operator that reads the result, "/<op>#0" as well."""
    module, tensors = OneCall(call).eval(), tuple(call.fresh().tensors())
    graph = fx.Graph()
    placeholders = [graph.placeholder(f"x{i}") for i in range(len(tensors))]
    node = graph.call_function(call.op, *module.filled(placeholders))
    result = call.run()
    outputs: tuple[fx.Node, ...] = (node,)
    if isinstance(result, tuple | list):
        outputs = tuple(graph.call_function(operator.getitem, (node, i))
                        for i in range(len(result)))  # fmt: skip
    if reader is not None:
        outputs = tuple(graph.call_function(reader, (output,)) for output in outputs)
    graph.output(outputs)
    captured_graph = CapturedGraph(
        mode=Mode.EVAL,
        graph_module=fx.GraphModule({}, graph),
        signature=_signature(module, tensors, len(outputs)),
        constants={},
        nodes=_described(graph),
    )
    trace = record(captured_graph, module, replace(call).fresh().tensors(), {})
    region = Region("", module, tensors, {}, {Mode.EVAL: captured_graph}, {Mode.EVAL: trace})
    return Captured(module, tensors, {}, (region,), (), ())


def _described(graph: fx.Graph) -> dict[str, NodeInfo]:
    seen: Counter[str] = Counter()
    described = {}
    for node in graph.nodes:
        if node.op == "call_function":
            op = op_name(node.target)
            short = ".".join(op.split(".")[:2])
            described[node.name] = NodeInfo(f"/{short}#{seen[short]}", "", (), op, "")
            seen[short] += 1
    return described


def _signature(module: nn.Module, tensors: tuple[torch.Tensor, ...], outputs: int) -> Signature:
    _, in_spec = pytree.tree_flatten([tensors])
    _, out_spec = pytree.tree_flatten(list(range(outputs)))
    return Signature(
        call=inspect.signature(module.forward),
        guards=(),
        inputs=tuple(InputSpec(Source.USER, "") for _ in tensors),
        names=("tensors",),
        user_inputs=tuple(
            UserInput(f"tensors[{i}]", tuple(t.shape), t.dtype) for i, t in enumerate(tensors)
        ),
        in_spec=in_spec,
        out_spec=out_spec,
        buffer_outputs=(),
        input_outputs=(),
    )
