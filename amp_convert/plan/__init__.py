"""`Captured`, `Rules` and `RangeStats` -> `Plan`: a precision and a reason for every node."""
