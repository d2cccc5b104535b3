"""What `make fuzz` feeds: six kinds of files, made wrong, and who reads them.

A kind is a function that writes a case into a folder, and one that does there what the command does
with such a file.
"""

from __future__ import annotations

import contextlib
import io
import json
import random
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from amp_convert import pipeline
from amp_convert.cli.flags import convert_settings
from amp_convert.core.errors import UsageError
from amp_convert.core.files import digests
from amp_convert.core.progress import Silent
from amp_convert.gate import baseline as baselines
from amp_convert.gate import compare as gating
from amp_convert.gate.terminal import render
from amp_convert.loading.source import output_folder
from amp_convert.report.folder import check_writable
from amp_convert.report.writers.json_report import json_text
from amp_convert.rules.load import load_rules
from amp_convert.rules.rule_set import Place
from amp_convert.validate.training import checkpoint
from amp_convert.validate.training import compare as training
from amp_convert.validate.training.arm_specs import ARMS
from amp_convert.validate.training.options import Options
from amp_convert.validate.training.recipe import Recipe
from amp_convert.validate.training.training_mode import training as in_training
from tests import evidence
from tests.benchmarks.mutations import mutated_bytes, mutated_json, mutated_toml
from tests.training import OPTIMIZERS, POINTS, classify, convert_net
from tests.training_evidence import parity

ROOT = Path(__file__).parents[2]
PYPROJECT = """\
[tool.amp-convert]
dtype = "float16"
rules = ["default", "mine.toml"]
device = "cpu"
out = "reports/it"
baseline = "good.json"
calibrate = 1
batches = 2
eval-seconds = 9.5
train = true
steps = 3
seeds = 5
margin = 0.1
accumulate = 2
clip-norm = 1.0
loss-scale = "dynamic"
initial-scale = 1024.0
scale-growth = 4.0
checkpoint = "kept"
checkpoint-every = 7
tolerance = 0.5
metric-tolerance = 0.02
train-metric = "f1"
"""
RULES = """\
extends = ["default"]
painting = "autocast"
[guards]
activation_headroom = 4.0
output_error = false
[rewrites]
clamp_masks = true
[[rule]]
ops = ["aten.linear", "aten.mm.default"]
category = "allow"
reason = "matrix product"
dtype = "float16"
device = "cpu"
mode = "train"
[[rule]]
layer = "encoder.*.attention"
category = "deny"
reason = "not here"
[[rule]]
module = "torch.nn.LayerNorm"
category = "infer"
reason = "a normalisation"
"""


def _rules(folder: Path, luck: random.Random) -> None:
    texts = [RULES, RULES, *((ROOT / f"rules/{n}.toml").read_text() for n in ("default", "half"))]
    (folder / "mine.toml").write_bytes(mutated_toml(luck.choice(texts), luck))


def _plan(folder: Path, luck: random.Random) -> None:
    (folder / "mine.toml").write_bytes(mutated_toml(evidence.plan().to_toml(), luck))


def _read_rules(folder: Path) -> None:
    rules = load_rules([str(folder / "mine.toml")])
    place = Place("float16", "cpu", "eval")
    rules.match_op(place, "aten.linear.default")
    rules.match_override(
        place, node="0/aten.linear#0", layer="encoder.0.attention", modules=["torch.nn.LayerNorm"]
    )


@cache
def _good_report() -> str:
    return json_text(evidence.report(training=parity()))


@cache
def _good_baseline() -> str:
    return baselines.baseline_text(baselines.baseline_of(evidence.report(training=parity())))


def _report(folder: Path, luck: random.Random) -> None:
    (folder / "report.json").write_bytes(mutated_json(_good_report(), luck))
    (folder / "good.json").write_text(_good_baseline())


def _baseline(folder: Path, luck: random.Random) -> None:
    (folder / "report.json").write_text(_good_report())
    (folder / "good.json").write_bytes(mutated_json(_good_baseline(), luck))


def _gate(folder: Path) -> None:
    """As `amp-convert gate` does, once to judge and once with --update."""
    current = baselines.load_report(folder / "report.json")
    expected = baselines.load_baseline(folder / "good.json")
    result = gating.compare(current, expected)
    json.loads(result.to_json(), parse_constant=_no_json)
    render(Console(file=io.StringIO()), result)
    baselines.write_baseline(current, folder / "good.json")


def _no_json(token: str) -> None:
    raise AssertionError(f"{token} was written")


def _pyproject(folder: Path, luck: random.Random) -> None:
    (folder / "pyproject.toml").write_bytes(mutated_toml(PYPROJECT, luck))
    (folder / "mine.toml").write_text(RULES)
    (folder / "good.json").write_text(_good_baseline())


def _read_settings(folder: Path) -> None:
    """As `amp-convert` does, until it would run the model file, which is not there."""
    source = str(folder / "model.py")
    settings = convert_settings(source, {})
    check_writable(output_folder(source, settings.out))
    try:
        pipeline.convert(source, settings, Silent(), folder)
    except UsageError as error:
        if not str(error).startswith("there is no file"):
            raise


@cache
def _net() -> Any:
    return convert_net(torch.float16)


def _comparison(folder: Path) -> training._Comparison:
    recipe = Recipe(classify, OPTIMIZERS["adamw"])
    options = Options(steps=4, checkpoint=folder / "kept", checkpoint_every=1)
    ignored = lambda *_: None  # noqa: E731
    return training._Comparison(_net(), recipe, POINTS, options, ignored, lambda: False, ignored)


@cache
def _good_checkpoint() -> dict[str, bytes]:
    with tempfile.TemporaryDirectory() as place:
        run = _comparison(Path(place))
        with in_training(run._model, run._converted):
            race = run._race(0, ARMS)
            race.step()
            run._metric = "accuracy"
            assert run._save(race)
        return {path.name: path.read_bytes() for path in (Path(place) / "kept").iterdir()}


def _checkpoint(folder: Path, luck: random.Random) -> None:
    """Either file changed; half of those that can be read get the digests that go with them."""
    files = dict(_good_checkpoint())
    index = checkpoint.INDEX
    [tensors] = files.keys() - {index}
    if luck.random() < 0.2:
        files[tensors] = mutated_bytes(files[tensors], luck)
    else:
        files[index] = mutated_json(files[index].decode(), luck)
    with contextlib.suppress(ValueError, RecursionError, TypeError, KeyError):
        if luck.random() < 0.7:
            found = json.loads(files[index])
            found["state_sha256"] = digests.of_text(json.dumps(found["state"]))
            (folder / "tensors").write_bytes(files[tensors])
            found["sha256"] = digests.of_file(folder / "tensors")
            files[index] = json.dumps(found).encode()
    (folder / "tensors").unlink(missing_ok=True)
    (folder / "kept").mkdir()
    for name, data in files.items():
        (folder / "kept" / name).write_bytes(data)


def _resume(folder: Path) -> None:
    """As training does: begin from the checkpoint, and make the next step."""
    run = _comparison(folder)
    with checkpoint.alone(folder / "kept"), in_training(run._model, run._converted):
        if (resumed := run._resume()) is not None:
            race = run._race(resumed["seed"], ARMS)
            with checkpoint.applied(folder / "kept"):
                race.load(resumed["race"])
            race.step()


KINDS: dict[str, tuple[Callable[[Path, random.Random], None], Callable[[Path], None]]] = {
    "rules": (_rules, _read_rules),
    "plan": (_plan, _read_rules),
    "baseline": (_baseline, _gate),
    "report": (_report, _gate),
    "checkpoint": (_checkpoint, _resume),
    "pyproject": (_pyproject, _read_settings),
}
MAY_CHANGE = {"baseline": ("good.json",), "report": ("good.json",), "checkpoint": ("kept",)}
