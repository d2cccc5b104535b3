"""A folder that holds the state of a long run: kept whole, or not replaced.

A state is nested dicts, lists and tuples of plain values and tensors. The tensors go to one
safetensors file, everything else to checkpoint.json, which names that file:

1. The tensors are written under a new name and synced to the disk.
2. checkpoint.json is written under another name, synced, and renamed into place. That is the moment
   at which the new state counts: before it, the old one is whole.
3. What no longer belongs to the state is deleted.

A run that is killed at any moment therefore leaves the old state or the new one. Nothing in the
folder can run code when it is read: it holds no pickles. No link is followed, since the folder may
lie where others write, and both files carry a digest, so that no bit of a state is another's.
"""

from __future__ import annotations

import contextlib
import json
import math
import re
import secrets
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from amp_convert.core.errors import AmpConvertError, UsageError, environment_problem
from amp_convert.core.files import digests, hidden_folders
from amp_convert.core.files.atomic_files import replacing, try_to_write, write_file
from amp_convert.core.files.reading import parse_json, read_file

INDEX = "checkpoint.json"
_VERSION = 2
_DIGITS = 1000
"""Of a whole number: those of random states have up to 40."""
_KIND = "amp-convert checkpoint"
_STATE = re.compile(r"state-\d+-[0-9a-f]{8}\.safetensors")
_OURS = re.compile(rf"{_STATE.pattern}|{re.escape(INDEX)}")
_WITHOUT = "Leave --checkpoint out, or use an optimizer of plain state."
_ELSEWHERE = "Give another folder, or delete this one to begin anew."


def check(folder: Path) -> None:
    """Find out before any work that `save` will be able to write to `folder`, which is made.

    Raises UsageError where it cannot, and where the folder holds something else.
    """
    try:
        if folder.is_symlink():
            what = f"the checkpoint {folder} is a link"
            raise UsageError(what, mend="Give the folder itself that it leads to.")
        folder.mkdir(parents=True, exist_ok=True)
        foreign = sorted(entry.name for entry in folder.iterdir() if not _is_ours(entry))
        if foreign:
            what = f"the folder {folder} is no checkpoint: it holds {foreign[0]}"
            raise UsageError(what, mend="Give a new or empty folder.")
        try_to_write(folder / INDEX)
    except (OSError, ValueError) as error:
        raise UsageError(f"cannot write the checkpoint {folder}: {_said(error)}") from error


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Keep `folder` for this run, which is made and checked. Raises UsageError as `check` does, and
    where another run of this machine goes on from it: each would delete what the other saves."""
    check(folder)
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(hidden_folders.locked(folder))
        except BlockingIOError as error:
            what = f"another run of amp-convert is using the checkpoint {folder}"
            raise UsageError(what, mend="Wait for its end, or give another folder.") from error
        except OSError as error:
            raise UsageError(f"cannot write the checkpoint {folder}: {_said(error)}") from error
        yield


def save(folder: Path, state: Mapping[str, Any], *, fingerprint: Mapping[str, Any]) -> None:
    """Replace the state in `folder`; `fingerprint` is what a run must agree with to go on from it.

    Both hold plain values, `state` tensors as well. Raises UsageError where the state cannot be
    written, as on a full disk, or holds something else; then the old one is as it was.
    """
    tensors: dict[str, torch.Tensor] = {}
    content = _readable(state, tensors)
    file = folder / f"state-{len(tensors)}-{secrets.token_hex(4)}.safetensors"
    try:
        with replacing(file) as draft:
            save_file(tensors, draft)
        index = {
            "kind": _KIND,
            "version": _VERSION,
            "fingerprint": dict(fingerprint),
            "tensors": file.name,
            "sha256": digests.of_file(file),
            "state_sha256": digests.of_text(json.dumps(content)),
            "state": content,
        }
        write_file(folder / INDEX, json.dumps(index, allow_nan=False))
    except (OSError, SafetensorError) as error:
        _remove(file)
        what = f"the checkpoint {folder} cannot be written: {_said(error)}"
        raise UsageError(what, mend="Make room, or give another folder.") from error
    _remove_others(folder, file.name)


def load(folder: Path, fingerprint: Mapping[str, Any]) -> dict[str, Any] | None:
    """The state in `folder`, tensors on the CPU; None where there is none.

    Raises UsageError for one of another run, naming the first entry of `fingerprint` that differs,
    and for one that is damaged.
    """
    path = folder / INDEX
    index = _index(path)
    if index is None:
        return None
    try:
        stored, name, digest = index["fingerprint"], index["tensors"], index["sha256"]
        _refuse_other_run(folder, stored, json.loads(json.dumps(dict(fingerprint))))
        if not _STATE.fullmatch(name):  # or a crafted file could name any path
            raise _damaged(path, f"it names {name!r}")
        file = folder / name
        if not stat.S_ISREG(file.lstat().st_mode) or digests.of_file(file) != digest:
            raise _damaged(path, f"{name} is not what was written")
        if digests.of_text(json.dumps(index["state"])) != index["state_sha256"]:
            raise _damaged(path, "its state is not what was written")
        found: dict[str, Any] = _unpacked(index["state"], load_file(file))
    except (OSError, SafetensorError) as error:
        raise _damaged(path, _said(error)) from error
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise _damaged(path, "an entry is missing or of the wrong kind") from error
    return found


def _index(path: Path) -> dict[str, Any] | None:
    """What checkpoint.json holds, of this kind and version; None where there is none."""
    try:
        index: Any = parse_json(read_file(path, follow=False), _DIGITS)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UsageError(f"cannot read the checkpoint {path}: {_said(error)}") from error
    except ValueError as error:
        raise _damaged(path, f"it is not JSON: {error}") from error
    if not isinstance(index, dict) or index.get("kind") != _KIND:
        raise _damaged(path, "it is no checkpoint")
    if index.get("version") != _VERSION:
        what = f"{path} has version {index.get('version')}; this amp-convert reads {_VERSION}"
        raise UsageError(what, mend=_ELSEWHERE)
    return index


@contextlib.contextmanager
def applied(folder: Path) -> Iterator[None]:
    """Go on from a state inside this: what does not fit the run is a UsageError. A state is whole
    when it was loaded, but may be that of a file which somebody made."""
    try:
        yield
    except AmpConvertError:
        raise
    except Exception as error:
        if problem := environment_problem(error):
            raise problem from error
        raise _damaged(folder / INDEX, "its state is not one of this run") from error


def remove(folder: Path) -> None:
    """Delete the state in `folder`, and the folder where nothing else is in it; not where another
    run has begun to use it."""
    with contextlib.suppress(OSError), hidden_folders.locked(folder):
        _remove(folder / INDEX)  # first: what is left without it counts for nothing
        _remove_others(folder, "")
        folder.rmdir()


def _refuse_other_run(folder: Path, stored: Mapping[str, Any], mine: Mapping[str, Any]) -> None:
    for name in dict.fromkeys((*stored, *mine)):
        there, here = stored.get(name), mine.get(name)
        if there != here:
            what = f"the checkpoint {folder} is of another run: {name} was {there}, is {here}"
            raise UsageError(what, mend=_ELSEWHERE)


def _readable(state: Mapping[str, Any], tensors: dict[str, torch.Tensor]) -> Any:
    """The state for checkpoint.json. Raises UsageError for one that could not be read again."""
    try:
        content = _packed(state, tensors, "state")
        parse_json(json.dumps({"state": content}).encode(), _DIGITS)
    except (ValueError, RecursionError) as error:
        what = f"the state of the training cannot be kept in a checkpoint: {error}"
        raise UsageError(what, mend=_WITHOUT) from error
    return content


# --- state to JSON and tensors, and back. A dict with the one key "$..." is one of ours. ---


def _packed(value: Any, tensors: dict[str, torch.Tensor], place: str) -> Any:
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else {"$float": str(value)}
    if isinstance(value, torch.Tensor):
        name = str(len(tensors))
        if value.layout is not torch.strided or value.dtype is torch.complex128:
            what = f"{place} is a {value.layout} tensor of {value.dtype}"
            raise UsageError(f"{what}, which a checkpoint cannot hold", mend=_WITHOUT)
        # Apart from all others: safetensors stores no memory twice, and no view.
        tensors[name] = value.detach().to("cpu", copy=True).contiguous()
        return {"$tensor": name}
    if isinstance(value, list | tuple):
        items = [_packed(item, tensors, f"{place}[{i}]") for i, item in enumerate(value)]
        return items if isinstance(value, list) else {"$tuple": items}
    if isinstance(value, Mapping):
        keys = [_packed_key(key, place) for key in value]
        items = [_packed(item, tensors, f"{place}.{key}") for key, item in value.items()]
        return {"$dict": list(map(list, zip(keys, items, strict=True)))}
    kind = type(value).__name__
    what = f"{place} is a {kind}, which a checkpoint cannot hold"
    raise UsageError(what, mend=_WITHOUT)


def _packed_key(key: Any, place: str) -> Any:
    if isinstance(key, str | int):
        return key
    what = f"{place} has a key of type {type(key).__name__}, which a checkpoint cannot hold"
    raise UsageError(what, mend=_WITHOUT)


def _unpacked(value: Any, tensors: Mapping[str, torch.Tensor]) -> Any:
    if isinstance(value, list):
        return [_unpacked(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    [(mark, held)] = value.items()
    if mark == "$tensor":
        return tensors[held]
    if mark == "$float":
        return float(held)
    if mark == "$tuple":
        return tuple(_unpacked(item, tensors) for item in held)
    if mark != "$dict":
        raise ValueError(mark)
    return {key: _unpacked(item, tensors) for key, item in held}


# --- files ---


def _remove(path: Path) -> None:
    with contextlib.suppress(OSError):
        path.unlink(missing_ok=True)


def _remove_others(folder: Path, keep: str) -> None:
    hidden_folders.sweep(folder, _OURS)
    with contextlib.suppress(OSError):
        for entry in folder.iterdir():
            if entry.name not in (keep, INDEX) and _STATE.fullmatch(entry.name):
                _remove(entry)


def _is_ours(entry: Path) -> bool:
    """Whether it is what runs leave here: a file of ours, and no link, or a hidden folder."""
    is_file = stat.S_ISREG(entry.lstat().st_mode)
    named = bool(_OURS.fullmatch(entry.name))
    return (named and is_file) or hidden_folders.is_hidden(entry, _OURS)


def _damaged(path: Path, why: str) -> UsageError:
    return UsageError(f"the checkpoint {path} is damaged: {why}", mend=_ELSEWHERE)


def _said(error: Exception) -> str:
    return (error.strerror if isinstance(error, OSError) else "") or str(error)
