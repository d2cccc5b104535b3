"""A module -> `Captured`: functional FP32 graphs that are held against the eager model."""
