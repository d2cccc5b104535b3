"""BatchNorm by its running statistics, by the operator that eager calls: in inference, and where
a user has frozen it in training.

A trace has `_native_batch_norm_legit_no_training`, which gives statistics as well that nobody
reads. Eager calls `batch_norm`, which picks the kernel for the device (cuDNN's, MIOpen's).

Keeps: every bit on the CPU, where both are one kernel.
"""

from __future__ import annotations

import operator

import torch
from torch import fx

aten = torch.ops.aten


def call_as_eager(graph: fx.Graph) -> None:
    """Replace each that is read for its first result alone."""
    traced = aten._native_batch_norm_legit_no_training.default
    for node in graph.find_nodes(op="call_function", target=traced):
        readers = list(node.users)
        if any(r.target is not operator.getitem or r.args[1] != 0 for r in readers):
            continue
        *tensors, momentum, eps = node.args
        with graph.inserting_after(node):
            arguments = (*tensors, False, momentum, eps, True)
            whole = graph.call_function(aten.batch_norm.default, arguments)
        for reader in readers:
            whole.meta = reader.meta
            reader.replace_all_uses_with(whole)
            graph.erase_node(reader)
        graph.erase_node(node)
