"""One file a guard: at its limit by hand, in a whole plan, and what it mends."""
