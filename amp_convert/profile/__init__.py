"""`Captured` and calibration batches -> `RangeStats`: what values every node takes."""
