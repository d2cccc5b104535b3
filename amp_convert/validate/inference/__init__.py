"""Inference: `ConvertedModel` and batches -> `Divergence`."""
