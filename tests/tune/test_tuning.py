"""Tuning a small model: the goals, what is written, and what cannot be reached."""

from __future__ import annotations

import csv
import math
import tomllib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from xml.etree.ElementTree import fromstring

import pytest

from amp_convert.report.charts.frontier_chart import frontier_svg
from amp_convert.report.writers.tune_files import TuneReport, frontier_csv, rules_toml
from amp_convert.rules.rule import LOSS_LIMITS, GuardLimits
from amp_convert.tune.results import Cost, Goals, Point, Tuned, Unit
from amp_convert.tune.tuning import MOST_TRIALS, undominated
from tests.command import Outcome, amp

DEEP = """
import torch
from torch import nn

class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(32), nn.Linear(32, width), nn.Linear(width, 32)

    def forward(self, x):
        return x + self.down(torch.relu(self.up(self.norm(x))))

def build_model():
    torch.manual_seed(0)
    return nn.Sequential(*(Block(16 * (i + 1)) for i in range(4)), nn.Linear(32, 5))

def example_inputs():
    return torch.randn(16, 32, generator=torch.Generator().manual_seed(0))

def eval_batches():
    for seed in range(3):
        yield torch.randn(16, 32, generator=torch.Generator().manual_seed(seed)), None

def metrics(outputs, target):
    return {"size": outputs.abs().mean().item(), "nan": float("nan")}

lower_is_better = ("size",)
"""


PARTS = """
class Parts(nn.Sequential):
    def forward(self, x):
        return super().forward(x if float(x.sum()) < 1e9 else x + 1)

"""
INPLACE = """
class Doubles(nn.Sequential):
    def forward(self, x):
        return super().forward(x.mul_(2))

"""
ROUTED = """
import torch
from torch import nn

class Net(nn.Module):
    # Two experts that are chosen by nearly equal scores of what a product far before them makes.
    def __init__(self):
        super().__init__()
        self.mix, self.gate = nn.Linear(32, 32), nn.Linear(32, 2, bias=False)
        self.one, self.other, self.head = nn.Linear(32, 64), nn.Linear(32, 64), nn.Linear(64, 5)
        with torch.no_grad():
            self.gate.weight[1] = self.gate.weight[0] + 3e-3 * torch.randn(32)

    def forward(self, x):
        h = self.mix(x)
        first = self.gate(h).argmax(-1, keepdim=True) == 0
        return self.head(torch.where(first, self.one(h), self.other(h)))

def build_model():
    torch.manual_seed(1)
    return Net()

def example_inputs():
    return torch.randn(256, 32, generator=torch.Generator().manual_seed(0))

def eval_batches():
    for seed in range(3):
        yield torch.randn(256, 32, generator=torch.Generator().manual_seed(seed)), None
"""


def tuned(
    folder: Path, *arguments: str, code: int = 0, text: str = DEEP
) -> tuple[Outcome, Tuned | None]:
    (folder / "model.py").write_text(text)
    found = amp(folder, "tune", "model.py", *arguments)
    assert found.code == code, found.err
    path = folder / "reports" / "model-tuned" / "tune.json"
    return found, _read(path) if path.exists() else None


def _read(path: Path) -> Tuned:
    return TuneReport.model_validate_json(path.read_text()).tuned


@pytest.mark.slow
def test_the_cheapest_plan_within_the_tolerance(tmp_path: Path) -> None:
    outcome, found = tuned(tmp_path, "--tolerance", "1.2e-4")
    assert found is not None
    assert found.reached
    assert found.trials <= MOST_TRIALS
    assert found.lowest.error > 1.2e-4 >= found.chosen.error
    assert 0 < len(found.chosen.units) < len(found.units)
    assert "REACHED" in outcome.out
    # As cheap as any plan of the frontier that is right.
    right = [point for point in found.frontier if point.error <= 1.2e-4]
    assert found.chosen.price <= min(point.price for point in right) * 1.1 + 1e-3
    # The rules give the plan back, by the command itself.
    rules = tmp_path / "reports" / "model-tuned" / "tuned.toml"
    again = amp(tmp_path, "convert", "model.py", "--rules", str(rules), "--no-train", "--json")
    report = again.json
    assert report["inference"]["outputs"][0]["rel_l2"] == pytest.approx(
        found.chosen.error, rel=0.01
    )
    kept = {d["layer"] for d in report["plan"]["decisions"] if d["dtype"] == "float32"}
    assert {name for name in found.chosen.units if name} <= kept


@pytest.mark.slow
def test_the_frontier_is_measured_and_ordered(tmp_path: Path) -> None:
    _, found = tuned(tmp_path, "--tolerance", "1e-9", code=0)
    assert found is not None
    assert found.chosen.error == 0  # all of it in FP32
    assert len(found.frontier) >= 6
    errors = [point.error for point in found.frontier]
    assert errors == sorted(errors)
    prices = [point.price for point in found.frontier]
    assert prices == sorted(prices, reverse=True)
    rows = list(csv.DictReader((tmp_path / "reports/model-tuned/frontier.csv").open()))
    assert [float(row["error"]) for row in rows] == errors
    fromstring((tmp_path / "reports/model-tuned/frontier.svg").read_text())


@pytest.mark.slow
def test_a_metric_is_held_to_its_drop(tmp_path: Path) -> None:
    _, found = tuned(tmp_path, "--metric", "size", "--max-drop", "1e-6")
    assert found is not None
    assert found.reached
    fp32, have = dict(found.fp32_metrics)["size"], dict(found.chosen.metrics)["size"]
    assert have - fp32 <= 1e-6


@pytest.mark.slow
def test_what_a_router_is_led_astray_by_is_kept_and_nothing_else(tmp_path: Path) -> None:
    """No gradient shows it: the product far before the scores was tried alone."""
    _, found = tuned(tmp_path, "--dtype", "bfloat16", "--tolerance", "5e-3", text=ROUTED)
    assert found is not None
    assert found.reached
    assert found.lowest.error > 5e-3
    assert found.chosen.units == ("mix",)


@pytest.mark.slow
def test_what_cannot_be_reached_ends_with_1_and_says_what_can(tmp_path: Path) -> None:
    outcome, found = tuned(tmp_path, "--tolerance", "1.2e-4", "--speed-at-least", "1000", code=1)
    assert found is not None
    assert not found.reached
    assert "NOT REACHED" in outcome.out
    assert found.chosen.error <= 1.2e-4
    assert "nearest" in outcome.out


@pytest.mark.slow
@pytest.mark.parametrize(
    ("metric", "words"), [("nan", "is nan in FP32"), ("accuracy", "there is no metric accuracy")]
)
def test_metrics_that_nothing_can_be_held_to(tmp_path: Path, metric: str, words: str) -> None:
    outcome, found = tuned(tmp_path, "--metric", metric, "--max-drop", "0.1", code=2)
    assert words in outcome.err
    assert found is None


@pytest.mark.slow
def test_a_model_in_parts_is_refused(tmp_path: Path) -> None:
    text = DEEP.replace("return nn.Sequential(*", "return Parts(*").replace(
        "def build_model", PARTS + "def build_model"
    )
    outcome, found = tuned(tmp_path, "--tolerance", "1e-3", code=4, text=text)
    assert "captured whole" in outcome.err
    assert found is None


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "there is no goal to tune for"),
        (("--metric", "size"), "--metric and --max-drop go together"),
        (("--max-drop", "0.1"), "--metric and --max-drop go together"),
        (("--speed-at-least", "nan"), "--speed-at-least is nan"),
        (("--tolerance", "1e-3", "--cost", "guessed"), "--cost is guessed"),
        (("--tolerance", "-1"), "tolerance"),
    ],
)
def test_goals_that_say_nothing(tmp_path: Path, arguments: tuple[str, ...], words: str) -> None:
    outcome, _ = tuned(tmp_path, *arguments, code=2)
    assert words in outcome.err
    assert not (tmp_path / "reports").exists()


def point(error: float, speed: float, price: float, *units: str) -> Point:
    return Point(units, error, price, error, speed, 0.5, (("accuracy", 0.9),))


def result() -> Tuned:
    chosen = point(1e-3, 1.5, 0.2, "a")
    return Tuned(
        goals=Goals(tolerance=2e-3),
        cost=Cost.MEASURED,
        reached=True,
        chosen=chosen,
        given=point(5e-3, 1.9, 0.0),
        lowest=point(9e-3, 2.0, 0.0),
        units=(Unit("a", ('a"b/op#0',), 3e-3, 0.25, 10), Unit("b", ("b/op#0",), 4e-3, 0.5, 20)),
        fp32_metrics=(("accuracy", 0.91),),
        frontier=(chosen, point(9e-3, 2.0, 0.0)),
        trials=3,
    )


def test_the_rules_file_says_why_and_finds_its_rules(tmp_path: Path) -> None:
    (tmp_path / "own.toml").write_text("")
    text = rules_toml(result(), ["default", str(tmp_path / "own.toml")], tmp_path / "out")
    read = tomllib.loads(text)
    assert read["extends"] == ["default", "../own.toml"]
    assert read["guards"] == dict.fromkeys(LOSS_LIMITS, False)
    assert [rule["node"] for rule in read["rule"]] == ['a"b/op#0']
    assert read["rule"][0]["reason"] == (
        "its layer adds 36.0 % of the squared error while low; FP32 costs 0.25 ms a call"
    )


def test_the_limits_that_are_switched_off_are_limits() -> None:
    assert set(LOSS_LIMITS) < set(GuardLimits.__dataclass_fields__)
    kept = set(GuardLimits.__dataclass_fields__) - set(LOSS_LIMITS)
    assert {"activation_headroom", "weight_headroom", "smallest_eps", "choice_error"} <= kept


@pytest.mark.parametrize("cost", Cost)
def test_the_frontier_has_what_no_other_beats(cost: Cost) -> None:
    better: Callable[..., Point] = point
    points = [better(1.0, 3.0, 0.0), better(0.5, 2.0, 0.1), better(0.6, 1.9, 0.2)]
    points.append(better(math.nan, 9.0, -1.0))
    found = undominated(points, cost)
    assert found[:2] == (points[1], points[0])


def test_the_picture_and_the_table_hold_odd_numbers() -> None:
    odd = replace(result(), chosen=point(0.0, 1.0, 0.0), frontier=(point(math.inf, 1.0, 0.0, "x"),))
    fromstring(frontier_svg(odd))
    rows = list(csv.DictReader(frontier_csv(odd.frontier).splitlines()))
    assert rows[0]["error"] == "inf"
    assert rows[0]["units"] == "x"


@pytest.mark.slow
def test_a_model_that_writes_to_its_inputs_and_a_second_run(tmp_path: Path) -> None:
    """Each call gets copies; and what tune wrote before is replaced."""
    text = DEEP.replace("def build_model", INPLACE + "def build_model").replace(
        "return nn.Sequential(*", "return Doubles(*"
    )
    for _ in range(2):
        _, found = tuned(tmp_path, "--tolerance", "1.2e-4", text=text)
        assert found is not None
        assert found.reached
        assert found.given.error == found.lowest.error < 1e-3
