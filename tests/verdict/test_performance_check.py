"""Is the converted model faster? From both sides of the limit, and where nothing can be said."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from amp_convert.core import device as devices
from amp_convert.report.sections.summary import verdict_sentence
from amp_convert.validate.inference.results import ArmCost, Divergence
from amp_convert.verdict.performance_check import performance_check
from amp_convert.verdict.thresholds import Thresholds
from tests.evidence import divergence, report

NO_KERNELS = "this CPU has no instructions for float16"


def timed(fp32: float | None, frozen: float | None, slow: str = "") -> Divergence:
    times = {"fp32": fp32, "autocast": 3.0, "mixed": 2.5, "frozen": frozen}
    note = "it does not run, so it has no time: no kernel"
    costs = tuple(ArmCost(arm, t, None, "" if t is not None else note) for arm, t in times.items())
    return divergence(costs=costs, slow_kernels=slow)


CASES = [
    # FP32, frozen, what is slow, asked; status, value, required
    ((10.0, 5.0, "", None), ("pass", 2.0, False)),
    ((10.0, 10.0, "", None), ("pass", 1.0, False)),
    ((10.0, 12.5, "", None), ("unchecked", 0.8, False)),
    ((10.0, 12.5, NO_KERNELS, None), ("unchecked", 0.8, False)),
    ((10.0, 5.0, "", 1.5), ("pass", 2.0, True)),
    ((10.0, 5.0, "", 2.0), ("pass", 2.0, True)),
    ((10.0, 5.0, "", 2.001), ("fail", 2.0, True)),
    ((10.0, 12.5, "", 0.5), ("pass", 0.8, True)),
    ((10.0, 12.5, NO_KERNELS, 0.5), ("unchecked", 0.8, True)),
    ((10.0, None, "", 1.5), ("unchecked", None, True)),
    ((None, 5.0, "", None), ("unchecked", None, False)),
    ((10.0, 0.0, "", 1.5), ("unchecked", None, True)),
]


@pytest.mark.parametrize(("given", "expected"), CASES, ids=[str(given) for given, _ in CASES])
def test_the_check(
    given: tuple[float | None, float | None, str, float | None],
    expected: tuple[str, float | None, bool],
) -> None:
    *measured, asked = given
    limits = Thresholds.for_dtype("float16", min_speedup=asked)
    check = performance_check(timed(*measured), limits)  # type: ignore[arg-type]
    assert (check.status, check.value, check.required) == expected
    assert check.threshold == (asked or 1.0)
    if measured[2]:
        assert check.reason.startswith(NO_KERNELS)


def test_nothing_was_timed() -> None:
    limits = Thresholds.for_dtype("float16")
    for evidence in (None, divergence()):
        check = performance_check(evidence, limits)
        assert (check.status, check.reason) == ("unchecked", "no forward pass was timed")


def test_the_first_line_says_that_it_is_slower() -> None:
    slower = report(inference=timed(10.0, 12.5))
    assert slower.verdict.status == "pass"
    assert verdict_sentence(slower).startswith("the converted model is slower than FP32: a forward")
    for other in (timed(10.0, 5.0), timed(10.0, 12.5, NO_KERNELS), timed(10.0, None)):
        assert "slower" not in verdict_sentence(report(inference=other))


def test_which_devices_have_fast_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, cuda, meta = map(torch.device, ("cpu", "cuda", "meta"))
    for features, dtype, slow in (
        ({"avx512_bf16": True}, torch.bfloat16, False),
        ({"avx512_bf16": True}, torch.float16, True),
        ({"amx_fp16": True}, torch.float16, False),
        ({"amx_bf16": False, "avx512_bf16": False}, torch.bfloat16, True),
        ({}, torch.bfloat16, False),  # nothing is known
    ):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda given=features: given)
        assert bool(devices.slow_kernels(cpu, dtype)) is slow, (features, dtype)
    for capability, dtype, slow in (
        ((7, 0), torch.float16, False),
        ((7, 5), torch.bfloat16, True),
        ((8, 0), torch.bfloat16, False),
        ((6, 1), torch.float16, True),
    ):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, c=capability: c)
        assert bool(devices.slow_kernels(cuda, dtype)) is slow, (capability, dtype)
    assert devices.slow_kernels(meta, torch.float16) == ""


def test_the_limit_is_checked() -> None:
    with pytest.raises(Exception, match="min_speedup"):
        dataclasses.replace(Thresholds.for_dtype("float16"), min_speedup=float("nan"))
