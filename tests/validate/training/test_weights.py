"""A module's tensors: taken out, put back, shared ones one."""

from __future__ import annotations

import torch

from amp_convert.validate.training.weights import Weights


def test_shared_tensors_are_one_and_stay_one() -> None:
    """Tied parameters, and a buffer that two modules hold."""
    first, second = torch.nn.Linear(3, 3), torch.nn.Linear(3, 3)
    second.weight = first.weight
    first.register_buffer("seen", torch.zeros(2))
    second.register_buffer("also", first.seen)
    model = torch.nn.Sequential(first, second)
    weights = Weights(model)
    assert weights.names == ("0.weight", "0.bias", "1.bias", "0.seen")
    replaced = {name: tensor + 1 for name, tensor in weights.get().items()}
    weights.put(replaced)
    assert second.weight is first.weight
    assert first.seen is second.also is replaced["0.seen"]
    assert model[1].weight.data_ptr() == replaced["0.weight"].data_ptr()
