"""The frontier as a picture: each measured plan by its error and its speed. A file of its own."""

from __future__ import annotations

import math

from amp_convert.report import text as fmt
from amp_convert.report.charts.svg import LEFT, RIGHT, TOP, WIDTH, Axis, decades, log10
from amp_convert.tune.results import Point, Tuned

HEIGHT, BOTTOM = 360, 310
_MOST_DECADES = 8
_STYLE = (
    "text{font:12px system-ui,sans-serif;fill:#333}"
    ".grid{stroke:#ddd}.line{fill:none;stroke:#1f6feb;stroke-width:2}"
    ".point{fill:#1f6feb}.chosen{fill:#d1242f}.given{fill:#57606a}"
    ".limit{stroke:#d1242f;stroke-dasharray:4 3}"
)


def frontier_svg(tuned: Tuned) -> str:
    """The picture as an SVG document: x is the error, on a logarithmic axis, y the speed."""
    shown = [*tuned.frontier, tuned.chosen, tuned.given]
    shown = [point for point in shown if math.isfinite(point.error) and point.error > 0]
    found = decades([point.error for point in shown], _MOST_DECADES)
    low, high = found if found is not None else (-4, -1)
    fastest = max((point.speedup for point in shown), default=1.0)
    x = Axis(low, high, LEFT, RIGHT, log10)
    y = Axis(0.0, max(fastest * 1.1, 1.0), BOTTOM, TOP)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        'aria-label="Error against speed of the measured plans">',
        f"<style>{_STYLE}</style>",
    ]
    for power in range(low, high + 1):
        at = x.place(power)
        parts.append(f'<path class="grid" d="M{at} {TOP}V{BOTTOM}"/>')
        parts.append(f'<text x="{at}" y="{BOTTOM + 18}" text-anchor="middle">1e{power}</text>')
    for step in range(5):
        speed = step * max(fastest * 1.1, 1.0) / 4
        parts.append(f'<path class="grid" d="M{LEFT} {y.at(speed)}H{RIGHT}"/>')
        parts.append(
            f'<text x="{LEFT - 6}" y="{y.at(speed) + 4}" text-anchor="end">{speed:.2f}</text>'
        )
    limit = tuned.goals.tolerance
    if limit is not None and limit > 0:
        parts.append(f'<path class="limit" d="M{x.at(limit)} {TOP}V{BOTTOM}"/>')
    line = " L".join(f"{x.at(p.error)} {y.at(p.speedup)}" for p in tuned.frontier if p in shown)
    if line:
        parts.append(f'<path class="line" d="M{line}"/>')
    parts += [_dot(point, "point", x, y) for point in tuned.frontier if point in shown]
    parts += [
        _dot(point, kind, x, y)
        for kind, point in (("given", tuned.given), ("chosen", tuned.chosen))
        if point in shown
    ]
    parts.append(
        f'<text x="{(LEFT + RIGHT) / 2}" y="{BOTTOM + 38}" text-anchor="middle">relative L2 error '
        "against FP32; times FP32's speed; red: chosen, grey: the plan of the rules given</text>"
    )
    return "\n".join([*parts, "</svg>"]) + "\n"


def _dot(point: Point, kind: str, x: Axis, y: Axis) -> str:
    title = f"{fmt.error(point.error)}, {point.speedup:.2f} times, {len(point.units)} in FP32"
    return (
        f'<circle class="{kind}" cx="{x.at(point.error)}" cy="{y.at(point.speedup)}" r="5">'
        f"<title>{title}</title></circle>"
    )
