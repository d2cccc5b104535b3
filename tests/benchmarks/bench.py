"""`make bench`: what the project must reach, measured side by side in one run.

Speeds are noisy: arms take turns, medians are printed, and ratios are what to read. Nothing here
passes or fails; the tests hold what is not a time.
"""

from __future__ import annotations

import copy
import os
import platform
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import BertConfig, BertModel

from amp_convert.capture.regions import capture
from amp_convert.core.device import choose, milliseconds, move
from amp_convert.core.memory_meter import peak_bytes
from amp_convert.profile.calibrate import profile
from amp_convert.rewrite.conversion import convert_captured
from amp_convert.rewrite.converted_model import ConvertedModel
from amp_convert.rules.load import load_rules
from amp_convert.validate.inference.compare import compare

TURNS = 15
Arms = dict[str, Callable[[], Any]]


def main() -> None:
    """Print every figure."""
    warnings.simplefilter("ignore")
    device = choose("auto")
    print(
        f"PyTorch {torch.__version__}, {platform.processor() or platform.machine()}, "
        f"{torch.get_num_threads()} threads, device {device.name} ({device.reason})"
    )
    start_up()
    model, inputs = bert(device.device)
    for dtype in (torch.bfloat16, torch.float16):
        converted = convert(model, inputs, dtype)
        turns = TURNS if dtype is torch.bfloat16 or device.type == "cuda" else 3
        speed(model, converted, inputs, dtype, turns)
        validation(model, converted, inputs, dtype, 5 if turns == TURNS else 2)
    training_step(model, convert(model, inputs, torch.bfloat16), inputs, torch.bfloat16)


def start_up() -> None:
    """How long the command takes to answer, and whether an import brings torch along."""
    times = []
    for _ in range(5):
        begin = time.perf_counter()
        subprocess.run(
            [sys.executable, "-m", "amp_convert", "--help"], check=True, capture_output=True
        )
        times.append(time.perf_counter() - begin)
    code = "import sys, amp_convert; print('torch' in sys.modules)"
    imported = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True
    ).stdout.strip()
    print("\nStart-up")
    print(f"  amp-convert --help             {statistics.median(times):.2f} s   (bound 0.5 s)")
    print(f"  import amp_convert has torch   {imported}    (must be False)")


def bert(device: torch.device) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """A 4-layer BERT of base width with random weights, and inputs of batch 8, length 128."""
    torch.manual_seed(0)
    model = BertModel(BertConfig(num_hidden_layers=4), add_pooling_layer=False).eval().to(device)
    mask = torch.ones(8, 128, dtype=torch.long)
    mask[0, -16:] = 0
    inputs = {"input_ids": torch.randint(0, 30000, (8, 128)), "attention_mask": mask}
    return model, move(inputs, device)


def convert(
    model: nn.Module, inputs: dict[str, torch.Tensor], dtype: torch.dtype
) -> ConvertedModel:
    """The model by the default rules, in eval mode."""
    captured = capture(model, (), inputs)
    stats = profile(captured, [((), inputs)])
    return convert_captured(captured, load_rules(["default"]), stats, dtype).eval()


def speed(
    model: nn.Module,
    converted: ConvertedModel,
    inputs: dict[str, torch.Tensor],
    dtype: torch.dtype,
    turns: int,
) -> None:
    """Inference times of all arms, and the number of casts."""
    device = converted.captured.device
    all_low, frozen = copy.deepcopy(model).to(dtype), converted.freeze()

    def autocast() -> None:
        with torch.autocast(device.type, dtype=dtype):
            model(**inputs)

    arms: Arms = {
        "fp32": lambda: model(**inputs),
        "autocast": autocast,
        "all low": lambda: all_low(**inputs),
        "converted": lambda: converted(**inputs),
        "frozen": lambda: frozen(**inputs),
    }
    times = medians(arms, device, turns)
    name = str(dtype).removeprefix("torch.")
    plan = converted.plan
    print(
        f"\n4-layer BERT, batch 8x128, {name} inference on {device.type}, median of {turns} turns"
    )
    for arm, value in times.items():
        print(f"  {arm:<10} {value:8.1f} ms   {times['fp32'] / value:5.2f} times FP32's speed")
    print(
        f"  frozen / all low               {times['frozen'] / times['all low']:.3f}   (bound 1.10)"
    )
    print(f"  frozen / autocast              {times['frozen'] / times['autocast']:.3f}   (bound 1)")
    casts = plan.eval_casts
    print(
        f"  casts                          {casts.activations} of activations, {casts.weights} of "
        f"weights, at {casts.borders} borders"
    )
    print(
        f"  low precision                  {plan.share_nodes_low():.1%} of nodes, "
        f"{plan.share_macs_low():.1%} of multiply-adds"
    )


def validation(
    model: nn.Module,
    converted: ConvertedModel,
    inputs: dict[str, torch.Tensor],
    dtype: torch.dtype,
    turns: int,
) -> None:
    """What comparing one batch node by node costs, in FP32 forward passes."""
    device = converted.captured.device

    def validate() -> None:
        compare(converted, [((), inputs, None)], autocast=False)

    arms: Arms = {"fp32": lambda: model(**inputs), "validate": validate}
    times = medians(arms, device, turns)
    with torch.no_grad():
        memory = peak_bytes(validate) / peak_bytes(arms["fp32"])
    name = str(dtype).removeprefix("torch.")
    print(f"Validating one batch, {name}, every node, local and accumulated")
    ratio = times["validate"] / times["fp32"]
    print(f"  time / FP32 forward            {ratio:.2f}   (bound 6)")
    print(f"  peak memory / FP32 forward     {memory:.2f}   (bound 2.5; weights not counted)")


def training_step(
    model: nn.Module,
    converted: ConvertedModel,
    inputs: dict[str, torch.Tensor],
    dtype: torch.dtype,
) -> None:
    """Forward and backward, dropout included, from outputs to `.grad`; no optimizer, which is the
    same for all arms but the all-low one."""
    device = converted.captured.device
    all_low = copy.deepcopy(model).to(dtype)
    for each in (model, converted, all_low):
        each.train()

    def step(call: nn.Module, *, autocast: bool = False) -> Callable[[], None]:
        def run() -> None:
            with torch.enable_grad():
                with torch.autocast(device.type, dtype=dtype, enabled=autocast):
                    loss = call(**inputs).last_hidden_state.float().square().mean()
                loss.backward()
            for parameter in call.parameters():
                parameter.grad = None

        return run

    arms: Arms = {
        "fp32": step(model),
        "autocast": step(model, autocast=True),
        "all low": step(all_low),
        "converted": step(converted),
    }
    times = medians(arms, device, TURNS)
    for each in (model, converted):
        each.eval()
    name = str(dtype).removeprefix("torch.")
    print(f"\n4-layer BERT, batch 8x128, {name} training step on {device.type}, {TURNS} turns")
    for arm, value in times.items():
        print(f"  {arm:<10} {value:8.1f} ms   {times['fp32'] / value:5.2f} times FP32's speed")
    ratio = times["converted"] / times["autocast"]
    print(f"  converted / autocast           {ratio:.3f}   (bound 1)")
    ratio = times["converted"] / times["all low"]
    print(f"  converted / all low            {ratio:.3f}   (bound 1.10)")


def medians(arms: Arms, device: torch.device, turns: int) -> dict[str, float]:
    """Median milliseconds of each arm; the arms take turns, after one that does not count."""
    times: dict[str, list[float]] = {name: [] for name in arms}
    with torch.no_grad():
        for turn in range(turns + 1):
            for name, run in arms.items():
                taken = milliseconds(run, device)
                if turn:
                    times[name].append(taken)
    return {name: statistics.median(values) for name, values in times.items()}


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    main()
