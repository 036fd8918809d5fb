"""How the twelve small scenes are drawn, from house to snowman, and what the time of day does to them."""

from __future__ import annotations

import math
import random
from typing import assert_never

from sdfleet.train.canvas import Canvas, Colour, Part, Point, Stroke, box, disc, polygon
from sdfleet.train.canvas import Ellipse as Oval
from sdfleet.train.outlines import CORNERS
from sdfleet.train.world import PALETTE, Scene, TimeOfDay, jittered

SIDE = 128.0
# What each time of day does to the colours of things; windows and lamps are painted unlit.
TINTS: dict[TimeOfDay, Colour] = {"day": (1.0, 1.0, 1.0), "sunset": (1.0, 0.93, 0.86), "night": (0.62, 0.64, 0.8)}
SKIES: dict[TimeOfDay, tuple[Colour, Colour]] = {
    "day": ((120, 188, 242), (208, 233, 251)),
    "sunset": ((233, 98, 92), (253, 208, 122)),
    "night": ((14, 18, 54), (48, 54, 112)),
}
GRASS: Colour = (98, 176, 84)
ROAD: Colour = (112, 112, 118)
SNOW: Colour = (240, 245, 251)
SEA: Colour = (42, 104, 190)
LEAF: Colour = (52, 148, 66)
BARK: Colour = (122, 78, 44)
SUN: Colour = (255, 212, 52)
GLOW: Colour = (255, 228, 130)
INK: Colour = (28, 28, 34)
PAPER: Colour = (250, 250, 252)


class _Brush:
    """A canvas seen at one time of day."""

    def __init__(self, view: Canvas, time: TimeOfDay, rng: random.Random) -> None:
        self.view = view
        self.time = time
        self.rng = rng

    def lit(self, colour: Colour) -> Colour:
        tint = TINTS[self.time]
        return (colour[0] * tint[0], colour[1] * tint[1], colour[2] * tint[2])

    def fill(self, colour: Colour, *parts: Part, shade: float = 1.0) -> None:
        self.view.paint(parts, self.lit(colour), shade=shade)

    def glow(self, colour: Colour, *parts: Part) -> None:
        """Fill without the tint of the hour: light comes from here."""
        self.view.paint(parts, colour, shade=0.0)

    def sky(self, end_row: int = int(SIDE)) -> None:
        self.view.fill_gradient(*SKIES[self.time], end_row=end_row)

    def ground(self, colour: Colour, first_row: int) -> None:
        darker = (colour[0] * 0.86, colour[1] * 0.86, colour[2] * 0.86)
        self.view.fill_gradient(self.lit(colour), self.lit(darker), first_row=first_row)

    def shadow(self, x: float, y: float, rx: float, ry: float, ground: Colour) -> None:
        """A soft pool of shade on the ground."""
        self.fill((ground[0] * 0.78, ground[1] * 0.78, ground[2] * 0.78), Oval(x=x, y=y, rx=rx, ry=ry), shade=0.0)

    def stars(self, *spots: Point) -> None:
        if self.time == "night":
            parts = [_star_at(x, y, 4.5) for x, y in spots]
            self.view.paint(parts, (255, 246, 196), shade=0.0)

    def sway(self, reach: float) -> float:
        return self.rng.uniform(-reach, reach)


def paint_scene(view: Canvas, scene: Scene, rng: random.Random) -> None:
    """Paint one scene; the same generator state paints the same pixels."""
    brush = _Brush(view, scene.time, rng)
    colour = jittered(scene.colour, rng)
    second = jittered(scene.second, rng)
    match scene.kind:
        case "house":
            _paint_house(brush, colour, second)
        case "tree":
            _paint_tree(brush)
        case "sun":
            _paint_sun(brush)
        case "moon":
            _paint_moon(brush)
        case "mountains":
            _paint_mountains(brush)
        case "boat":
            _paint_boat(brush, colour)
        case "flower":
            _paint_flower(brush, colour, is_yellow=scene.colour == "yellow")
        case "cat":
            _paint_cat(brush, colour, _pale(scene), is_dark=scene.colour == "black")
        case "smiley":
            _paint_smiley(brush, colour, _pale(scene), is_dark=scene.colour == "black")
        case "car":
            _paint_car(brush, colour)
        case "fish":
            _paint_fish(brush, colour)
        case "snowman":
            _paint_snowman(brush, colour)
        case _:
            assert_never(scene.kind)


def _paint_house(brush: _Brush, wall: Colour, roof: Colour) -> None:
    x = 64 + brush.sway(4)
    brush.sky()
    brush.stars((18, 20), (110, 26), (30, 46), (92, 12))
    brush.ground(GRASS, 96)
    brush.shadow(x, 103, 42, 5, GRASS)
    brush.fill((150, 80, 60), box(x + 16, 28, x + 25, 50))
    brush.fill(wall, box(x - 31, 56, x + 31, 103))
    brush.fill(roof, polygon((x - 39, 58), (x + 39, 58), (x, 24)))
    brush.fill((98, 62, 38), box(x - 7, 78, x + 7, 103))
    pane: Colour = GLOW if brush.time == "night" else (205, 232, 250)
    brush.glow(pane, box(x - 25, 66, x - 12, 79), box(x + 12, 66, x + 25, 79))


def _paint_tree(brush: _Brush) -> None:
    x = 64 + brush.sway(5)
    brush.sky()
    brush.stars((16, 18), (112, 30), (20, 60), (100, 12))
    brush.ground(GRASS, 98)
    brush.shadow(x, 107, 27, 5, GRASS)
    brush.fill(BARK, polygon((x - 5, 60), (x + 5, 60), (x + 8, 107), (x - 8, 107)))
    brush.fill(LEAF, disc(x - 16, 54, 19), disc(x + 16, 54, 19), disc(x, 36, 22), disc(x, 58, 18), shade=2.0)


def _paint_sun(brush: _Brush) -> None:
    x, y = 64 + brush.sway(8), 50 + brush.sway(3)
    brush.sky()
    rays: list[Part] = []
    for k in range(12):
        ux, uy = math.cos(k * math.pi / 6), math.sin(k * math.pi / 6)
        wide = ((x + ux * 25 - uy * 5, y + uy * 25 + ux * 5), (x + ux * 25 + uy * 5, y + uy * 25 - ux * 5))
        rays.append(polygon(*wide, (x + ux * 40, y + uy * 40)))
    brush.glow((255, 196, 40), *rays)
    brush.view.paint([disc(x, y, 23)], SUN)
    brush.ground(GRASS, 104)


def _paint_moon(brush: _Brush) -> None:
    x, y = (86 if brush.rng.random() < 0.5 else 42) + brush.sway(3), 44 + brush.sway(3)
    brush.sky()
    spots = [(18, 18), (64, 16), (108, 84), (62, 66), (22, 76), (92, 104), (44, 104), (112, 22), (76, 88)]
    brush.stars(*[(sx, sy) for sx, sy in spots if math.hypot(sx - x, sy - y) > 32])
    moon = [disc(x, y, 25), Oval(x=x + 12, y=y - 5, rx=20, ry=20, is_hole=True)]
    brush.view.paint(moon, (252, 240, 186))


def _paint_mountains(brush: _Brush) -> None:
    brush.sky()
    brush.stars((14, 14), (108, 18), (58, 10))
    x = 64 + brush.sway(4)
    peaks: tuple[tuple[float, float, float, Colour], ...] = (
        (x - 32, 44, 46, (128, 134, 158)),
        (x + 32, 50, 44, (138, 143, 166)),
        (x, 26, 52, (104, 110, 134)),
    )
    for px, top, half, rock in peaks:
        brush.fill(rock, polygon((px - half, 106), (px + half, 106), (px, top)), shade=2.0)
        drop = 106 - top
        snow = [(0.0, 0.0), (0.28, 0.28), (0.14, 0.22), (0.03, 0.34), (-0.1, 0.22), (-0.28, 0.28)]
        brush.fill(PAPER, polygon(*[(px + u * half, top + v * drop) for u, v in snow]))
    brush.ground(GRASS, 102)


def _paint_boat(brush: _Brush, hull: Colour) -> None:
    x = 64 + brush.sway(5)
    brush.sky(84)
    brush.stars((16, 16), (112, 22), (24, 48), (106, 60))
    brush.ground(SEA, 84)
    brush.fill(BARK, box(x - 1.8, 22, x + 1.8, 82))
    brush.fill(PAPER, polygon((x + 4, 24), (x + 4, 72), (x + 34, 72)))
    brush.fill((232, 234, 240), polygon((x - 4, 34), (x - 4, 72), (x - 25, 72)))
    brush.fill(hull, polygon((x - 38, 79), (x + 38, 79), (x + 25, 98), (x - 25, 98)))
    waves = [
        Stroke(points=((k * 32 + 4, 108 + k % 2 * 9), (k * 32 + 20, 108 + k % 2 * 9)), width_px=2.4) for k in range(4)
    ]
    brush.fill((120, 172, 228), *waves)


def _paint_flower(brush: _Brush, petal: Colour, *, is_yellow: bool) -> None:
    x, y = 64 + brush.sway(4), 48 + brush.sway(3)
    brush.view.fill_gradient((196, 228, 251), (231, 244, 251))
    brush.ground(GRASS, 112)
    brush.fill(LEAF, box(x - 2.8, y, x + 2.8, 116))
    brush.fill(LEAF, polygon((x, 106), (x + 30, 84), (x + 13, 109)), polygon((x, 112), (x - 30, 90), (x - 13, 115)))
    turns = [k * math.pi / 3 + math.pi / 6 for k in range(6)]
    brush.view.paint(
        [disc(x + math.cos(a) * 21, y + math.sin(a) * 21, 14) for a in turns], petal, shade=1.6, shadow=0.1
    )
    brush.fill((136, 84, 46) if is_yellow else (252, 204, 54), disc(x, y, 12.5))


def _paint_cat(brush: _Brush, fur: Colour, back: Colour, *, is_dark: bool) -> None:
    x, y = 64 + brush.sway(3), 70 + brush.sway(2)
    ink = PAPER if is_dark else INK
    brush.view.fill_gradient(back, back)
    brush.view.light(4.0)
    head: list[Part] = [
        polygon((x - 40, y - 6), (x - 36, y - 50), (x - 6, y - 28)),
        polygon((x + 40, y - 6), (x + 36, y - 50), (x + 6, y - 28)),
        Oval(x=x, y=y + 2, rx=42, ry=36),
    ]
    brush.view.paint(head, fur, shadow=0.12)
    brush.fill((246, 172, 184), polygon((x - 32, y - 21), (x - 31, y - 38), (x - 16, y - 28)))
    brush.fill((246, 172, 184), polygon((x + 32, y - 21), (x + 31, y - 38), (x + 16, y - 28)))
    brush.fill((214, 236, 120), *[Oval(x=x + s * 18, y=y - 3, rx=8.5, ry=9.5) for s in (-1, 1)], shade=0.0)
    brush.fill((22, 22, 26), *[Oval(x=x + s * 18, y=y - 3, rx=3.4, ry=8.5) for s in (-1, 1)], shade=0.0)
    whiskers = [
        Stroke(points=((x + s * 15, y + 16 + q * 0.4), (x + s * 47, y + 15 + q * 2)), width_px=1.8)
        for s in (-1, 1)
        for q in (-3, 3)
    ]
    brush.fill(ink, *whiskers, shade=0.0)
    brush.fill((238, 120, 144), polygon((x - 6, y + 9), (x + 6, y + 9), (x, y + 16)), shade=0.0)
    brush.fill(ink, _smile(x - 6, y + 15, 6, 6, 2.0), _smile(x + 6, y + 15, 6, 6, 2.0), shade=0.0)


def _paint_smiley(brush: _Brush, skin: Colour, back: Colour, *, is_dark: bool) -> None:
    x, y = 64 + brush.sway(3), 64 + brush.sway(3)
    ink = PAPER if is_dark else INK
    brush.view.fill_gradient(back, back)
    brush.view.light(4.0)
    brush.view.paint([disc(x, y, 46)], skin, shadow=0.12)
    brush.fill(ink, *[Oval(x=x + s * 16, y=y - 12, rx=6.5, ry=9.5) for s in (-1, 1)], shade=0.0)
    brush.fill(ink, _smile(x, y + 10, 25, 17, 5.0), shade=0.0)


def _paint_car(brush: _Brush, body: Colour) -> None:
    x = 64 + brush.sway(4)
    brush.sky(88)
    brush.stars((16, 16), (110, 22), (60, 12), (84, 34))
    brush.ground(ROAD, 86)
    brush.shadow(x, 107, 47, 5, ROAD)
    cabin = polygon((x - 27, 72), (x - 17, 46), (x + 16, 46), (x + 31, 72))
    brush.fill(body, cabin, polygon((x - 48, 74), (x - 44, 69), (x + 42, 69), (x + 48, 76), (x + 48, 96), (x - 48, 96)))
    pane: Colour = GLOW if brush.time == "night" else (206, 232, 250)
    windows = [
        polygon((x - 19, 69), (x - 12, 51), (x - 2, 51), (x - 2, 69)),
        polygon((x + 3, 69), (x + 3, 51), (x + 13, 51), (x + 22, 69)),
    ]
    brush.glow(pane, *windows)
    wheels = [disc(x + s * 27, 97, 12) for s in (-1, 1)]
    brush.fill(INK, *wheels, shade=0.0)
    brush.fill((190, 192, 198), *[disc(x + s * 27, 97, 5) for s in (-1, 1)], shade=0.0)
    brush.glow((255, 240, 160), Oval(x=x + 45, y=79, rx=4, ry=4.5))


def _paint_fish(brush: _Brush, body: Colour) -> None:
    x, y = 60 + brush.sway(4), 64 + brush.sway(5)
    brush.view.fill_gradient((84, 172, 226), (26, 86, 166))
    brush.fill(body, polygon((x + 26, y), (x + 56, y - 24), (x + 48, y), (x + 56, y + 24)))
    brush.fill(body, polygon((x - 10, y - 20), (x + 8, y - 40), (x + 20, y - 14)))
    brush.view.paint([Oval(x=x, y=y, rx=41, ry=27)], body, shade=1.8)
    brush.fill(PAPER, disc(x - 21, y - 6, 8), shade=0.0)
    brush.fill(INK, disc(x - 22, y - 6, 4), shade=0.0)
    brush.fill((198, 230, 251), disc(14, 40, 4.5), disc(22, 25, 3.5), disc(12, 18, 5.5), shade=0.0)


def _paint_snowman(brush: _Brush, scarf: Colour) -> None:
    x = 64 + brush.sway(4)
    brush.sky()
    brush.stars((14, 18), (112, 24), (24, 52), (104, 58))
    brush.ground(SNOW, 100)
    brush.shadow(x, 116, 33, 5, SNOW)
    brush.fill(PAPER, disc(x, 92, 27), disc(x, 60, 20), disc(x, 35, 15), shade=2.4)
    brush.fill(INK, disc(x - 5, 32, 2.4), disc(x + 5, 32, 2.4), disc(x, 64, 2.8), disc(x, 86, 2.8), shade=0.0)
    brush.fill(PALETTE["orange"], polygon((x, 35), (x, 40.5), (x + 16, 39)), shade=0.0)
    brush.fill((44, 44, 52), box(x - 18, 20, x + 18, 24.5), box(x - 11, 3, x + 11, 22))
    brush.fill(scarf, box(x - 16, 45.5, x + 16, 52.5), polygon((x + 7, 50), (x + 15, 50), (x + 17, 72), (x + 9, 72)))


def _pale(scene: Scene) -> Colour:
    """The second colour as a pale background."""
    red, green, blue = PALETTE[scene.second]
    return (red * 0.35 + 158, green * 0.35 + 158, blue * 0.35 + 158)


def _smile(x: float, y: float, rx: float, ry: float, width_px: float) -> Stroke:
    turns = [math.pi * (0.1 + 0.8 * k / 12) for k in range(13)]
    return Stroke(points=tuple((x + math.cos(a) * rx, y + math.sin(a) * ry) for a in turns), width_px=width_px)


def _star_at(x: float, y: float, radius: float) -> Part:
    return polygon(*[(x + u * radius, y + v * radius) for u, v in CORNERS["star"]])
