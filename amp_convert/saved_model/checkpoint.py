"""A converted model as a safetensors file, to train on: its FP32 weights and its plan, no code.

Tensors stand under the names of `state_dict()`; one that has several names is stored under the
first. The header's `amp_convert` entry is JSON: `schema_version`, what the model was, the plan as
the text of plan.toml, `aliases` of names, and the digest of all that. A file that was cut short or
changed is refused.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from amp_convert import __version__
from amp_convert.capture.node_info import class_path
from amp_convert.core.errors import ModelError, UsageError
from amp_convert.core.files import digests
from amp_convert.core.files.atomic_files import replacing
from amp_convert.core.files.reading import parse_json
from amp_convert.rewrite.converted_model import ConvertedModel

SCHEMA_VERSION = 1
_KEY = "amp_convert"


@dataclass(frozen=True)
class Checkpoint:
    """What a file holds: `tensors` by every name of the state dict, `plan` as TOML, the class of
    the model that was converted, whether it was `for_training`, and by `aliases` which names are
    further ones of a tensor."""

    model_class: str
    plan: str
    for_training: bool
    aliases: Mapping[str, str]
    tensors: Mapping[str, torch.Tensor] = field(repr=False)


def write_checkpoint(converted: ConvertedModel, path: Path) -> None:
    """Write weights and plan to `path`, whole or not at all. Raises ModelError for state that is no
    dense tensor, OSError where the file cannot be written."""
    tensors: dict[str, torch.Tensor] = {}
    aliases: dict[str, str] = {}
    names: dict[tuple[object, ...], str] = {}
    for name, tensor in converted.captured.model.state_dict().items():
        if not isinstance(tensor, torch.Tensor) or not _is_plain(tensor):
            raise ModelError(
                f"{name} of the model's state is no dense tensor, and a safetensors file holds no "
                "others",
                mend="Save state_dict() and plan.to_toml() by torch.save.",
            )
        key = (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        if tensor.numel() and key in names:
            aliases[name] = names[key]
        else:
            names[key] = name
            # Apart from all others: safetensors stores no memory twice, and no view.
            tensors[name] = tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
    document = {
        "schema_version": SCHEMA_VERSION,
        "amp_convert": __version__,
        "torch": torch.__version__,
        "model_class": class_path(type(converted.captured.model)),
        "for_training": converted.has_train,
        "aliases": aliases,
        "plan": converted.plan.to_toml(),
    }
    text = json.dumps({**document, "digest": _digest(document, tensors)})
    with replacing(path) as draft:
        save_file(tensors, draft, {_KEY: text})


def read_checkpoint(path: Path) -> Checkpoint:
    """What `write_checkpoint` wrote. Raises UsageError for any other file, and for one that has
    changed since."""
    try:
        with safe_open(path, framework="pt") as file:
            document = _document((file.metadata() or {}).get(_KEY))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        _prove(document, tensors)
        shared = {name: tensors[of] for name, of in document["aliases"].items()}
    except (OSError, SafetensorError, ValueError, KeyError) as error:
        said = f"there is no {error} in it" if isinstance(error, KeyError) else str(error)
        raise UsageError(
            f"{path} is no saved model: {said}",
            mend="Give a file that amp_convert.save made from a converted model.",
        ) from error
    return Checkpoint(
        model_class=document["model_class"],
        plan=document["plan"],
        for_training=document["for_training"],
        aliases=document["aliases"],
        tensors={**tensors, **shared},
    )


_KINDS = {"model_class": str, "plan": str, "digest": str, "aliases": dict, "for_training": bool}


def _document(text: str | None) -> dict[str, Any]:
    """The header's entry. Raises ValueError for what is none of this version."""
    document = parse_json(text.encode()) if text is not None else None
    if not isinstance(document, dict) or "schema_version" not in document:
        raise ValueError("amp-convert did not write it")
    if document["schema_version"] != SCHEMA_VERSION:
        raise ValueError("another version of amp-convert wrote it")
    for name, kind in _KINDS.items():
        if not isinstance(document.get(name), kind):
            raise ValueError(f"its entry {name} is not as amp-convert writes it")
    if not all(isinstance(name, str) for name in document["aliases"].values()):
        raise ValueError("its entry aliases is not as amp-convert writes it")
    return document


def _prove(document: dict[str, Any], tensors: Mapping[str, torch.Tensor]) -> None:
    """Raises ValueError where the file is not what was written."""
    rest = {name: value for name, value in document.items() if name != "digest"}
    if document["digest"] != _digest(rest, tensors):
        raise ValueError("its digest is another: it has changed since it was written")


def _digest(document: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> str:
    text = json.dumps(document, sort_keys=True)
    return digests.of_text(text + digests.of_tensors(sorted(tensors.items())))


def _is_plain(tensor: torch.Tensor) -> bool:
    return tensor.layout is torch.strided and not tensor.is_quantized and not tensor.is_meta
