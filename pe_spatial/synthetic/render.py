"""Analytic ray casting in numpy: color, metric depth and instance ids of one frame.

Legend: N rays or points; vectors are (3, N) float32, components first, so that each component is contiguous.
All rays of a pass share one origin (the camera, or the lamp for shadows), so that culling is one product.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from pe_spatial.errors import ConfigError

from .scene import Camera, Material, Room, Scene, Solid

_SHADOW_BIAS = 4e-3  # meters by which an occluder must be nearer to the lamp than the lit point
_EDGE = 0.06  # difference between neighbors (of 1) above which a pixel is antialiased
_TORUS_STEPS = 96


@dataclass(frozen=True)
class Frame:
    """One image and its ground truth, all of size (H, W), rows from the top.

    Depth and instances are those of the pixel's center; rgb is antialiased. The pixel in column u and row v covers
    [u, u + 1] x [v, v + 1], so its center is (u + 0.5, v + 0.5), in `intrinsics` and in boxes.
    """

    rgb: np.ndarray  # (H, W, 3) uint8
    depth: np.ndarray  # (H, W) float32, meters along the optical axis
    instances: np.ndarray  # (H, W) int32, 0 = room, else Solid.id
    intrinsics: np.ndarray  # (3, 3) float64, pixels
    camera_to_world: np.ndarray  # (4, 4) float64


class _Posed(NamedTuple):
    solid: Solid
    rotation: np.ndarray  # (3, 3) local to world
    position: np.ndarray  # (3,)


def intrinsics(camera: Camera, size: tuple[int, int]) -> np.ndarray:
    """Pinhole matrix (3, 3) in pixels for an image of `size` (H, W); the principal point is the image's center."""
    height, width = size
    focal = 0.5 * min(size) / math.tan(camera.fov / 2)
    return np.array([[focal, 0, width / 2], [0, focal, height / 2], [0, 0, 1]])


def render_frame(scene: Scene, time: float, size: tuple[int, int] = (256, 256)) -> Frame:
    """Render `scene` at `time` seconds; ConfigError if a side of `size` (H, W) is below 2 pixels."""
    height, width = size
    if min(size) < 2:
        raise ConfigError(f"size is {size}; give (H, W) with sides of at least 2 pixels")
    pose, matrix = scene.camera.pose(time), intrinsics(scene.camera, size)
    rotation, origin = pose[:3, :3].astype(np.float32), pose[:3, 3].astype(np.float32)
    posed = [_Posed(solid, *(x.astype(np.float32) for x in solid.pose(time))) for solid in scene.solids]

    def shoot(u: np.ndarray, v: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return color (3, N) in [0, 1], depth (N,) and owner (N,) along the rays through image points (u, v)."""
        rays = np.stack([(u - matrix[0, 2]) / matrix[0, 0], (v - matrix[1, 2]) / matrix[1, 1], np.ones_like(u)])
        rays = rays.astype(np.float32)
        norms = np.sqrt((rays * rays).sum(0))
        rays = rotation @ (rays / norms)
        distance, owner = _trace(scene.room, posed, origin, rays)
        return _shade(scene, posed, origin, rays, distance, owner), distance / norms, owner

    v, u = np.indices(size).reshape(2, -1) + 0.5
    rgb, depth, owner = shoot(u, v)
    edges = np.flatnonzero(_contrast(rgb.reshape(3, height, width)))
    if edges.size:  # the mean of four rays at the centers of the pixel's quarters
        du, dv = np.array([[-1, 1, -1, 1], [-1, -1, 1, 1]])[:, :, None] * 0.25
        finer = shoot((u[edges] + du).ravel(), (v[edges] + dv).ravel())[0]
        rgb[:, edges] = finer.reshape(3, 4, -1).mean(1)
    ids = np.array([0, *(solid.id for solid in scene.solids)], dtype=np.int32)
    return Frame(
        rgb=np.ascontiguousarray((rgb * 255 + 0.5).astype(np.uint8).reshape(3, height, width).transpose(1, 2, 0)),
        depth=depth.reshape(size),
        instances=ids[np.maximum(owner, 0)].reshape(size),
        intrinsics=matrix,
        camera_to_world=pose,
    )


def _contrast(rgb: np.ndarray) -> np.ndarray:
    """Return which pixels (H, W) differ visibly from a neighbor; rgb is (3, H, W)."""
    rows, columns = (np.abs(np.diff(rgb, axis=axis)).max(0) > _EDGE for axis in (1, 2))
    vertical = np.pad(rows, ((1, 0), (0, 0))) | np.pad(rows, ((0, 1), (0, 0)))
    return vertical | np.pad(columns, ((0, 0), (1, 0))) | np.pad(columns, ((0, 0), (0, 1)))


def _trace(room: Room, posed: list[_Posed], origin: np.ndarray, rays: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the distance (N,) to the nearest surface and its owner (N,): 1 + index of the solid, or -face of the room.

    Faces are numbered as in Room.materials: 0 ... 3 walls, 4 floor, 5 ceiling.
    """
    half = np.array([room.width / 2, room.length / 2, room.height / 2], dtype=np.float32)[:, None]
    middle = np.array([0, 0, room.height / 2], dtype=np.float32)[:, None]
    with np.errstate(divide="ignore"):
        exits = (np.copysign(half, rays) + middle - origin[:, None]) / rays  # the origin is inside: all positive
    axis = exits.argmin(0)
    distance = exits.min(0)
    owner = -(2 * axis + (np.take_along_axis(rays, axis[None], 0)[0] > 0))
    for index, item in enumerate(posed):
        hit, t = _cast(item, origin, rays)
        nearer = t < distance[hit]
        hit = hit[nearer]
        distance[hit], owner[hit] = t[nearer], index + 1
    return distance, owner


def _cast(item: _Posed, origin: np.ndarray, rays: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the indices (M,) of the rays that hit the solid, and distances (M,); the origin is outside the solid."""
    offset = item.position - origin
    along = offset @ rays  # to the point closest to the center
    near = np.flatnonzero((along > 0) & (offset @ offset - along * along < item.solid.radius**2))
    if not near.size:
        return near, np.empty(0, dtype=np.float32)
    along, d = along[near], item.rotation.T @ rays[:, near]
    o = along * d - (item.rotation.T @ offset)[:, None]  # starting at the closest point keeps float32 exact enough
    with np.errstate(divide="ignore", invalid="ignore"):
        t = _INTERSECT[item.solid.category](o, d, item.solid.half)
    hit = np.isfinite(t)
    return near[hit], t[hit] + along[hit]


# Intersections: local origins o (3, M), unit directions d (3, M) -> first crossing t (M,), of any sign; inf if none.


def _sphere(o: np.ndarray, d: np.ndarray, half: tuple) -> np.ndarray:
    b = (o * d).sum(0)
    return -b - _root(b * b - (o * o).sum(0) + half[0] ** 2)


def _box(o: np.ndarray, d: np.ndarray, half: tuple) -> np.ndarray:
    enter, leave = _slab(o, d, np.array(half, dtype=np.float32)[:, None])
    enter, leave = enter.max(0), leave.min(0)
    return np.where(enter < leave, enter, np.inf)


def _cylinder(o: np.ndarray, d: np.ndarray, half: tuple) -> np.ndarray:
    a = (d[:2] * d[:2]).sum(0)
    b = (o[:2] * d[:2]).sum(0)
    root = _root(b * b - a * ((o[:2] * o[:2]).sum(0) - half[0] ** 2))
    enter, leave = _slab(o[2], d[2], half[2])
    enter = np.maximum(enter, (-b - root) / a)  # an infinite root leaves an empty interval
    leave = np.minimum(leave, (-b + root) / a)
    return np.where(np.isfinite(root) & (enter < leave), enter, np.inf)


def _cone(o: np.ndarray, d: np.ndarray, half: tuple) -> np.ndarray:
    radius, h = half[0], half[2]
    k = (radius / (2 * h)) ** 2
    z = o[2] - h  # from the apex
    a = d[0] * d[0] + d[1] * d[1] - k * d[2] * d[2]
    b = o[0] * d[0] + o[1] * d[1] - k * z * d[2]
    c = o[0] * o[0] + o[1] * o[1] - k * z * z
    root = _root(b * b - a * c)
    best = np.full(a.shape, np.inf, dtype=np.float32)
    for t in ((-b - root) / a, (-b + root) / a):
        best = np.where((abs(o[2] + t * d[2]) <= h) & (t < best), t, best)
    t = (-h - o[2]) / d[2]
    on_base = (o[0] + t * d[0]) ** 2 + (o[1] + t * d[1]) ** 2 <= radius**2
    return np.where(on_base & (t < best), t, best)


def _torus(o: np.ndarray, d: np.ndarray, half: tuple) -> np.ndarray:
    """Sphere tracing: the distance to a torus is exact and cheap, unlike the roots of its quartic in float32.

    No step is shorter than `shortest`, so that grazing rays advance; a secant shortens the step that crosses.
    """
    ring, tube = half[0] - half[2], half[2]
    shortest = 0.02 * tube
    enter, leave = _slab(o[2], d[2], tube)
    reach = np.sqrt(np.maximum(half[0] ** 2 - (o * o).sum(0) + (o * d).sum(0) ** 2, 0))
    middle = -(o * d).sum(0)
    start, end = np.maximum(enter, middle - reach), np.minimum(leave, middle + reach)
    best = np.full(start.shape, np.inf, dtype=np.float32)
    live = np.flatnonzero(start < end)
    o, d, t, end = o[:, live], d[:, live], start[live], end[live]
    step, outside = np.zeros_like(t), np.ones_like(t)
    for _ in range(_TORUS_STEPS):
        if not live.size:
            break
        x, y, z = o + t * d
        radial = np.sqrt(x * x + y * y) - ring
        gap = np.sqrt(radial * radial + z * z) - tube  # three times as fast as hypot
        crossed = gap <= 0
        best[live[crossed]] = (t + step * np.minimum(gap / (outside - gap), 0))[crossed]
        active = ~crossed & (t < end)
        live, o, d, end, outside = live[active], o[:, active], d[:, active], end[active], gap[active]
        step = np.maximum(outside, shortest)
        t = t[active] + step
    return best


_INTERSECT = {"sphere": _sphere, "box": _box, "cylinder": _cylinder, "cone": _cone, "torus": _torus}


def _root(square: np.ndarray) -> np.ndarray:
    return np.sqrt(np.where(square > 0, square, np.inf))


def _slab(o: np.ndarray, d: np.ndarray, half: np.ndarray | float) -> tuple[np.ndarray, np.ndarray]:
    """Return where a ray enters and leaves |coordinate| <= half."""
    middle, reach = -o / d, np.abs(half / d)
    return middle - reach, middle + reach


def _shade(
    scene: Scene, posed: list[_Posed], origin: np.ndarray, rays: np.ndarray, distance: np.ndarray, owner: np.ndarray
) -> np.ndarray:
    """Return displayed colors (3, N) in [0, 1]: ambient light, a lamp with hard shadows, faint light at the camera."""
    points = origin[:, None] + distance * rays
    normals, albedo = np.zeros_like(points), np.empty_like(points)
    for face, material in enumerate(scene.room.materials):
        at = np.flatnonzero(owner == -face)
        if at.size:
            normals[face // 2, at] = 1 - 2 * (face % 2)
            p = points[:, at]
            p[face // 2] = 0.0  # the same value on all of the face, so that checkers do not flicker
            albedo[:, at] = _paint(material, p)
    for index, item in enumerate(posed):
        at = np.flatnonzero(owner == index + 1)
        if at.size:
            p = item.rotation.T @ (points[:, at] - item.position[:, None])
            normals[:, at] = item.rotation @ _normal(item.solid, p)
            albedo[:, at] = _paint(item.solid.material, p)

    lamp = np.array(scene.light, dtype=np.float32)
    from_lamp = points - lamp[:, None]
    far = np.sqrt((from_lamp * from_lamp).sum(0))
    from_lamp /= far
    direct = np.maximum(-(normals * from_lamp).sum(0), 0) * (1.7 / (1 + 0.12 * far * far))
    for item in posed:
        hit, t = _cast(item, lamp, from_lamp)
        direct[hit[t < far[hit] - _SHADOW_BIAS]] = 0
    facing = np.abs((normals * rays).sum(0))
    light = 0.20 + 0.10 * normals[2] + 0.20 * facing + direct
    return np.sqrt(np.clip(albedo * albedo * light, 0, 1))  # colors are squared to linear light and back


def _normal(solid: Solid, p: np.ndarray) -> np.ndarray:
    """Return outward unit normals (3, M) at local surface points (3, M)."""
    a, _, h = solid.half
    ring = np.hypot(p[0], p[1])
    if solid.category == "sphere":
        n = p
    elif solid.category == "box":
        ratio = p / np.array(solid.half, dtype=np.float32)[:, None]
        n = np.where(np.abs(ratio) == np.abs(ratio).max(0), np.sign(p), 0)
    elif solid.category == "cylinder":
        cap = np.abs(p[2]) / h > ring / a
        n = np.where(cap, np.stack([0 * ring, 0 * ring, np.sign(p[2])]), np.stack([p[0], p[1], 0 * ring]))
    elif solid.category == "cone":
        base = p[2] < -h * (1 - 1e-4)
        n = np.where(base, np.array([[0], [0], [-1]]), np.stack([p[0], p[1], ring * a / (2 * h)]))
    else:
        scale = 1 - (a - h) / np.maximum(ring, 1e-9)
        n = np.stack([p[0] * scale, p[1] * scale, p[2]])
    return (n / np.maximum(np.sqrt((n * n).sum(0)), 1e-9)).astype(np.float32)


def _paint(material: Material, p: np.ndarray) -> np.ndarray:
    """Return displayed colors (3, M) of the texture at local points (3, M)."""
    first, second = (np.array(color, dtype=np.float32)[:, None] for color in material.colors)
    axis = np.array(material.axis, dtype=np.float32)
    if material.texture == "plain":
        mix = np.zeros(p.shape[1], dtype=np.float32)
    elif material.texture == "gradient":
        mix = 0.5 + 0.5 * np.sin((axis @ p) * np.float32(math.pi / (3 * material.period)))
    elif material.texture == "stripes":
        mix = (np.mod((axis @ p) / np.float32(material.period), 1) < 0.5).astype(np.float32)
    elif material.texture == "checker":
        cells = np.floor(p * np.float32(2 / material.period) + np.float32(0.37))
        mix = np.mod(cells.sum(0), 2)
    else:
        mix = _value_noise(p * np.float32(2 / material.period), material.seed)
    return first + (second - first) * mix


def _value_noise(p: np.ndarray, seed: int) -> np.ndarray:
    """Return smooth noise (M,) in [0, 1] with one random value per unit cell, repeating every 16 cells."""
    table = np.random.default_rng(seed).random(4096, dtype=np.float32)
    cell = np.floor(p)
    x, y, z = (f := p - cell) * f * (3 - 2 * f)
    i, j, k = cell.astype(np.int32)

    def corner(di: int, dj: int, dk: int) -> np.ndarray:
        return table[(((i + di) & 15) * 16 + ((j + dj) & 15)) * 16 + ((k + dk) & 15)]

    def mix(low: np.ndarray, high: np.ndarray, weight: np.ndarray) -> np.ndarray:
        return low + (high - low) * weight

    a, b, c, d = (mix(corner(di, dj, 0), corner(di, dj, 1), z) for di in (0, 1) for dj in (0, 1))
    noise = mix(mix(a, b, y), mix(c, d, y), x)
    return np.clip(1.6 * noise - 0.3, 0, 1)  # stretched: averages concentrate around one half
