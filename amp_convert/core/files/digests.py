"""SHA-256 digests, in hexadecimal, of what a run depends on."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

import torch


def of_file(path: Path) -> str:
    """The digest of a file's bytes. Raises OSError where it cannot be read."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def of_text(text: str) -> str:
    """The digest of a text as UTF-8."""
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()


def of_model(model: torch.nn.Module) -> str:
    """The digest of a model's state: what tells one from another, for want of a file."""
    state = model.state_dict().items()
    return of_tensors((name, t) for name, t in state if isinstance(t, torch.Tensor))


def of_tensors(named: Iterable[tuple[str, torch.Tensor]]) -> str:
    """The digest of tensors in order: of their names, dtypes, shapes and bits."""
    digest = hashlib.sha256()
    for name, tensor in named:
        head = f"{name}:{tensor.dtype}:{tuple(tensor.shape)}"
        digest.update(head.encode(errors="surrogatepass"))
        tensor = tensor.detach().cpu()
        if tensor.is_quantized:
            tensor = tensor.dequantize()
        elif tensor.layout is not torch.strided:
            tensor = tensor.to_dense()
        flat = tensor.contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b"")
    return digest.hexdigest()
