"""A saved archive held against FP32."""
