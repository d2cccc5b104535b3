"""One module in one mode -> `CapturedGraph`: a functional ATen graph with a name for every node.

`torch.export` (non-strict, first dimensions dynamic) traces the module; `run_decompositions({})`
makes the graph functional and leaves composite operators (`linear`, `layer_norm`,
`scaled_dot_product_attention`) whole. Functional form is needed, not merely tidy: a cast in front
of an in-place operator would break aliasing, and a value read after `relu_` has changed it would
put the blame on the wrong node.

The graph is then repaired: see `export_repairs`.
"""

from __future__ import annotations

import contextlib
import gc
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn

from amp_convert.capture.branches.choices import BRANCH, CHOICE
from amp_convert.capture.branches.inline import Owners, inline_branches
from amp_convert.capture.branches.nest import one_branch
from amp_convert.capture.cast_words import CastWord, Words, words_of
from amp_convert.capture.export_call import (
    Varying,
    bound_arguments,
    distinct,
    doubled_batch,
    dynamic_shapes,
    flat_outputs,
    no_size_of_one,
    quietly,
)
from amp_convert.capture.export_repairs import (
    detach_no_grad,
    distinct_casts,
    inline_autocast_off,
    mark_explicit_cast,
    repair,
    written_casts,
)
from amp_convert.capture.graph_call import GraphRunner, bind, by_keyword
from amp_convert.capture.graph_signature import (
    Signature,
    UncheckableSizesError,
    check_guards,
    signature_of,
)
from amp_convert.capture.in_mode import in_mode
from amp_convert.capture.node_info import NodeInfo, class_path, describe
from amp_convert.capture.refusals import refusal_of
from amp_convert.capture.sizes.python_len import open_len
from amp_convert.capture.sizes.recurrent_shapes import open_lengths
from amp_convert.core import device as devices
from amp_convert.core.batches import anew
from amp_convert.core.mode import Mode

KEPT_META = ("shape", CHOICE, BRANCH)


@dataclass(frozen=True)
class CapturedGraph:
    """One mode of one module as a function of its tensors and the user's inputs. `fixed_sizes` says
    why it takes none but the sizes it was traced with; "" where the first dimensions may vary.

    `has_choices` is whether it has both branches of a condition (see `branches`).

    `meta["shape"]` of a node that gives a tensor has its sizes: numbers, and the expressions of
    those that vary, as text. Equal sizes are equal for every input that the graph takes."""

    mode: Mode
    graph_module: fx.GraphModule
    signature: Signature
    constants: Mapping[str, torch.Tensor] = field(repr=False)
    nodes: Mapping[str, NodeInfo] = field(repr=False)
    fixed_sizes: str = ""
    has_choices: bool = False

    def runner(self, owner: nn.Module) -> GraphRunner:
        """The graph, callable as the module `owner` is."""
        run = one_branch(self.graph_module) if self.has_choices else None
        return GraphRunner(self.graph_module, self.signature, self.constants, owner, run)


def export_graph(
    module: nn.Module,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    mode: Mode,
    path: str = "",
    *,
    dynamic: bool = True,
    flat: bool = True,
    words: Callable[[], Words] = dict,
    vary: Varying = frozenset(),
) -> CapturedGraph:
    """Capture `module` in `mode` ("eval" or "train"); `path` is its place in the whole model, and
    `words` tells what its casts ask for, if a cast is found. If `flat`, both branches of a
    `torch.cond` become part of the graph.

    First dimensions, and those of `vary`, stay dynamic where the model allows it; when tracing them
    fails for a reason that a static trace does not share, they are fixed, first those of `vary`.
    Raises whatever `torch.export` raises.
    """
    bound = bound_arguments(module, args, kwargs)
    call = bound.signature
    args, kwargs = distinct((bound.args, bound.kwargs))
    device = devices.of_model(module)
    with (
        collector_paused(),
        in_mode(module, training=mode == Mode.TRAIN),
        devices.plain_mode(device),
        open_len(module),
        open_lengths(),
        flat_outputs(module, call, kwargs) as returned,
    ):
        program, fixed = None, "" if dynamic else "dynamic sizes were not asked for"
        if dynamic:
            for dims in dict.fromkeys((vary, frozenset[tuple[int, int]]())):
                program, fixed = _dynamic_program(module, call, args, kwargs, words, dims)
                if program is not None:
                    break
        if program is None:
            program = _program(module, call, args, kwargs, vary=None, words=words)
    graph = program.graph
    inlined = flat and inline_branches(program.graph_module, _owners(program, module))
    repair(graph)
    out_spec = returned[-1] if returned else program.call_spec.out_spec
    signature = signature_of(program, module, call, bound.arguments, out_spec)
    nodes = describe(graph, path)
    # What tracing left behind is read; its fake tensors would only stand in the way of a copy.
    for node in graph.nodes:
        if isinstance(value := node.meta.get("val"), torch.Tensor):
            node.meta["shape"] = tuple(_size(n) for n in value.shape)
        node.meta = {key: node.meta[key] for key in KEPT_META if key in node.meta}
    graph_module = fx.GraphModule(program.graph_module, graph)
    graph_module.meta = {}
    return CapturedGraph(
        mode=mode,
        graph_module=graph_module,
        signature=signature,
        constants={n: t for n, t in program.constants.items() if isinstance(t, torch.Tensor)},
        nodes=nodes,
        fixed_sizes=fixed,
        has_choices=inlined,
    )


def _owners(program: torch.export.ExportedProgram, module: nn.Module) -> Owners:
    """The submodule that holds each of a program's parameters and buffers, by placeholder."""
    declared = program.graph_signature
    found = {}
    for placeholder, name in {
        **declared.inputs_to_parameters,
        **declared.inputs_to_buffers,
    }.items():
        path = name.rpartition(".")[0]
        found[placeholder] = (path, class_path(type(module.get_submodule(path))))
    return found


def _size(size: int | torch.SymInt) -> int | str:
    return size if isinstance(size, int) else str(size)


@contextlib.contextmanager
def collector_paused() -> Iterator[None]:
    """No search for cyclic garbage while this is open.

    A trace makes objects by the hundred thousand that live until it ends, so there is little to be
    found, and each full search goes through all that PyTorch and the model have imported: a tenth
    of the time of a conversion.
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def _graphs(graph_module: fx.GraphModule) -> list[fx.Graph]:
    """A trace's graph, and those of its regions."""
    return [m.graph for m in graph_module.modules() if isinstance(m, fx.GraphModule)]


def _with_regions(graph_module: fx.GraphModule) -> Iterator[fx.Node]:
    """The nodes of a graph and, where one calls a region such as `torch.no_grad()`'s, that
    region's: as they run."""
    for node in graph_module.graph.nodes:
        yield node
        if isinstance(node.target, torch._ops.HigherOrderOperator):
            for source in node.all_input_nodes:
                region = getattr(graph_module, str(source.target), None)
                if source.op == "get_attr" and isinstance(region, fx.GraphModule):
                    yield from _with_regions(region)


def _goes_low(word: CastWord | None) -> frozenset[str]:
    return frozenset(name for name, low in vars(word).items() if low) if word else frozenset()


def _dynamic_program(
    module: nn.Module,
    call: inspect.Signature,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    words: Callable[[], Words],
    vary: Varying,
) -> tuple[torch.export.ExportedProgram | None, str]:
    """The program with dynamic first dimensions and those of `vary`, or None and why there is
    none."""
    try:
        args, kwargs = no_size_of_one(*doubled_batch(args, kwargs), vary)
        program = _program(module, call, args, kwargs, vary=vary, words=words)
        check_guards(program, by_keyword(call, bind(call, args, kwargs).arguments))
    except UncheckableSizesError as error:
        return None, str(error)
    except Exception as error:  # noqa: BLE001  whatever fails dynamically is retried statically
        return None, refusal_of(error).reason
    return program, ""


def _program(
    module: nn.Module,
    call: inspect.Signature,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    *,
    vary: Varying | None,
    words: Callable[[], Words],
) -> torch.export.ExportedProgram:
    """The program; `vary` of None fixes all sizes."""
    args, kwargs = anew((tuple(args), dict(kwargs)))
    shapes = None
    if vary is not None:
        named = by_keyword(call, bind(call, args, kwargs).arguments)
        shapes = dynamic_shapes(named, vary)

    def exported(casts: contextlib.AbstractContextManager[None]) -> torch.export.ExportedProgram:
        with quietly(), casts:
            return torch.export.export(
                module, tuple(args), dict(kwargs), dynamic_shapes=shapes, strict=False
            )

    program, left = exported(distinct_casts()), set()
    if written_casts(_graphs(program.graph_module)):
        # Traced as it is, all names of such a value are one; a cast of what the caller or the
        # module holds would hide the write from them.
        program = exported(contextlib.nullcontext())
        roots = written_casts(_graphs(program.graph_module))
        left = {cast for cast, root in roots.items() if root.op in ("placeholder", "get_attr")}
    inline_autocast_off(program.graph_module)
    nodes = list(_with_regions(program.graph_module))
    heard = words_of(nodes, words)
    for node in nodes:
        if node not in left:
            mark_explicit_cast(node, _goes_low(heard.get(node)))
    for node in list(program.graph.nodes):
        detach_no_grad(node)
    functional: torch.export.ExportedProgram = program.run_decompositions({})
    return functional


# --- guards and signature -------------------------------------------------------------------------
