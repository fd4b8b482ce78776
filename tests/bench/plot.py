"""The plot as SVG: one line for each figure, one dot for each system, the ratio to native on a logarithmic axis.

Lines are those of the report. Figures without a native value are shown as ratios to the best FUSE peer and marked so.
Pure: rows in, text out.
"""

import math
from xml.sax.saxutils import escape

from tests.bench.measure import Row
from tests.bench.report import Line, lines

COLOURS = {
    "native": "#777777",
    "overlayfs": "#222222",
    "fuse-overlayfs": "#b07aa1",
    "mergerfs": "#f28e2b",
    "mergerfs-cache": "#edc948",
    "unionfs-fuse": "#e15759",
    "udbad-none": "#76b7b2",
    "udbad-reval": "#4e79a7",
    "udbad-notify": "#59a14f",
}
LEFT, TOP, LINE, WIDTH, RIGHT = 270, 60, 18, 620, 30


def points(line: Line) -> dict[str, float]:
    """Ratio of each column's system to native, or to the best peer where native has no such figure."""
    row = line.row
    base = row.median("native") or row.best_peer()
    ratios = {column: row.ratio(name, base) for column, name in line.columns.items()}
    return {column: ratio for column, ratio in ratios.items() if ratio}


def svg(rows: list[Row]) -> str:
    """The picture as text; a run with nothing to compare gives an empty picture."""
    drawn = [(line, found) for line in lines(rows) if len(found := points(line)) > 1]
    values = [ratio for _, found in drawn for ratio in found.values()] or [1.0]
    low, high = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values))) or 1
    height = TOP + LINE * len(drawn) + 30

    def x(ratio: float) -> float:
        return LEFT + (math.log10(ratio) - low) / (high - low) * WIDTH

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{LEFT + WIDTH + RIGHT}" height="{height}" '
        'font-family="sans-serif" font-size="11">',
        '<rect width="100%" height="100%" fill="white"/>',
    ]
    for i, name in enumerate(name for name in COLOURS if any(name in found for _, found in drawn)):
        at = 10 + i * 103
        parts.append(f'<circle cx="{at}" cy="14" r="4" fill="{COLOURS[name]}"/>')
        parts.append(f'<text x="{at + 8}" y="18">{escape(name)}</text>')
    bottom = TOP + LINE * len(drawn)
    for power in range(low, high + 1):
        for step in (1, 2, 5) if power < high else (1,):
            ratio = step * 10.0**power
            colour = "#888888" if ratio == 1 else "#e4e4e4"
            parts.append(
                f'<line x1="{x(ratio):.1f}" x2="{x(ratio):.1f}" y1="{TOP - 8}" y2="{bottom}" stroke="{colour}"/>'
            )
            parts.append(f'<text x="{x(ratio):.1f}" y="{TOP - 14}" text-anchor="middle">{ratio:g}</text>')
    for i, (line, found) in enumerate(drawn):
        y = TOP + LINE * i + LINE / 2
        label = line.name + ("" if line.row.median("native") else " (to best peer)")
        parts.append(f'<text x="{LEFT - 10}" y="{y + 4:.1f}" text-anchor="end">{escape(label)}</text>')
        for name, ratio in found.items():
            title = f"<title>{escape(name)}: {ratio:.2f}</title>"
            fill = COLOURS.get(name, "#000000")
            parts.append(
                f'<circle cx="{x(ratio):.1f}" cy="{y:.1f}" r="4" fill="{fill}" fill-opacity="0.85">{title}</circle>'
            )
    parts.append(f'<text x="{LEFT}" y="{height - 10}">time as a multiple of native, logarithmic; left is faster</text>')
    parts.append("</svg>")
    return "\n".join(parts) + "\n"
