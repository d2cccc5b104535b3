"""A checkpoint is kept whole or not replaced, gives back the very bits, and runs no code."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from amp_convert.core.errors import ModelError, UsageError
from amp_convert.core.files import digests
from amp_convert.validate.training import checkpoint
from tests.validate.training.checkpoint_states import a_state, assert_same

MINE = {"model": "abc", "steps": 50, "clip_norm": None, "scale": 0.1}


def test_what_was_saved_is_loaded(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "b"
    checkpoint.save(folder, a_state(), fingerprint=MINE)
    assert_same(a_state(), checkpoint.load(folder, MINE))


_plain = st.none() | st.booleans() | st.integers() | st.floats() | st.text()


@given(
    st.dictionaries(
        st.text() | st.integers(),
        st.recursive(
            _plain,
            lambda inner: (
                st.lists(inner)
                | st.tuples(inner, inner)
                | st.dictionaries(st.text() | st.integers(), inner)
            ),
            max_leaves=8,
        ),
    )
)
def test_any_plain_state_comes_back(state: dict[Any, Any]) -> None:
    tensors: dict[str, torch.Tensor] = {}
    packed = json.loads(json.dumps(checkpoint._packed(state, tensors, "state"), allow_nan=False))
    assert_same(state, checkpoint._unpacked(packed, tensors))


def test_a_new_state_replaces_the_old_one_and_leaves_nothing_behind(tmp_path: Path) -> None:
    for seed in range(3):
        checkpoint.save(tmp_path, a_state(seed), fingerprint=MINE)
        assert len(list(tmp_path.iterdir())) == 2
    assert_same(a_state(2), checkpoint.load(tmp_path, MINE))
    checkpoint.remove(tmp_path)
    assert not tmp_path.exists()


def test_there_is_none(tmp_path: Path) -> None:
    assert checkpoint.load(tmp_path / "none", MINE) is None
    checkpoint.check(tmp_path / "new" / "one")
    assert checkpoint.load(tmp_path / "new" / "one", MINE) is None
    assert list((tmp_path / "new" / "one").iterdir()) == []


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"steps": 100}, "steps was 50, is 100"),
        ({"model": "abd"}, "model was abc, is abd"),
        ({"more": 1}, "more was None, is 1"),
        ({"scale": 0.1 + 2**-56}, "scale was 0.1, is 0.10000000000000002"),
    ],
)
def test_another_runs_checkpoint_is_refused(
    change: dict[str, Any], said: str, tmp_path: Path
) -> None:
    checkpoint.save(tmp_path, a_state(), fingerprint=MINE)
    with pytest.raises(UsageError) as refused:
        checkpoint.load(tmp_path, {**MINE, **change})
    assert str(refused.value) == (
        f"the checkpoint {tmp_path} is of another run: {said}. "
        "Give another folder, or delete this one to begin anew."
    )


def _tensors(folder: Path) -> Path:
    [file] = folder.glob("*.safetensors")
    return file


def _edit(folder: Path, **entries: Any) -> None:
    path = folder / checkpoint.INDEX
    path.write_text(json.dumps({**json.loads(path.read_text()), **entries}))


def _text(folder: Path, text: str) -> None:
    (folder / checkpoint.INDEX).write_text(text)


def _fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def _seal(folder: Path, state: Any) -> None:
    """Give it a state that somebody made, with the digest that goes with it."""
    _edit(folder, state=state, state_sha256=digests.of_text(json.dumps(state)))


DAMAGES: dict[str, tuple[Any, str]] = {
    "cut": (lambda f: (f / checkpoint.INDEX).write_bytes(b'{"kind"'), "it is not JSON"),
    "list": (lambda f: (f / checkpoint.INDEX).write_text("[]"), "it is no checkpoint"),
    "kind": (lambda f: _edit(f, kind="other"), "it is no checkpoint"),
    "gone": (lambda f: _tensors(f).unlink(), "No such file or directory"),
    "short": (lambda f: _tensors(f).write_bytes(_tensors(f).read_bytes()[:-1]), "is not what was"),
    "path": (lambda f: _edit(f, tensors="../../etc/passwd"), "it names '../../etc/passwd'"),
    "mark": (lambda f: _seal(f, {"$pickle": ""}), "an entry is missing or of the wrong"),
    "name": (lambda f: _seal(f, {"$tensor": "99"}), "an entry is missing or of the wrong"),
    "state": (lambda f: _edit(f, state={"$dict": []}), "its state is not what was written"),
    "deep": (lambda f: _text(f, "[" * 100_000), "it is nested too deeply"),
    "deep state": (lambda f: _text(f, "[" * 300 + "]" * 300), "it is nested too deeply"),
    "digits": (lambda f: _text(f, "1" * 5_001), "has 5001 digits"),
    "infinity": (lambda f: _text(f, "-1e999"), "the number -1e999 is too large"),
    "nan": (lambda f: _text(f, "NaN"), "NaN is not JSON"),
    "twice": (lambda f: _text(f, '{"kind": 1, "kind": 2}'), "the key 'kind' is repeated"),
    "bytes": (lambda f: (f / checkpoint.INDEX).write_bytes(b"\xff"), "it is not UTF-8"),
    "pipe": (lambda f: _fifo(_tensors(f)), "is not what was written"),
    "prints": (lambda f: _edit(f, fingerprint=[]), "an entry is missing or of the wrong kind"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_checkpoint_is_refused(name: str, tmp_path: Path) -> None:
    damage, said = DAMAGES[name]
    checkpoint.save(tmp_path, a_state(), fingerprint=MINE)
    damage(tmp_path)
    with pytest.raises(UsageError, match=r"checkpoint\.json is damaged: ") as refused:
        checkpoint.load(tmp_path, MINE)
    assert said in str(refused.value)


def test_another_version_is_refused(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, a_state(), fingerprint=MINE)
    _edit(tmp_path, version=1)
    with pytest.raises(UsageError, match=r"has version 1; this amp-convert reads 2\."):
        checkpoint.load(tmp_path, MINE)


def test_a_folder_with_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(UsageError, match=r"is no checkpoint: it holds thesis\.tex"):
        checkpoint.check(tmp_path)
    checkpoint.save(tmp_path, a_state(), fingerprint=MINE)
    checkpoint.remove(tmp_path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["thesis.tex"]


def test_no_link_is_followed(tmp_path: Path) -> None:
    """Not to the folder, nor to either file: not to read, to write or to delete."""
    theirs, mine = tmp_path / "theirs", tmp_path / "mine"
    checkpoint.save(theirs, a_state(), fingerprint=MINE)
    before = {path.name: path.read_bytes() for path in theirs.iterdir()}
    mine.symlink_to(theirs)
    with pytest.raises(UsageError, match="mine is a link"):
        checkpoint.check(mine)
    checkpoint.remove(mine)
    mine.unlink()
    mine.mkdir()
    for path in (theirs / checkpoint.INDEX, _tensors(theirs)):
        link = mine / path.name
        link.symlink_to(path)
        with pytest.raises(UsageError, match=f"it holds {path.name}"):
            checkpoint.check(mine)
        with pytest.raises(UsageError, match=r"cannot read the checkpoint|is not what was"):
            checkpoint.load(mine, MINE)
        link.unlink()
        (mine / checkpoint.INDEX).write_bytes((theirs / checkpoint.INDEX).read_bytes())
    (mine / _tensors(theirs).name).symlink_to(_tensors(theirs))
    checkpoint.save(mine, a_state(1), fingerprint=MINE)
    assert_same(a_state(1), checkpoint.load(mine, MINE))
    assert {path.name: path.read_bytes() for path in theirs.iterdir()} == before


def test_a_second_run_is_refused_and_deletes_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "c"
    with checkpoint.alone(folder):
        checkpoint.save(folder, a_state(), fingerprint=MINE)
        with pytest.raises(UsageError, match="another run of amp-convert is using the checkpoint"):
            checkpoint.alone(folder).__enter__()
        checkpoint.remove(folder)  # by a run that has come to its end
        assert_same(a_state(), checkpoint.load(folder, MINE))
    with checkpoint.alone(folder):
        pass
    checkpoint.remove(folder)
    assert not folder.exists()


def test_what_does_not_fit_the_run_is_one_line(tmp_path: Path) -> None:
    def apply(error: Exception) -> None:
        with checkpoint.applied(tmp_path):
            raise error

    with pytest.raises(UsageError, match="is damaged: its state is not one of this run"):
        apply(KeyError("race"))
    with pytest.raises(ModelError, match="other batches"):
        apply(ModelError("other batches"))


def test_a_file_in_the_folders_place(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for call in (
        lambda: checkpoint.check(tmp_path / "file"),
        lambda: checkpoint.save(tmp_path / "file", {}, fingerprint=MINE),
    ):
        with pytest.raises(UsageError, match=r"checkpoint .*file"):
            call()


@pytest.mark.parametrize("value", [10**1_001, "deep"])
def test_what_could_not_be_read_again_is_not_written(value: Any, tmp_path: Path) -> None:
    if value == "deep":
        value = []
        for _ in range(500):
            value = [value]
    with pytest.raises(UsageError, match="cannot be kept in a checkpoint"):
        checkpoint.save(tmp_path, {"a": value}, fingerprint=MINE)
    assert list(tmp_path.iterdir()) == []


UNHOLDABLE = {"object": object(), "set": {1, 2}, "function": {"f": len}, "key": {(1, 2): 3}}


@pytest.mark.parametrize("kind", UNHOLDABLE)
def test_what_a_checkpoint_cannot_hold(kind: str, tmp_path: Path) -> None:
    checkpoint.save(tmp_path, {"a": 1}, fingerprint=MINE)
    with pytest.raises(UsageError, match=r"state\.b.* which a checkpoint cannot hold"):
        checkpoint.save(tmp_path, {"b": UNHOLDABLE[kind]}, fingerprint=MINE)
    assert checkpoint.load(tmp_path, MINE) == {"a": 1}
