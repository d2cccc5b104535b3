"""Which units stay FP32, by an integer programme.

With x = 1 for a unit in FP32, d = 1 for a border from FP32 down to low, and r = 1 for one that
rises from low to FP32:

    minimise    Σ price(u) x(u) + Σ price(b) (d(b) + r(b))
    subject to  Σ error(u)² (1 - x(u)) + Σ error(b)² d(b) <= bound²
                d(b) >= x(source) - x(reader),  r(b) >= x(reader) - x(source)

Squares of errors add up, as the nodes' do (see `attribute`). It is solved by HiGHS in SciPy's
`milp`, to within a thousandth of the best.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import lil_array

from amp_convert.tune.results import Border, Unit

SECONDS = 20.0
"""How long one programme may take; the best found by then counts."""


def cheapest(
    units: Sequence[Unit], borders: Sequence[Border], bound: float
) -> frozenset[str] | None:
    """The names of the units to keep in FP32 so that the predicted error of the others is within
    `bound`; None where none was found in time."""
    if not units:
        return frozenset()
    index = {unit.name: i for i, unit in enumerate(units)}
    chosen, edges = len(units), len(borders)
    squares = np.array([*(u.error**2 for u in units), *(b.error**2 for b in borders)])
    # What is over the bound by itself, or overflows, is settled; the rest is scaled by the bound.
    alone = ~(squares <= bound**2)
    squares = np.where(alone, 0.0, squares) / (bound**2 or 1.0)
    prices = np.array([u.price for u in units] + 2 * [b.price for b in borders])
    scale = float(np.abs(prices).max(initial=0)) or 1.0
    rows = lil_array((1 + 2 * edges, chosen + 2 * edges))
    rows[0, :chosen], rows[0, chosen : chosen + edges] = squares[:chosen], -squares[chosen:]
    for row, border in enumerate(borders):
        source, reader = index[border.source], index[border.reader]
        for at, sign in ((row, 1.0), (edges + row, -1.0)):
            rows[1 + at, chosen + at] = 1.0
            rows[1 + at, source], rows[1 + at, reader] = -sign, sign
    least = np.zeros(rows.shape[0])
    least[0] = squares[:chosen].sum() - 1.0
    lower, upper = np.zeros(rows.shape[1]), np.ones(rows.shape[1])
    lower[:chosen] = alone[:chosen]
    upper[chosen : chosen + edges] = ~alone[chosen:]
    found = milp(
        prices / scale,
        constraints=LinearConstraint(rows.tocsr(), least, np.inf),
        bounds=Bounds(lower, upper),
        integrality=np.r_[np.ones(chosen), np.zeros(2 * edges)],
        options={"mip_rel_gap": 1e-3, "time_limit": SECONDS},
    )
    if found.x is None:
        return None
    return frozenset(name for name, i in index.items() if found.x[i] > 0.5)
