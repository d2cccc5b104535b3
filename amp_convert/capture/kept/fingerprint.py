"""All that a capture depends on, as one digest: code, weights, shapes, and what runs them.

- *Code*: the text of every file of the user's that is imported, and what its global names hold, as
  far as some function of the user's reads a name like that; the environment's variables, where the
  code reads any; of installed packages each imported file's size and time; the versions of Python,
  PyTorch and amp-convert's own text.
- *The model*: each module's class and attributes, as pickle walks them, so with whatever a config
  object holds; of tensors the values. Of a function or class of the user's what it was made with
  and what was set on it; where it stands in no file that is imported, such as a lambda, its code
  and all that it closes over and reads as well. What cannot be seen through (a generator, a lock)
  leaves the model without a digest.
- *The call*: inputs with their values and strides, and what is set in PyTorch.
"""

from __future__ import annotations

import os
import platform
import sys
import types
from typing import Any

import torch

from amp_convert.capture.kept.objects import Digester, names_read_by, seen_through
from amp_convert.capture.kept.origins import (
    NoFingerprintError,
    is_installed,
    loaded_files,
    of_file,
    own_text,
)
from amp_convert.core.files import digests


def of_call(module: Any, inputs: Any, *others: object) -> str:
    """The digest of a module, the inputs of a call of it, what is set in PyTorch, and plain values
    that say what is asked. Raises NoFingerprintError."""
    return Digester().digest((module, inputs, _set_in_pytorch(), others))


def _set_in_pytorch() -> tuple[Any, ...]:
    chosen = {k: v for k, v in os.environ.items() if k.startswith(("TORCH_", "PYTORCH"))}
    cuda = torch.backends.cuda
    devices = range(torch.cuda.device_count()) if torch.cuda.is_available() else ()
    return (
        torch.get_default_dtype(),
        str(torch.get_default_device()),
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.are_deterministic_algorithms_enabled(),
        torch.get_num_threads(),
        torch.get_float32_matmul_precision(),
        [torch.is_autocast_enabled(kind) for kind in ("cpu", "cuda")],
        [torch.get_autocast_dtype(kind) for kind in ("cpu", "cuda")],
        [cuda.flash_sdp_enabled(), cuda.mem_efficient_sdp_enabled(), cuda.math_sdp_enabled()],
        [cuda.cudnn_sdp_enabled(), torch.backends.mha.get_fastpath_enabled()],
        [torch.backends.cpu.get_cpu_capability(), *map(torch.cuda.get_device_name, devices)],
        sorted(chosen.items()),
    )


def of_code() -> str:
    """The digest of all code that is loaded. Raises NoFingerprintError where a file of it cannot be
    read, or a global value that it reads has no digest."""
    files = sorted(loaded_files())
    parts: list[Any] = [own_text(), sys.version, platform.platform(), torch.__version__]
    parts += [(name, of_file(file)) for name, file in files]
    own = [sys.modules[name] for name, file in files if not is_installed(file)]
    read = frozenset[str]().union(*map(_names_read, own))
    if read & {"environ", "getenv"}:
        parts.append(sorted(os.environ.items()))
    digester = Digester()
    for module in own:
        for name, value in sorted(vars(module).items()):
            if name in read and not (name.startswith("__") and name.endswith("__")):
                try:
                    parts.append((module.__name__, name, digester.digest(value)))
                except NoFingerprintError as error:
                    what = f"{module.__name__}.{name}: {error}"
                    raise NoFingerprintError(what) from error
    return digests.of_text(repr(parts))


def _names_read(module: types.ModuleType) -> frozenset[str]:
    """The names of globals and attributes that the functions of a module read."""
    key = (module.__name__, id(module))
    if key not in _NAMES_READ:
        found: set[str] = set()
        pending, seen = list(vars(module).values()), set[type]()
        while pending:
            value = pending.pop()
            if isinstance(value, types.FunctionType):
                found.update(names_read_by(value.__code__))
            elif isinstance(value, type) and value.__module__ == module.__name__:
                if value in seen:
                    continue
                seen.add(value)
                pending += map(seen_through, vars(value).values())
            elif type(value) is tuple:  # of what was seen through
                pending += value
        _NAMES_READ[key] = frozenset(found)
    return _NAMES_READ[key]


_NAMES_READ: dict[tuple[str, int], frozenset[str]] = {}
