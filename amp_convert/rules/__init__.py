"""Rules files -> `Rules`: which precision category an operator, layer or node gets, and why."""
