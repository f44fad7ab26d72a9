"""The content of a scene: a textured room, solids on simple paths, a lamp and a moving camera, all from one seed.

World axes: x and y span the floor, z points up, meters; the floor is z = 0 and the room is centered on x = y = 0.
Camera axes (OpenCV): x right, y down, z forward. Angles in radians, time in seconds, colors in [0, 1] as displayed.
Dataclasses contain plain numbers and tuples only, so that scenes can be compared.
"""

import colorsys
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pe_spatial.errors import ConfigError

Vector = tuple[float, float, float]

CATEGORIES = ("sphere", "box", "cylinder", "cone", "torus")
TEXTURES = ("plain", "gradient", "stripes", "checker", "noise")

CLEARANCE = 0.02  # meters kept free between two solids, and between a solid and the room
CAMERA_CLEARANCE = 0.45  # meters kept free between the camera and everything else
_PATH_SAMPLES = 9  # times at which collisions and framing are checked


@dataclass(frozen=True, kw_only=True)
class Material:
    """A solid texture: a function of the local 3D point, so that surfaces need no texture coordinates."""

    texture: str = "plain"
    colors: tuple[Vector, Vector] = ((0.7, 0.7, 0.7), (0.3, 0.3, 0.3))
    period: float = 0.3  # meters from one stripe, cell or blob to the next but one
    axis: Vector = (1.0, 0.0, 0.0)  # direction of stripes and gradients
    seed: int = 0  # random seed of the noise texture


@dataclass(frozen=True, kw_only=True)
class Solid:
    """One object; `half`, the half extents of its local bounding box, defines its shape.

    sphere (r, r, r); box (x, y, z); cylinder (r, r, h) around z; cone (r, r, h), apex at +h, base at -h;
    torus (R + r, R + r, r) around z, with tube radius r.
    """

    id: int  # from 1; the value of its pixels in the instance map
    category: str
    half: Vector
    position: Vector  # of the local origin at rest, meters
    angles: Vector = (0.0, 0.0, 0.0)  # R = Rz(angles[2]) Ry(angles[1]) Rx(angles[0])
    sway: Vector = (0.0, 0.0, 0.0)  # amplitude of the sinusoidal path, meters
    sway_period: float = 4.0
    sway_phase: float = 0.0
    spin: float = 0.0  # around the vertical, radians per second
    material: Material = Material()

    @property
    def radius(self) -> float:
        """Radius of the bounding sphere around the local origin, meters."""
        x, y, z = self.half
        if self.category == "box":
            return math.hypot(x, y, z)
        return x if self.category in ("sphere", "torus") else math.hypot(x, z)

    def pose(self, time: float) -> tuple[np.ndarray, np.ndarray]:
        """Return rotation (3, 3) and translation (3,), local to world, at `time`."""
        swing = math.sin(2 * math.pi * time / self.sway_period + self.sway_phase)
        position = np.asarray(self.position) + np.asarray(self.sway) * swing
        return _rotation(self.angles[0], self.angles[1], self.angles[2] + self.spin * time), position


@dataclass(frozen=True, kw_only=True)
class Room:
    """An empty box seen from inside, `width` (x) by `length` (y) by `height` (z) meters."""

    width: float
    length: float
    height: float
    materials: tuple[Material, ...] = (Material(),) * 6  # walls -x, +x, -y, +y, then floor and ceiling


@dataclass(frozen=True, kw_only=True)
class Camera:
    """A pinhole camera that swings along an arc around `target` and keeps looking at it."""

    target: Vector
    distance: float  # horizontal, from the target, meters
    height: float  # of the camera above the floor, meters
    azimuth: float = 0.0  # direction of the camera from the target
    sweep: float = 0.0  # change of the azimuth over `duration`
    rise: float = 0.0  # change of the height over `duration`, meters
    approach: float = 0.0  # change of the distance over `duration`, meters
    roll: float = 0.0
    duration: float = 2.0
    fov: float = math.radians(60)  # across the shorter image side

    def pose(self, time: float) -> np.ndarray:
        """Return the camera-to-world matrix (4, 4) at `time`."""
        s = time / self.duration - 0.5
        azimuth, distance = self.azimuth + self.sweep * s, self.distance + self.approach * s
        target = np.asarray(self.target)
        x, y = target[0] + distance * math.cos(azimuth), target[1] + distance * math.sin(azimuth)
        origin = np.array([x, y, self.height + self.rise * s])
        forward = (target - origin) / np.linalg.norm(target - origin)
        right = np.cross(forward, [0.0, 0.0, 1.0])
        right /= np.linalg.norm(right)
        down = np.cross(forward, right)
        c, s = math.cos(self.roll), math.sin(self.roll)
        pose = np.eye(4)
        pose[:3] = np.stack([c * right + s * down, c * down - s * right, forward, origin], axis=1)
        return pose


@dataclass(frozen=True, kw_only=True)
class Scene:
    """The complete description of a scene; `render_frame` turns it into images."""

    room: Room
    solids: tuple[Solid, ...]
    camera: Camera
    light: Vector  # position of the lamp
    duration: float = 2.0  # seconds without collisions


def sample_scene(seed: int | Sequence[int], *, num_solids: tuple[int, int] = (2, 6), duration: float = 2.0) -> Scene:
    """Return a random scene; the same seed gives the same scene.

    Solids do not touch one another, the room, the lamp or the camera during [0, duration] (checked with bounding
    spheres along the paths), and at least two of them are in view at the start, in the middle and at the end.

    Args:
        seed: a non-negative integer, or several, as in numpy.random.default_rng.
        num_solids: smallest and largest number of solids, from 2 to 8 (else ConfigError).
        duration: length of the video in seconds, above 0 (else ConfigError).
    """
    low, high = num_solids
    if not 2 <= low <= high <= 8:
        raise ConfigError(f"num_solids is {num_solids}; give (smallest, largest) with 2 <= smallest <= largest <= 8")
    if duration <= 0:
        raise ConfigError(f"duration is {duration}; give a positive number of seconds")
    rng = np.random.default_rng(seed)
    while True:  # about every second draw fails, mostly because of framing
        scene = _draw(rng, int(rng.integers(low, high + 1)), duration)
        if scene is not None:
            return scene


def _draw(rng: np.random.Generator, count: int, duration: float) -> Scene | None:
    """Return a scene, or None if the solids do not fit or the camera sees too few of them."""
    width, length, height = rng.uniform(4.8, 7.5), rng.uniform(4.8, 7.5), rng.uniform(2.4, 3.2)
    materials = tuple(_material(rng, for_room=True) for _ in range(6))
    room = Room(width=width, length=length, height=height, materials=materials)
    center = rng.uniform(-0.4, 0.4, size=2)
    camera = Camera(
        target=(*_floats(center), float(rng.uniform(0.25, 0.6))),
        distance=float(rng.uniform(1.6, 2.4)),
        height=float(rng.uniform(0.5, 1.8)),
        azimuth=float(rng.uniform(-math.pi, math.pi)),
        sweep=float(rng.choice([-1, 1]) * rng.uniform(0.15, 0.5)),
        rise=float(rng.uniform(-0.3, 0.3)),
        approach=float(rng.uniform(-0.4, 0.4)),
        roll=float(rng.normal(0, 0.03)),
        duration=duration,
        fov=float(rng.uniform(math.radians(45), math.radians(60))),
    )
    light = (*_floats(center + rng.uniform(-1.5, 1.5, size=2)), height - 0.15)
    times = np.linspace(0, duration, _PATH_SAMPLES)
    views = np.stack([camera.pose(t) for t in times])  # (T, 4, 4)
    if not _inside(room, views[:, :3, 3], CAMERA_CLEARANCE):
        return None

    # paths (T, 3) and the distance to keep from each
    obstacles = [(views[:, :3, 3], CAMERA_CLEARANCE), (np.broadcast_to(light, (_PATH_SAMPLES, 3)), 0.3)]
    solids: list[Solid] = []
    for number in range(1, count + 1):
        category = str(rng.choice(CATEGORIES))  # outside of the retries, which would favor shapes that fit easily
        for _ in range(40):
            solid = _solid(rng, number, category, center, duration)
            path = np.stack([solid.pose(t)[1] for t in times])
            if _inside(room, path, solid.radius, floor=False) and all(
                np.linalg.norm(path - other, axis=1).min() > solid.radius + keep for other, keep in obstacles
            ):
                solids.append(solid)
                obstacles.append((path, solid.radius + CLEARANCE))
                break
        else:
            return None

    slope = 0.8 * math.tan(camera.fov / 2)  # centers within the middle 80 % of the image
    for index in (0, _PATH_SAMPLES // 2, -1):
        centers = np.stack([path[index] for path, _ in obstacles[2:]]) - views[index, :3, 3]
        x, y, z = (centers @ views[index, :3, :3]).T
        if (np.maximum(abs(x), abs(y)) < slope * z).sum() < 2:
            return None
    return Scene(room=room, solids=tuple(solids), camera=camera, light=light, duration=duration)


def _solid(rng: np.random.Generator, number: int, category: str, center: np.ndarray, duration: float) -> Solid:
    """Return a solid near `center`, with probability 0.8 resting on the floor; look and shape are independent."""
    half = _half_extents(rng, category)
    floating = rng.random() < 0.2
    if floating or category == "sphere":
        angles = rng.uniform(-math.pi, math.pi, size=3)
    else:
        lies = category in ("cylinder", "torus") and rng.random() < 0.4
        angles = np.array([math.pi / 2 if lies else 0.0, 0.0, rng.uniform(-math.pi, math.pi)])
    offset = rng.uniform(0, 1) ** 0.7
    bearing = rng.uniform(-math.pi, math.pi)
    xy = center + offset * np.array([math.cos(bearing), math.sin(bearing)])
    lowest = _reach_down(category, half, _rotation(*angles))
    z = lowest + (rng.uniform(0.15, 0.8) if floating else 0.0)
    sway: np.ndarray = np.zeros(3)
    spin = 0.0
    if rng.random() < 0.5:
        direction = rng.normal(size=3) * (1.0, 1.0, 0.3 if floating else 0.0)
        sway = direction / np.linalg.norm(direction) * rng.uniform(0.1, 0.35)
        sway[2] = np.clip(sway[2], -0.1, 0.1)
        spin = rng.uniform(-1.2, 1.2)
    return Solid(
        id=number,
        category=category,
        half=_floats(half),
        position=_floats((*xy, z)),
        angles=_floats(angles),
        sway=_floats(sway),
        sway_period=float(duration * rng.uniform(0.9, 2.5)),
        sway_phase=float(rng.uniform(-math.pi, math.pi)),
        spin=float(spin),
        material=_material(rng),
    )


def _half_extents(rng: np.random.Generator, category: str) -> Vector:
    """Return half extents in meters; proportions keep categories apart (no flat cone, no torus without a hole)."""
    size = rng.uniform(0.24, 0.46)
    if category == "sphere":
        return (size * 0.95,) * 3
    if category == "box":
        return _floats(size * rng.uniform(0.5, 1.0, size=3))
    if category == "cylinder":
        return (size * rng.uniform(0.45, 0.75),) * 2 + (size * rng.uniform(0.6, 1.1),)
    if category == "cone":
        return (size * rng.uniform(0.6, 0.9),) * 2 + (size * rng.uniform(0.8, 1.15),)
    return (size * 1.05,) * 2 + (size * rng.uniform(0.25, 0.38),)


def _reach_down(category: str, half: Vector, rotation: np.ndarray) -> float:
    """Return how far the rotated solid reaches below its local origin: the support function towards -z."""
    x, y, z = -rotation[2]  # world -z in local axes
    ring, (a, b, c) = math.hypot(x, y), half
    if category == "sphere":
        return a
    if category == "box":
        return abs(x) * a + abs(y) * b + abs(z) * c
    if category == "cylinder":
        return ring * a + abs(z) * c
    if category == "cone":
        return max(z * c, ring * a - z * c)
    return ring * (a - c) + c


def _material(rng: np.random.Generator, *, for_room: bool = False) -> Material:
    hue, saturation, value = rng.random(), rng.uniform(0.35, 0.95), rng.uniform(0.5, 0.95)
    if for_room:
        saturation, value = saturation * 0.45, rng.uniform(0.45, 0.85)
    second = (hue + rng.normal(0, 0.05 if for_room else 0.2)) % 1.0
    darker = value * rng.uniform(0.75, 0.95) if for_room else rng.uniform(0.25, 0.95)
    axis = rng.normal(size=3)
    colors = [colorsys.hsv_to_rgb(h, saturation, v) for h, v in ((hue, value), (second, darker))]
    return Material(
        texture=str(rng.choice(TEXTURES)),
        colors=(_floats(colors[0]), _floats(colors[1])),
        period=float(rng.uniform(0.4, 1.2) if for_room else rng.uniform(0.12, 0.35)),
        axis=_floats(axis / np.linalg.norm(axis)),
        seed=int(rng.integers(2**31)),
    )


def _inside(room: Room, points: np.ndarray, margin: float, *, floor: bool = True) -> bool:
    """Return whether points (T, 3) are `margin` meters inside the room; with floor=False a solid may rest on z = 0."""
    high = np.array([room.width / 2, room.length / 2, room.height]) - margin
    low = np.array([-high[0], -high[1], margin if floor else 0.0])
    return bool((points >= low).all() and (points <= high).all())


def _rotation(rx: float, ry: float, rz: float) -> np.ndarray:
    (a, b, c), (d, e, f) = np.cos([rx, ry, rz]), np.sin([rx, ry, rz])
    about_x = np.array([[1, 0, 0], [0, a, -d], [0, d, a]])
    about_y = np.array([[b, 0, e], [0, 1, 0], [-e, 0, b]])
    about_z = np.array([[c, -f, 0], [f, c, 0], [0, 0, 1]])
    return about_z @ about_y @ about_x


def _floats(values: Sequence[float] | np.ndarray) -> tuple:
    return tuple(float(v) for v in values)
