"""A frozen model as a `torch.export` archive: `FrozenModel` -> a .pt2 file and what is in it.

The file needs neither amp_convert nor the user's code: `torch.export.load(file).module()` is the
model, in the plan's precision. Sizes that vary in the frozen model vary in it; PyTorch checks them
at each call. Beside the program there are three texts, among the archive's extra files:
`amp_convert.json` (see `Archive`), `plan.toml`, and `verdict.json` once there is one.

The example inputs that the file carries are zeros: data of the user's stay at home.
"""

from __future__ import annotations

import dataclasses
import json
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.export import Dim, ExportedProgram
from torch.utils import _pytree as pytree

from amp_convert import __version__
from amp_convert.capture.export_call import explicit, quietly
from amp_convert.capture.graph_call import by_keyword
from amp_convert.capture.graph_signature import Signature
from amp_convert.capture.sizes.recurrent_shapes import open_lengths
from amp_convert.core import device as devices
from amp_convert.core.errors import UnsupportedModelError, first_line, refuse_environment
from amp_convert.core.files import digests
from amp_convert.core.files.atomic_files import replacing
from amp_convert.core.number_formats import name_of
from amp_convert.rewrite.frozen_model import FrozenModel
from amp_convert.saved_model.plain_call import Call, PlainModule, arguments, plain, plain_call

ABOUT, PLAN, VERDICT = "amp_convert.json", "plan.toml", "verdict.json"
SCHEMA_VERSION = 1


@dataclass(frozen=True)
class ArchiveInput:
    """An input tensor; None stands for a size that may vary."""

    name: str
    dtype: str
    shape: tuple[int | None, ...]


@dataclass(frozen=True)
class Archive:
    """An archive that was written, and what is in it. Plain data.

    `weights_digest` is of names, dtypes, shapes and bits of its tensors, `plan_digest` of the text
    of the plan. `fixed` are the dimensions that vary in the frozen model and not in the file, as
    "input_ids[1]".
    """

    path: str
    bytes: int
    model_class: str
    dtype: str
    device: str
    inputs: tuple[ArchiveInput, ...]
    fixed: tuple[str, ...]
    weights_digest: str
    plan_digest: str


def write_archive(frozen: FrozenModel, path: Path, verdict: str | None = None) -> Archive:
    """Write `frozen` to `path`, whole or not at all, with the text of a verdict if there is one.

    Raises UnsupportedModelError where the model was captured in parts or `torch.export` refuses it,
    OSError where the file cannot be written.
    """
    program = exported(frozen)
    inputs, plan = tuple(_inputs(program)), frozen.plan.to_toml()
    about = Archive(
        path=str(path),
        bytes=0,
        model_class=frozen.model_class,
        dtype=frozen.plan.dtype,
        device=str(devices.of_model(frozen)),
        inputs=inputs,
        fixed=tuple(_fixed(inputs, frozen.runner("").signature)),
        weights_digest=digests.of_tensors(sorted(program.state_dict.items())),
        plan_digest=digests.of_text(plan),
    )
    texts = {ABOUT: json.dumps(_document(about), indent=1), PLAN: plan}
    if verdict is not None:
        texts[VERDICT] = verdict
    with replacing(path) as draft:
        torch.export.save(program, draft, extra_files=texts)
        _read_back(draft)
        size = draft.stat().st_size
    return dataclasses.replace(about, bytes=size)


def _read_back(path: Path) -> None:
    """Raises UnsupportedModelError for a file that PyTorch has written and does not read, as it
    happens where a model returns a text."""
    try:
        torch.export.load(path)
    except Exception as error:
        refuse_environment(error)
        raise UnsupportedModelError(
            f"torch.export does not read the file that it wrote: {first_line(error)}",
            mend="Let the model take and return tensors, numbers and None alone.",
        ) from error


def add_verdict(path: Path, verdict: str) -> None:
    """Add the text of what was found of an archive to it; nothing else in the file is touched."""
    with zipfile.ZipFile(path, "a", zipfile.ZIP_STORED) as archive:
        folder = next(n for n in archive.namelist() if n.endswith(f"/{ABOUT}")).rpartition("/")[0]
        archive.writestr(f"{folder}/{VERDICT}", verdict)


def exported(frozen: FrozenModel) -> ExportedProgram:
    """The program of a frozen model. Raises UnsupportedModelError as `write_archive` does."""
    if not frozen.is_whole:
        raise UnsupportedModelError(
            "an archive holds one graph, and only parts of this model could be captured",
            mend="See what the report says of the parts that stay eager.",
        )
    signature = frozen.runner("").signature
    args, kwargs = plain_call(signature, *_example(frozen, signature))
    order = explicit(signature.call, dict(sorted(kwargs.items()))).parameters
    kwargs = {name: kwargs[name] for name in order if name in kwargs}  # as the graph has them
    module = PlainModule(frozen)
    try:
        with torch.no_grad(), quietly(), open_lengths():
            return torch.export.export(
                module, args, kwargs, dynamic_shapes=_sizes(signature, args, kwargs), strict=False
            )
    except Exception as error:  # exporters fail in as many ways as user code
        refuse_environment(error)
        raise UnsupportedModelError(
            f"torch.export refuses the converted graph: {first_line(error)}",
            mend="Deploy the frozen model as it is, or its ONNX file.",
        ) from error


def _example(frozen: FrozenModel, signature: Signature) -> Call:
    """Zeros like the example inputs; where a size may vary, two at least, since 0 and 1 are burnt
    in."""
    device, (args, kwargs) = devices.of_model(frozen), frozen.example
    leaves = pytree.tree_leaves(list(arguments(signature, args, kwargs).values()))
    shapes = {id(leaf): w.shape for leaf, w in zip(leaves, signature.user_inputs, strict=True)}

    def zeros(like: torch.Tensor) -> torch.Tensor:
        known = shapes[id(like)] or tuple(like.shape)
        sizes = [max(n, 2) if k is None else k for n, k in zip(like.shape, known, strict=True)]
        return torch.zeros(sizes, dtype=like.dtype, device=device)

    made: Call = pytree.tree_map_only(torch.Tensor, zeros, (args, kwargs))
    return made


def _sizes(
    signature: Signature, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> dict[str, Any]:
    """What `torch.export` is told of the inputs' sizes, by argument."""
    told = [
        None
        if each.shape is None
        else {d: Dim.AUTO if size is None else Dim.STATIC for d, size in enumerate(each.shape)}
        for each in signature.user_inputs
    ]
    shapes = plain(pytree.tree_unflatten(told, signature.in_spec))
    named = by_keyword(signature.call, dict(zip(signature.names, shapes, strict=True)))
    given = explicit(signature.call, kwargs).bind(*args, **kwargs).arguments
    return {name: named[name] for name in given}


def _inputs(program: ExportedProgram) -> Iterator[ArchiveInput]:
    names = set(program.graph_signature.user_inputs)
    for node in program.graph.find_nodes(op="placeholder"):
        value = node.meta.get("val")
        if node.name in names and isinstance(value, torch.Tensor):
            sizes: list[int | torch.SymInt] = list(value.shape)
            shape = tuple(size if isinstance(size, int) else None for size in sizes)
            yield ArchiveInput(node.name, name_of(value.dtype), shape)


def _fixed(inputs: Sequence[ArchiveInput], signature: Signature) -> Iterator[str]:
    wanted = [each for each in signature.user_inputs if each.shape is not None]
    for made, want in zip(inputs, wanted, strict=True):
        for d, (size, free) in enumerate(zip(made.shape, want.shape or (), strict=True)):
            if free is None and size is not None:
                yield f"{want.path}[{d}]"


def _document(about: Archive) -> dict[str, Any]:
    facts = dataclasses.asdict(about)
    del facts["path"], facts["bytes"]
    versions = {"amp_convert": __version__, "torch": torch.__version__}
    return {"schema_version": SCHEMA_VERSION, **versions, **facts}
