"""Drawn street scenes with exact labels: a source that needs no files. Half of the scenes are hard on purpose.

In an easy scene a few pixels show what a thing is: every class has colours of its own. In a hard one, at dusk and in traffic, anything has
any colour, the picture is dull, blurred and noisy, and buses look like houses: shape, size and place tell the class, and whoever shall see
them has to look further around.
"""

import dataclasses
import itertools
from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image, ImageDraw
from scipy.ndimage import gaussian_filter

from mess_tf.configs import IGNORE, DataConfig
from mess_tf.data.examples import DataError, DatasetInfo, Examples

# Class: colour, then the strength of fine, leaf-sized and cloud-sized texture (grey levels).
_SURFACES = {
    "sky": ((140, 182, 226), 0, 0, 14),
    "building": ((168, 112, 88), 5, 4, 10),
    "road": ((92, 92, 98), 8, 2, 8),
    "pavement": ((188, 172, 140), 7, 6, 6),
    "tree": ((62, 112, 52), 10, 26, 12),
    "pole": ((34, 32, 38), 3, 0, 0),
    "car": ((178, 44, 48), 3, 0, 5),
    "person": ((206, 132, 58), 6, 4, 0),
}
SYNTHETIC_CLASSES = tuple(_SURFACES)
_SUPERSAMPLE = 2


@dataclasses.dataclass(frozen=True)
class _Conditions:
    """How a scene is filled and photographed; pairs are (low, high).

    Attributes:
      cars, buses, people, trees, poles, litter: number of objects; litter is unlabelled.
      nearness: where objects stand, 0 = horizon (tiny), 1 = lower image edge.
      stray: spread of an object's colour around its class colour, grey levels.
      any_colour: share of cars and people whose colour has nothing to do with their class.
      blur: standard deviation of the lens's blur, pixels.
      haze: opacity of haze at the horizon.
      contrast, light: factors of the finished picture.
      noise: standard deviation of the sensor noise, grey levels.
    """

    cars: tuple[int, int]
    buses: tuple[int, int]
    people: tuple[int, int]
    trees: tuple[int, int]
    poles: tuple[int, int]
    litter: tuple[int, int]
    nearness: tuple[float, float]
    stray: float
    any_colour: float
    blur: tuple[float, float]
    haze: tuple[float, float]
    contrast: tuple[float, float]
    light: tuple[float, float]
    noise: tuple[float, float]


_EASY = _Conditions(
    cars=(1, 2),
    buses=(0, 0),
    people=(1, 2),
    trees=(1, 3),
    poles=(2, 3),
    litter=(0, 0),
    nearness=(0.45, 0.9),
    stray=6,
    any_colour=0,
    blur=(0, 0),
    haze=(0, 0.1),
    contrast=(0.9, 1.1),
    light=(0.9, 1.1),
    noise=(2, 5),
)
_HARD = _Conditions(
    cars=(1, 3),
    buses=(1, 2),
    people=(2, 4),
    trees=(1, 3),
    poles=(2, 3),
    litter=(1, 3),
    nearness=(0.35, 0.95),
    stray=36,
    any_colour=1,
    blur=(0.4, 0.9),
    haze=(0.1, 0.5),
    contrast=(0.45, 0.75),
    light=(0.5, 0.95),
    noise=(4, 9),
)


def open_synthetic(config: DataConfig, split: str) -> Examples:
    sizes = {config.train_split: config.synthetic_train, config.val_split: config.synthetic_val}
    if split not in sizes:
        raise DataError(f"synthetic: split must be one of {', '.join(map(repr, sizes))}, got {split!r}")
    if sizes[split] < 1:
        raise DataError(f"synthetic: split {split!r} must have at least one image, got {sizes[split]}")
    # Evenly spread, so that the share is exact and scene i stays the same however many follow it.
    hard = np.diff(np.floor(np.arange(sizes[split] + 1) * config.synthetic_hard + 1e-9)).astype(bool)
    stream = list(sizes).index(split)

    def read(index: int) -> tuple[np.ndarray, np.ndarray]:
        rng = np.random.default_rng([config.seed, stream, index])
        return _draw_scene(rng, _HARD if hard[index] else _EASY, config.input_size)

    names = [f"{split}/{index:05d}_{'hard' if is_hard else 'easy'}" for index, is_hard in enumerate(hard)]

    def content(index: int) -> list[bytes]:
        return [repr((config.seed, stream, index, bool(hard[index]), config.input_size)).encode()]

    return Examples(DatasetInfo(config.source, SYNTHETIC_CLASSES), names, read, hard=hard, content=content)


class _Canvas:
    """A map of paint numbers that shapes are drawn into, and what each paint stands for."""

    def __init__(self, height: int, width: int, rng: np.random.Generator, conditions: _Conditions):
        self._map = Image.new("I", (width, height))
        self._draw = ImageDraw.Draw(self._map)
        self._rng, self._conditions = rng, conditions
        self._labels: list[int] = []
        self._paints: list[tuple[float, ...]] = []  # red, green, blue, three texture strengths

    def paint(self, surface: str, colour: Sequence[float] | None = None, label: int | None = None) -> int:
        """Returns a new paint: the look of a surface, with another colour or label if given. Colours stray."""
        default, *texture = _SURFACES[surface]
        strayed = np.asarray(colour or default) + self._conditions.stray * self._rng.standard_normal(3)
        self._labels.append(SYNTHETIC_CLASSES.index(surface) if label is None else label)
        self._paints.append((*strayed, *texture))
        return len(self._labels) - 1

    def coat(self, surface: str, *colours: Sequence[float]) -> int:
        """Returns a new paint in one of the colours by which the surface is known or, as often as the conditions say, in any."""
        if self._rng.random() < self._conditions.any_colour:
            return self.paint(surface, tuple(self._rng.uniform(40, 220, 3)))
        return self.paint(surface, colours[self._rng.integers(len(colours))])

    def polygon(self, paint: int, *points: tuple[float, float]) -> None:
        self._draw.polygon(points, fill=paint)

    def ellipse(self, paint: int, x: float, y: float, radius_x: float, radius_y: float) -> None:
        self._draw.ellipse((x - radius_x, y - radius_y, x + radius_x, y + radius_y), fill=paint)

    def box(self, paint: int, left: float, top: float, right: float, bottom: float) -> None:
        self._draw.rectangle((left, top, max(left, right), max(top, bottom)), fill=paint)

    def line(self, paint: int, start: tuple[float, float], end: tuple[float, float], width: float) -> None:
        self._draw.line((*start, *end), fill=paint, width=max(_SUPERSAMPLE, round(width)))

    def develop(self) -> tuple[np.ndarray, np.ndarray]:
        """Returns the textured picture, float [h, w, 3], and the label, uint8 [h, w], both without supersampling."""
        paints = np.array(self._map)
        height, width = paints.shape
        table = np.array(self._paints)
        picture = table[paints, :3]
        for strength, cell in zip(table[:, 3:].T, (1, 4, height // 4), strict=True):
            grid = self._rng.standard_normal((height // cell + 1, width // cell + 1)).astype(np.float32)
            texture = np.asarray(Image.fromarray(grid).resize((width, height), Image.Resampling.BICUBIC))
            picture += (strength[paints] * texture)[..., None]
        picture = picture.reshape(height // _SUPERSAMPLE, _SUPERSAMPLE, width // _SUPERSAMPLE, _SUPERSAMPLE, 3).mean(axis=(1, 3))
        return picture, np.array(self._labels, np.uint8)[paints[::_SUPERSAMPLE, ::_SUPERSAMPLE]]


def _draw_scene(rng: np.random.Generator, conditions: _Conditions, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Draws a street in one-point perspective.

    Args:
      rng: the only source of randomness.
      conditions: how full the street is and how well it is photographed.
      size: (height, width) in pixels.

    Returns:
      The image, uint8 [height, width, 3] RGB, and its label, uint8 [height, width] with `SYNTHETIC_CLASSES` and IGNORE.
    """
    height, width = (_SUPERSAMPLE * side for side in size)
    canvas = _Canvas(height, width, rng, conditions)
    horizon = height * rng.uniform(0.36, 0.5)
    vanishing = width * rng.uniform(0.35, 0.65)
    kerbs = width * rng.uniform((-0.1, 0.85), (0.15, 1.1))  # where the road's two edges meet the lower image edge
    walls = kerbs + (kerbs - vanishing) * rng.uniform(0.5, 1.1, 2)  # the same for the lines the buildings stand on

    def ground(bottom_x: float, nearness: float) -> tuple[float, float]:
        """The point on the line from the vanishing point to (bottom_x, lower image edge)."""
        return vanishing + (bottom_x - vanishing) * nearness, horizon + (height - horizon) * nearness

    # The stage: sky, ground, road with lane marks, the far end of the street, houses.
    canvas.box(canvas.paint("sky"), 0, 0, width, horizon)
    canvas.box(canvas.paint("pavement"), 0, horizon, width, height)
    canvas.polygon(canvas.paint("road"), (vanishing, horizon), ground(kerbs[0], 1), ground(kerbs[1], 1))
    marks = canvas.paint("road", (214, 216, 222))
    for start in np.geomspace(0.12, 0.8, 6):
        middle = kerbs.mean()
        half = 0.012 * width
        corners = ((middle - half, start), (middle + half, start), (middle + half, 1.2 * start), (middle - half, 1.2 * start))
        canvas.polygon(marks, *(ground(*corner) for corner in corners))
    for left in np.arange(-0.05, 1.0, 0.09) * width:
        surface = "tree" if rng.random() < 0.35 else "building"
        top = horizon - height * rng.uniform(0.02, 0.13)
        canvas.box(canvas.paint(surface), left, top, left + 0.09 * width, horizon + 0.03 * height)
    for wall in walls:
        _draw_houses(canvas, rng, lambda nearness, wall=wall: ground(wall, nearness), height)

    # Things that stand on the ground, far ones first, so that near ones hide them.
    near = np.sort(rng.uniform(*conditions.nearness, conditions.poles[1] + 1))
    side = int(rng.integers(2))
    kerb = kerbs[side] + 0.12 * (walls[side] - kerbs[side])
    poles = [(*ground(kerb, nearness), nearness) for nearness in near[: rng.integers(*conditions.poles, endpoint=True)]]
    wire = canvas.paint("pole", (50, 50, 54), IGNORE)
    tops = [(x, y - 0.95 * nearness * height) for x, y, nearness in poles]
    for start, end in itertools.pairwise(tops):
        canvas.line(wire, start, end, 1)
    things = [(nearness, _draw_pole, x) for x, _, nearness in poles]
    for count, draw, places in (
        (conditions.trees, _draw_tree, (kerbs, walls, 0.25, 0.8)),
        (conditions.people, _draw_person, (kerbs, walls, -0.2, 0.5)),
        (conditions.litter, _draw_litter, (kerbs, walls, -0.1, 0.6)),
        (conditions.cars, _draw_car, (kerbs, kerbs[::-1], 0.12, 0.4)),
        (conditions.buses, _draw_bus, (kerbs, kerbs[::-1], 0.05, 0.3)),
    ):
        for _ in range(rng.integers(*count, endpoint=True)):
            nearness, at = rng.uniform(*conditions.nearness), int(rng.integers(2))
            share = rng.uniform(*places[2:])
            bottom_x = (1 - share) * places[0][at] + share * places[1][at]
            things.append((nearness, draw, ground(bottom_x, nearness)[0]))
    for nearness, draw, x in sorted(things, key=lambda thing: thing[0]):
        draw(canvas, rng, x, horizon + (height - horizon) * nearness, nearness * height)
    if rng.random() < 0.5:  # the bonnet of the car that carries the camera
        canvas.ellipse(canvas.paint("car", (40, 42, 48), IGNORE), width / 2, height * 1.04, width * 0.45, height * 0.11)

    # The photograph.
    picture, label = canvas.develop()
    rows = np.arange(size[0])[:, None, None] * _SUPERSAMPLE
    distance = np.clip((height - rows) / (height - horizon), 0, 1)
    haze = rng.uniform(*conditions.haze) * distance
    picture = picture * (1 - haze) + 190 * haze
    picture = (picture - 120) * rng.uniform(*conditions.contrast) + 120
    picture = gaussian_filter(picture, rng.uniform(*conditions.blur), axes=(0, 1))
    picture = picture + rng.uniform(*conditions.noise) * rng.standard_normal(picture.shape)
    picture = picture * rng.uniform(*conditions.light) * rng.uniform(0.94, 1.06, 3)
    return np.clip(np.rint(picture), 0, 255).astype(np.uint8), label


def _draw_houses(canvas: _Canvas, rng: np.random.Generator, foot: Callable[[float], tuple[float, float]], height: int) -> None:
    """Draws a row of house fronts along `foot`, which maps nearness to a point on the ground."""
    edges = np.geomspace(0.1, 1.6, rng.integers(4, 7))
    for far, near in itertools.pairwise(edges):
        if rng.random() < 0.15:  # a gap in the row
            continue
        storeys = rng.uniform(0.7, 1.5) * height

        def point(along: float, up: float, far=far, near=near, storeys=storeys) -> tuple[float, float]:
            nearness = far + (near - far) * along
            x, y = foot(nearness)
            return x, y - storeys * up * nearness

        canvas.polygon(canvas.paint("building"), point(0, 0), point(1, 0), point(1, 1), point(0, 1))
        window = _window(canvas, rng, "building")
        columns, rows = rng.integers(2, 5), rng.integers(3, 7)
        for column in (np.arange(columns) + 0.3) / columns:
            for row in (np.arange(rows) + 0.35) / rows:
                right, top = column + 0.4 / columns, row + 0.4 / rows
                canvas.polygon(window, point(column, row), point(right, row), point(right, top), point(column, top))


def _window(canvas: _Canvas, rng: np.random.Generator, surface: str) -> int:
    """Returns the paint of a house's or bus's windows, dark ones or lit ones."""
    return canvas.paint(surface, (112, 66, 56) if rng.random() < 0.7 else (228, 150, 110))


def _draw_pole(canvas: _Canvas, rng: np.random.Generator, x: float, y: float, scale: float) -> None:
    paint = canvas.paint("pole")
    canvas.line(paint, (x, y), (x, y - scale), 0.045 * scale)
    reach = rng.uniform(-0.16, 0.16) * scale
    canvas.line(paint, (x, y - 0.97 * scale), (x + reach, y - scale), 0.035 * scale)


def _draw_tree(canvas: _Canvas, rng: np.random.Generator, x: float, y: float, scale: float) -> None:
    tall = rng.uniform(0.55, 0.9) * scale
    canvas.line(canvas.paint("tree", (70, 84, 40)), (x, y), (x, y - 0.6 * tall), 0.06 * scale)
    for _ in range(6):
        dx, dy = rng.uniform((-0.14, 0.5), (0.14, 0.95))
        canvas.ellipse(canvas.paint("tree"), x + dx * scale, y - dy * tall, *(rng.uniform(0.09, 0.16, 2) * scale))


def _draw_person(canvas: _Canvas, rng: np.random.Generator, x: float, y: float, scale: float) -> None:
    tall = rng.uniform(0.45, 0.55) * scale
    broad = 0.15 * tall
    legs, skin = canvas.coat("person", (96, 40, 110)), canvas.paint("person", (236, 140, 120))
    stride = rng.uniform(0.3, 1.0) * broad
    for foot in (-stride, stride):
        canvas.line(legs, (x, y - 0.5 * tall), (x + foot, y), 0.11 * tall)
    canvas.polygon(
        canvas.coat("person", (240, 120, 30), (216, 50, 150)),
        *(
            (x - broad, y - 0.84 * tall),
            (x + broad, y - 0.84 * tall),
            (x + 0.8 * broad, y - 0.42 * tall),
            (x - 0.8 * broad, y - 0.42 * tall),
        ),
    )
    canvas.ellipse(skin, x, y - 0.92 * tall, 0.075 * tall, 0.085 * tall)


def _draw_car(canvas: _Canvas, rng: np.random.Generator, x: float, y: float, scale: float) -> None:
    half, tall = 0.24 * scale, rng.uniform(0.3, 0.38) * scale
    body = canvas.coat("car", (186, 30, 40), (30, 64, 170), (236, 196, 30))
    tyre = canvas.paint("car", (30, 30, 32))
    for wheel in (-0.72, 0.72):
        canvas.box(tyre, x + (wheel - 0.2) * half, y - 0.3 * tall, x + (wheel + 0.2) * half, y)
    canvas.box(body, x - half, y - 0.58 * tall, x + half, y - 0.14 * tall)
    roof = ((x - 0.86 * half, y - 0.56 * tall), (x - 0.6 * half, y - tall), (x + 0.6 * half, y - tall), (x + 0.86 * half, y - 0.56 * tall))
    canvas.polygon(body, *roof)
    glass = (
        (x - 0.68 * half, y - 0.6 * tall),
        (x - 0.5 * half, y - 0.92 * tall),
        (x + 0.5 * half, y - 0.92 * tall),
        (x + 0.68 * half, y - 0.6 * tall),
    )
    canvas.polygon(canvas.paint("car", (40, 52, 110)), *glass)
    lamp = canvas.paint("car", (240, 90, 70))
    for at in (-0.8, 0.8):
        canvas.ellipse(lamp, x + at * half, y - 0.44 * tall, 0.12 * half, 0.08 * tall)


def _draw_bus(canvas: _Canvas, rng: np.random.Generator, x: float, y: float, scale: float) -> None:
    """A double-decker, a car by class, with the walls and windows of a house: only what is around them tells one from the other."""
    half, tall = 0.3 * scale, rng.uniform(0.75, 0.95) * scale
    tyre, lamp = canvas.paint("car", (30, 30, 32)), canvas.paint("car", (240, 90, 70))
    body = canvas.paint("car", _SURFACES["building"][0])
    glass = _window(canvas, rng, "car")
    for wheel in (-0.75, 0.75):
        canvas.box(tyre, x + (wheel - 0.14) * half, y - 0.12 * tall, x + (wheel + 0.14) * half, y)
    canvas.box(body, x - half, y - tall, x + half, y - 0.07 * tall)
    columns = rng.integers(2, 4)
    for row in (0.4, 0.72):
        for left in (np.arange(columns) + 0.2) / columns:
            right = left + 0.6 / columns
            canvas.box(glass, x + (2 * left - 1) * half, y - (row + 0.18) * tall, x + (2 * right - 1) * half, y - row * tall)
    for at in (-0.8, 0.8):
        canvas.ellipse(lamp, x + at * half, y - 0.2 * tall, 0.08 * half, 0.03 * tall)


def _draw_litter(canvas: _Canvas, rng: np.random.Generator, x: float, y: float, scale: float) -> None:
    """A box of any colour, without a label."""
    half, tall = rng.uniform(0.04, 0.1, 2) * scale
    canvas.box(canvas.paint("car", tuple(rng.uniform(40, 220, 3)), IGNORE), x - half, y - 2 * tall, x + half, y)
