"""`Captured` and `Plan` -> `ConvertedModel`: the graphs with casts."""
