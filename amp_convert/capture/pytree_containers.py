"""Containers of other libraries that models take or return, made known to PyTorch's pytree.

`torch.export` and every comparison of outputs look into a container only if its class is
registered. transformers' language models return their key-value cache in classes that it registers
on request only, or not at all; without this, no such model could be captured whole.
"""

from __future__ import annotations

import sys
from typing import Any

from torch.utils import _pytree as pytree


def register_containers() -> None:
    """Register the cache classes of transformers, if the program has imported transformers.

    A class that is registered already stays as it is.
    """
    if "transformers" not in sys.modules:
        return
    from transformers.cache_utils import EncoderDecoderCache
    from transformers.integrations.executorch import register_dynamic_cache_export_support

    register_dynamic_cache_export_support()
    if EncoderDecoderCache not in pytree.SUPPORTED_NODES:
        pytree.register_pytree_node(
            EncoderDecoderCache,
            lambda cache: ([getattr(cache, name) for name in _HALVES], None),
            lambda halves, _: EncoderDecoderCache(*halves),
            flatten_with_keys_fn=_keyed_halves,
            serialized_type_name="transformers.cache_utils.EncoderDecoderCache",
        )


_HALVES = ("self_attention_cache", "cross_attention_cache")


def _keyed_halves(cache: Any) -> tuple[list[tuple[pytree.KeyEntry, Any]], None]:
    return [(pytree.GetAttrKey(name), getattr(cache, name)) for name in _HALVES], None
