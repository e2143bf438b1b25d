"""Draws the ten spike patterns of the associative memory: five letters and five line figures.

Every pattern is a picture of 300 rows, the spike trains, and 300 columns, the time steps: each
line drawing, on a regular mask of one cell in eight, is a pattern of 1.0 to 2.0 % spikes.

    python dataset/make_patterns.py

writes associative_target.npy, uint8 of 0 and 1, (patterns, trains, time), and a contact sheet,
associative_target.png, beside this file.
"""

import math
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

SIZE = 300  # spike trains and time steps
MARGIN = 0.05  # of the frame, left free around a figure
OVERSAMPLING = 4  # figures are drawn this much larger than the pattern
SPIKE_SHARE = 0.015  # of all cells, aimed at in every pattern

Stroke = list[tuple[float, float]]  # a polyline of (x, y), y downwards, in a unit of its own


def arc(x: float, y: float, rx: float, ry: float, start: float, end: float) -> Stroke:
    """Part of an ellipse around (x, y), angles in degrees, from the right and clockwise."""
    angles = np.radians(np.linspace(start, end, 60))
    return [(x + rx * math.cos(angle), y + ry * math.sin(angle)) for angle in angles]


def spiral(turns: float) -> Stroke:
    """An Archimedean spiral."""
    angles = np.linspace(0.0, 2 * math.pi * turns, 240)
    return [(a * math.cos(a), a * math.sin(a)) for a in angles]


def star(points: int, step: int) -> Stroke:
    """A star polygon: every ``step``-th of ``points`` corners on a circle, joined."""
    angles = [2 * math.pi * step * k / points - math.pi / 2 for k in range(points + 1)]
    return [(math.cos(a), math.sin(a)) for a in angles]


def heart() -> Stroke:
    """The heart curve x = 16 sin^3 a, y = 13 cos a - 5 cos 2a - 2 cos 3a - cos 4a (upwards)."""
    curve = []
    for a in np.linspace(0, 2 * math.pi, 120):
        y = 13 * math.cos(a) - 5 * math.cos(2 * a) - 2 * math.cos(3 * a) - math.cos(4 * a)
        curve.append((16 * math.sin(a) ** 3, -y))
    return curve


def fish() -> list[Stroke]:
    """Two sines that cross where the tail begins, the tail's edge, and an eye."""
    x = np.linspace(0, 1, 60)
    back = -0.5 * np.sin(math.pi * x / 0.8)
    outline = [*zip(x, back, strict=True), *zip(x[::-1], -back[::-1], strict=True)]
    return [outline, arc(0.18, -0.12, 0.035, 0.035, 0, 360)]


FIGURES: dict[str, list[Stroke]] = {
    "S": [arc(0.5, 0.25, 0.45, 0.25, -20, -270) + arc(0.5, 0.75, 0.45, 0.25, -90, 160)],
    "P": [[(0, 1), (0, 0), (0.6, 0), *arc(0.6, 0.28, 0.35, 0.28, -90, 90), (0, 0.56)]],
    "I": [[(0, 0), (1, 0)], [(0.5, 0), (0.5, 1)], [(0, 1), (1, 1)]],
    "K": [[(0, 0), (0, 1)], [(0.97, 0), (0, 0.58)], [(0.33, 0.38), (1, 1)]],
    "E": [[(1, 0), (0, 0), (0, 1), (1, 1)], [(0, 0.5), (0.8, 0.5)]],
    "spiral": [spiral(2.75)],
    "star": [star(5, 2)],
    "heart": [heart()],
    "house": [
        [(0, 0.45), (0.5, 0), (1, 0.45)],
        [(0.12, 0.36), (0.12, 1), (0.88, 1), (0.88, 0.36)],
        [(0.4, 1), (0.4, 0.62), (0.62, 0.62), (0.62, 1)],
    ],
    "fish": fish(),
}


def draw(strokes: list[Stroke], width: int) -> np.ndarray:
    """The figure as a boolean picture, (SIZE, SIZE), its lines ``width`` cells wide."""
    scale = SIZE * OVERSAMPLING
    image = Image.new("L", (scale, scale))
    pen = ImageDraw.Draw(image)
    radius = width * OVERSAMPLING / 2
    corners = np.concatenate(strokes)
    least, extent = corners.min(0), np.ptp(corners, 0)
    for stroke in strokes:
        unit = (np.array(stroke) - least) / extent  # the figure fills the frame
        points = [tuple(point) for point in scale * (MARGIN + (1 - 2 * MARGIN) * unit)]
        pen.line(points, fill=255, width=width * OVERSAMPLING)
        for x, y in points:  # round joints and ends
            pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=255)
    return np.asarray(image.resize((SIZE, SIZE), Image.Resampling.BOX)) > 127


def thinning_mask() -> np.ndarray:
    """One cell in eight: every train has one in eight steps, shifted by three from row to row."""
    train, time = np.indices((SIZE, SIZE))
    return (time + 3 * train) % 8 == 0


def make_patterns(figures: Iterable[list[Stroke]]) -> np.ndarray:
    """A pattern of each figure, uint8 of 0 and 1, (patterns, trains, time).

    A long line is drawn thinner than a short one, so that all have about SPIKE_SHARE spikes.
    """
    mask = thinning_mask()
    patterns = []
    for strokes in figures:
        thinned = [draw(strokes, width) & mask for width in range(5, 25)]
        patterns.append(min(thinned, key=lambda spikes: abs(spikes.mean() - SPIKE_SHARE)))
    return np.stack(patterns).astype(np.uint8)


def contact_sheet(patterns: np.ndarray, columns: int = 5, dot: int = 2, gap: int = 20) -> Image:
    """All patterns side by side, a black dot for every spike."""
    rows = math.ceil(len(patterns) / columns)
    pitch = SIZE * dot + gap
    sheet = Image.new("L", (columns * pitch + gap, rows * pitch + gap), 210)
    for index, pattern in enumerate(patterns):
        picture = Image.fromarray(255 - 255 * pattern.repeat(dot, 0).repeat(dot, 1))
        row, column = divmod(index, columns)
        sheet.paste(picture, (gap + column * pitch, gap + row * pitch))
    return sheet


def main() -> None:
    """Writes the array and the contact sheet beside this file."""
    folder = Path(__file__).parent
    patterns = make_patterns(FIGURES.values())
    np.save(folder / "associative_target.npy", patterns)
    contact_sheet(patterns).save(folder / "associative_target.png", optimize=True)
    for name, pattern in zip(FIGURES, patterns, strict=True):
        print(f"{name:8} {pattern.mean():.2%} spikes, {pattern.any(1).sum()} of {SIZE} trains")


if __name__ == "__main__":
    main()
