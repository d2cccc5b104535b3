"""How the work of a call grows: the same bound on a fast machine and on a slow one."""

from __future__ import annotations

import time
from collections.abc import Callable


def assert_linear(call: Callable[[int], object], count: int) -> None:
    """`call(10 * count)` takes less than 30 times the CPU time of `call(count)`: about 10 where the
    work is linear, 100 where it grows with the square. The least of three turns counts, since a
    turn can be slow for other reasons."""

    def seconds(n: int) -> float:
        begin = time.process_time()
        call(n)
        return time.process_time() - begin

    small = min(seconds(count) for _ in range(3))
    assert min(seconds(10 * count) for _ in range(3)) < 30 * max(small, 0.01)
