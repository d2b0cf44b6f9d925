"""Curves as SVG, inside a page: lines differ in their dashes and have their names beside them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from markupsafe import Markup
from matplotlib.ticker import MaxNLocator

from mmdet_gdino_lora.report.collect import Points

WIDTH, HEIGHT = 400, 230
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 380, 12, 186
#: Of one line after the other; colours are the page's, ``--line-0`` and so on.
DASHES = ('', '8 4', '2 3', '10 3 2 3', '1 5', '14 4')
_LINE = Markup(
    '<polyline points="{}" fill="none" stroke="var(--line-{})" stroke-width="2" '
    'stroke-dasharray="{}"/>'
)
_DOT = Markup('<circle cx="{:.1f}" cy="{:.1f}" r="3" fill="var(--line-{})"/>')
_TEXT = Markup('<text x="{:.1f}" y="{:.1f}" text-anchor="{}">{}</text>')
_RULE = Markup('<line x1="{:.1f}" x2="{:.1f}" y1="{:.1f}" y2="{:.1f}" class="rule"/>')
_SVG = Markup('<svg viewBox="0 0 {} {}" role="img" aria-label="{}" class="chart">{}</svg>')
_KEY = Markup(
    '<li><svg viewBox="0 0 36 8" width="36" height="8" aria-hidden="true"><line x1="0" x2="36" '
    'y1="4" y2="4" stroke="var(--line-{})" stroke-width="2" stroke-dasharray="{}"/></svg> '
    '{} <small>{}</small></li>'
)
_FIGURE = Markup(
    '<figure class="curves"><figcaption>{}</figcaption>{}<ul class="key">{}</ul></figure>'
)


def chart(title: str, curves: Mapping[str, Points], across: str, dots: bool = False) -> Markup:
    """Draws curves over a common axis.

    Args:
        title: Above the picture.
        curves: By name; at least one.
        across: What the horizontal axis counts.
        dots: Whether points are marked, where there are few.

    Returns:
        A ``<figure>``; what comes from elsewhere is escaped.
    """
    xs = [x for points in curves.values() for x, _ in points]
    ys = [y for points in curves.values() for _, y in points]
    x_ticks, y_ticks = _ticks(xs), _ticks([*ys, 0.0] if min(ys) >= 0 else ys)

    def place(x: float, y: float) -> tuple[float, float]:
        return (
            _LEFT + (x - x_ticks[0]) / (x_ticks[-1] - x_ticks[0]) * (_RIGHT - _LEFT),
            _BOTTOM - (y - y_ticks[0]) / (y_ticks[-1] - y_ticks[0]) * (_BOTTOM - _TOP),
        )

    parts = []
    for tick in y_ticks:
        _, y = place(x_ticks[0], tick)
        parts += [
            _RULE.format(_LEFT, _RIGHT, y, y),
            _TEXT.format(_LEFT - 6, y + 4, 'end', _n(tick)),
        ]
    for tick in x_ticks:
        x, _ = place(tick, y_ticks[0])
        parts += [_TEXT.format(x, _BOTTOM + 18, 'middle', _n(tick))]
    parts.append(_TEXT.format((_LEFT + _RIGHT) / 2, HEIGHT - 6, 'middle', across))
    keys = []
    for number, (name, points) in enumerate(curves.items()):
        colour = number % len(DASHES)
        places = [place(x, y) for x, y in points]
        parts.append(
            _LINE.format(' '.join(f'{x:.1f},{y:.1f}' for x, y in places), colour, DASHES[colour])
        )
        if dots or len(points) == 1:
            parts += [_DOT.format(x, y, colour) for x, y in places]
        keys.append(_KEY.format(colour, DASHES[colour], name, f'ends at {_n(points[-1][1])}'))
    told = '; '.join(
        f'{name} from {_n(points[0][1])} to {_n(points[-1][1])}' for name, points in curves.items()
    )
    svg = _SVG.format(WIDTH, HEIGHT, f'{title} over {across}: {told}', Markup('').join(parts))
    return _FIGURE.format(title, svg, Markup('').join(keys))


def _ticks(values: Sequence[float]) -> list[float]:
    low, high = min(values), max(values)
    if low == high:
        high = low + (abs(low) or 1.0)
    whole = all(float(value).is_integer() for value in values)
    return [float(tick) for tick in MaxNLocator(5, integer=whole).tick_values(low, high)]


def _n(value: float) -> str:
    if abs(value) >= 10_000:
        return f'{value / 1000:g}k'
    return f'{value:.3g}' if abs(value) < 1000 else f'{value:.0f}'
