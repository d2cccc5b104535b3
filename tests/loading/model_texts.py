"""What tests of this folder share."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from amp_convert.core.errors import ModelError

HEAD = "import torch\nfrom torch import nn\n"


MODEL = HEAD + "def build_model():\n    return nn.Linear(3, 2)\n"


OPTIONAL = (
    *("eval_batches", "metrics", "train_batches", "loss"),
    *("optimizer", "scheduler", "initial_model"),
)


def refusal(function: Callable[..., object], *args: object) -> str:
    with pytest.raises(ModelError) as caught:
        function(*args)
    assert "\n" not in str(caught.value)
    return str(caught.value)
