"""The converted model held against its FP32 original."""
