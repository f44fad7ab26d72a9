"""The synthetic world: its geometry against closed forms, its determinism, and what it writes."""

import dataclasses
import json
import multiprocessing
import os
import signal
import time

import numpy as np
import pytest
from PIL import Image

from pe_spatial.errors import DatasetError
from pe_spatial.synthetic import CATEGORIES, render_frame, sample_scene, write_dataset
from pe_spatial.synthetic import render as render_module
from pe_spatial.synthetic import scene as scene_module
from pe_spatial.synthetic import writer as writer_module
from pe_spatial.synthetic.render import intrinsics
from pe_spatial.synthetic.scene import Camera, Room, Scene, Solid

SIZE = (72, 96)
HALVES = {
    "sphere": (0.4, 0.4, 0.4),
    "box": (0.4, 0.25, 0.3),
    "cylinder": (0.25, 0.25, 0.4),
    "cone": (0.3, 0.3, 0.4),
    "torus": (0.45, 0.45, 0.13),
}


def scene_of(*solids: Solid, **camera: float) -> Scene:
    options = {"target": (0.0, 0.0, 0.5), "distance": 2.2, "height": 1.3, "azimuth": 0.7, "roll": 0.1, **camera}
    return Scene(
        room=Room(width=7.0, length=6.0, height=3.0),
        solids=solids,
        camera=Camera(**options),
        light=(0.8, -0.9, 2.8),
    )


def rays_of(frame: render_module.Frame) -> tuple[np.ndarray, np.ndarray]:
    """Origin (3,) and directions (H, W, 3) whose parameter is the depth, in float64 and from the matrices alone."""
    v, u = np.indices(frame.depth.shape) + 0.5
    pixels = np.stack([u, v, np.ones_like(u)], axis=-1)
    pose = frame.camera_to_world
    return pose[:3, 3], pixels @ np.linalg.inv(frame.intrinsics).T @ pose[:3, :3].T


def backproject(frame: render_module.Frame) -> np.ndarray:
    """World points (H, W, 3) of all pixels."""
    origin, rays = rays_of(frame)
    return origin + frame.depth[..., None] * rays


def local_points(solid: Solid, points: np.ndarray, at: float) -> np.ndarray:
    rotation, position = solid.pose(at)
    return (points - position) @ rotation


def distance_to_surface(solid: Solid, p: np.ndarray) -> np.ndarray:
    """Distance (N,) in meters, unsigned, of local points (N, 3) to the solid's surface; cones by their two parts."""
    a, _, h = solid.half
    ring = np.hypot(p[:, 0], p[:, 1])
    if solid.category == "sphere":
        return abs(np.linalg.norm(p, axis=1) - a)
    if solid.category == "torus":
        return abs(np.hypot(ring - (a - h), p[:, 2]) - h)
    if solid.category == "box":
        return abs((abs(p) - solid.half).max(1))
    if solid.category == "cylinder":
        return abs(np.maximum(ring - a, abs(p[:, 2]) - h))
    slant = (ring - a * (h - p[:, 2]) / (2 * h)) * 2 * h / np.hypot(a, 2 * h)
    return abs(np.maximum(slant, -h - p[:, 2]))


def is_inside(solid: Solid, p: np.ndarray) -> np.ndarray:
    """Whether local points (N, 3) are in the solid, its surface included."""
    a, _, h = solid.half
    x, y, z = p.T
    ring, within = np.hypot(x, y), (abs(p) <= solid.half).all(1)
    return (
        within
        & {
            "sphere": x * x + y * y + z * z <= a * a,
            "box": within,
            "cylinder": ring <= a,
            "cone": ring <= a * (h - z) / (2 * h),
            "torus": np.hypot(ring - a + h, z) <= h,
        }[solid.category]
    )


def test_scene_is_a_function_of_the_seed():
    assert sample_scene((3, 1, 4)) == sample_scene((3, 1, 4))
    assert sample_scene((3, 1, 4)) != sample_scene((3, 1, 5))
    first, again = (render_frame(sample_scene(11), 0.3, SIZE) for _ in range(2))
    for field in dataclasses.fields(first):
        np.testing.assert_array_equal(getattr(first, field.name), getattr(again, field.name))
    assert (render_frame(sample_scene(12), 0.3, SIZE).rgb != first.rgb).any()


def test_frame_types():
    frame = render_frame(sample_scene(0), 0.0, SIZE)
    assert (frame.rgb.shape, frame.rgb.dtype) == ((*SIZE, 3), np.uint8)
    assert (frame.depth.shape, frame.depth.dtype) == (SIZE, np.float32)
    assert (frame.instances.shape, frame.instances.dtype) == (SIZE, np.int32)
    pose = frame.camera_to_world
    np.testing.assert_allclose(pose[:3, :3] @ pose[:3, :3].T, np.eye(3), atol=1e-12)
    assert np.linalg.det(pose[:3, :3]) == pytest.approx(1)


def test_camera_looks_at_its_target_with_the_world_upright():
    camera = Camera(target=(0.3, -0.2, 0.5), distance=2.0, height=1.5, sweep=0.8, rise=0.2, approach=-0.3)
    for at in (0.0, 1.3, 2.0):
        pose = camera.pose(at)
        x, y, z = (np.array(camera.target) - pose[:3, 3]) @ pose[:3, :3]
        np.testing.assert_allclose([x, y], 0, atol=1e-12)
        assert z > 0
        assert pose[2, 1] < 0  # the image's downward axis points to the floor
    focal = intrinsics(camera, (40, 80))[0, 0]
    assert focal == pytest.approx(20 / np.tan(camera.fov / 2))  # the field of view spans the shorter side


def test_depth_of_sphere_and_room_equals_the_closed_form():
    sphere = Solid(id=4, category="sphere", half=(0.4,) * 3, position=(0.1, -0.2, 0.6))
    frame = render_frame(scene_of(sphere), 0.0, SIZE)
    origin, rays = rays_of(frame)

    to_center = origin - sphere.position
    a, b, c = (rays**2).sum(-1), rays @ to_center, to_center @ to_center - sphere.half[0] ** 2
    square = b * b - a * c
    on_sphere = square > 0
    by_sphere = np.where(on_sphere, (-b - np.sqrt(np.maximum(square, 0))) / a, np.inf)
    with np.errstate(divide="ignore"):
        bounds = [(0, -3.5), (0, 3.5), (1, -3), (1, 3), (2, 0), (2, 3)]
        planes = [(bound - origin[k]) / rays[..., k] for k, bound in bounds]
    by_room = np.min([np.where(t > 0, t, np.inf) for t in planes], axis=0)

    clear = abs(square) > 1e-4  # not on the silhouette, where float32 may decide either way
    np.testing.assert_array_equal((frame.instances == 4)[clear], on_sphere[clear])
    np.testing.assert_allclose(frame.depth[clear], np.minimum(by_sphere, by_room)[clear], rtol=2e-5)
    assert on_sphere.mean() > 0.05


@pytest.mark.parametrize("category", CATEGORIES)
def test_pixels_of_a_solid_lie_on_its_surface_and_fill_its_silhouette(category: str):
    half = HALVES[category]
    for angles in ((0.0, 0.0, 0.0), (0.9, 0.4, -2.0), (2.5, -0.3, 1.0)):
        solid = Solid(id=1, category=category, half=half, position=(0, 0, 0.6), angles=angles, spin=1.0)
        frame = render_frame(scene_of(solid), 0.7, SIZE)
        mask = frame.instances == 1
        local = local_points(solid, backproject(frame)[mask], 0.7)
        assert distance_to_surface(solid, local).max() < 2e-5
        # The silhouette by brute force: rays with a sample point inside of the solid.
        origin, rays = rays_of(frame)
        points = origin + np.linspace(1.2, 3.6, 400)[:, None, None, None] * rays
        p = local_points(solid, points, 0.7).reshape(-1, 3)
        inside = is_inside(solid, p).reshape(points.shape[:-1]).any(0)
        assert not (inside & ~mask).any()
        assert (mask & ~inside).sum() <= 0.02 * mask.sum()  # grazed between two samples
        assert mask.sum() > 100


def test_normals_point_out_of_the_surface():
    rng = np.random.default_rng(0)
    for category, half in HALVES.items():
        solid = Solid(id=1, category=category, half=half, position=(0, 0, 0))
        d = rng.normal(size=(3, 500)).astype(np.float32)
        d /= np.linalg.norm(d, axis=0)
        o = -2 * d + rng.uniform(-0.2, 0.2, size=(3, 500)).astype(np.float32)
        with np.errstate(all="ignore"):
            t = render_module._INTERSECT[category](o, d, half)
        hit = np.isfinite(t)
        p = (o + t * d)[:, hit]
        n = render_module._normal(solid, p)
        np.testing.assert_allclose(np.linalg.norm(n, axis=0), 1, atol=1e-5)
        assert ((n * d[:, hit]).sum(0) < 1e-3).all()  # a surface seen from outside faces the ray
        assert hit.sum() > 100
        step = 1e-3
        on, off = distance_to_surface(solid, p.T), distance_to_surface(solid, (p + step * n).T)
        assert np.quantile(off - on, 0.1) > 0.98 * step  # and the normal leaves it by the shortest way


def test_instances_are_those_of_the_nearest_surface():
    for seed in range(4):
        scene = sample_scene(seed)
        frame = render_frame(scene, 1.0, SIZE)
        alone = [render_frame(dataclasses.replace(scene, solids=(solid,)), 1.0, SIZE) for solid in scene.solids]
        empty = render_frame(dataclasses.replace(scene, solids=()), 1.0, SIZE)
        depths = np.stack([empty.depth, *(np.where(one.instances > 0, one.depth, np.inf) for one in alone)])
        ids = np.array([0, *(solid.id for solid in scene.solids)])
        np.testing.assert_array_equal(frame.instances, ids[depths.argmin(0)])
        np.testing.assert_array_equal(frame.depth, depths.min(0))


def test_order_of_solids_does_not_matter():
    scene = sample_scene(5)
    swapped = dataclasses.replace(scene, solids=scene.solids[::-1])
    np.testing.assert_array_equal(render_frame(scene, 0.5, SIZE).rgb, render_frame(swapped, 0.5, SIZE).rgb)


def test_backprojected_room_lies_on_its_planes():
    scene = sample_scene(1)
    frame = render_frame(scene, 0.4, SIZE)
    points = backproject(frame)[frame.instances == 0]
    room = scene.room
    x, y, z = points.T
    gaps = np.stack([room.width / 2 - abs(x), room.length / 2 - abs(y), z, room.height - z])
    assert abs(gaps.min(0)).max() < 1e-4
    assert (abs(z) < 1e-4).mean() > 0.2  # the floor is in view


def test_points_followed_to_another_time_have_consistent_depth():
    """Move each visible point with its object and the camera: it is where the later frame says, or hidden there."""
    for seed in range(3):
        scene = sample_scene(seed)
        first, later = render_frame(scene, 0.2, SIZE), render_frame(scene, 0.7, SIZE)
        points = backproject(first)
        for solid in scene.solids:
            mask = first.instances == solid.id
            rotation, position = solid.pose(0.7)
            points[mask] = local_points(solid, points[mask], 0.2) @ rotation.T + position
        pose = later.camera_to_world
        seen = (points.reshape(-1, 3) - pose[:3, 3]) @ pose[:3, :3] @ later.intrinsics.T
        z, u, v = seen[:, 2], *np.floor(seen[:, :2] / seen[:, 2:]).astype(int).T
        inside = (z > 0) & (u >= 1) & (u < SIZE[1] - 1) & (v >= 1) & (v < SIZE[0] - 1)
        z, u, v = z[inside], u[inside], v[inside]
        around = np.stack([later.depth[v + dv, u + du] for dv in (-1, 0, 1) for du in (-1, 0, 1)])
        tolerance = 0.01 * z
        assert (z > around.min(0) - tolerance).all()  # nothing is in front of what the later frame shows
        consistent = (z < around.max(0) + tolerance) & (first.instances.ravel()[inside] == later.instances[v, u])
        assert consistent.mean() > 0.8
        assert inside.mean() > 0.5


def test_sampled_solids_touch_nothing():
    for seed in range(15):
        scene = sample_scene(seed)
        for at in np.linspace(0, scene.duration, 5):
            frame = render_frame(scene, at, (24, 24))
            eye = frame.camera_to_world[:3, 3]
            places = [(solid.pose(at)[1], solid.radius) for solid in scene.solids]
            for i, (center, radius) in enumerate(places):
                assert np.linalg.norm(center - eye) > radius + 0.2
                assert all(np.linalg.norm(center - other) > radius + reach for other, reach in places[:i])
            assert frame.depth.min() > 0.1


@pytest.mark.parametrize("category", CATEGORIES)
def test_lowest_point_of_a_turned_solid(category: str):
    """Against the lowest of many points inside of it; it decides at which height a solid rests."""
    solid = Solid(id=1, category=category, half=HALVES[category], position=(0, 0, 0))
    p = np.stack(np.meshgrid(*[np.linspace(-1, 1, 61)] * 3), -1).reshape(-1, 3) * solid.half
    p = p[is_inside(solid, p)]
    for angles in ((0.0, 0.0, 0.0), (np.pi / 2, 0.0, 1.0), (0.9, 0.4, -2.0), (2.5, -0.3, 1.0)):
        rotation, _ = dataclasses.replace(solid, angles=angles).pose(0.0)
        reach = scene_module._reach_down(category, solid.half, rotation)
        assert 0 <= reach + (p @ rotation.T)[:, 2].min() < 0.02


def test_sampled_solids_rest_on_the_floor_or_float():
    solids = [solid for seed in range(20) for solid in sample_scene(seed).solids]
    lowest = []
    for solid in solids:
        rotation, position = solid.pose(0.8)
        lowest.append(position[2] - scene_module._reach_down(solid.category, solid.half, rotation))
    assert min(lowest) > -1e-6
    assert 0.6 < np.mean(np.array(lowest) < 1e-6) < 0.95


def test_solid_sways_along_a_sine_and_spins_around_the_vertical():
    solid = Solid(id=1, category="box", half=(0.1, 0.2, 0.3), position=(1, 2, 3), angles=(0.4, 0.5, 0.6),
                  sway=(0.3, 0.1, 0), sway_period=4.0, spin=0.5)  # fmt: skip
    (before, start), (after, end) = solid.pose(0.0), solid.pose(1.0)
    np.testing.assert_allclose(start, [1, 2, 3])
    np.testing.assert_allclose(end, [1.3, 2.1, 3])  # a quarter of the period
    c, s = np.cos(0.5), np.sin(0.5)
    np.testing.assert_allclose(after @ before.T, [[c, -s, 0], [s, c, 0], [0, 0, 1]], atol=1e-12)


def test_scenes_are_worth_looking_at():
    """Several objects, fairly large, overlapping in the image: over many scenes, not in each."""
    sides, hidden, categories = [], 0, set()
    for seed in range(30):
        scene = sample_scene(seed)
        frame = render_frame(scene, 1.0, (64, 64))
        visible = [solid for solid in scene.solids if (frame.instances == solid.id).sum() >= 4]
        assert len(visible) >= 1
        for solid in visible:
            categories.add(solid.category)
            rows, columns = np.nonzero(frame.instances == solid.id)
            sides.append(np.sqrt((np.ptp(rows) + 1) * (np.ptp(columns) + 1)) / 64)
            alone = render_frame(dataclasses.replace(scene, solids=(solid,)), 1.0, (64, 64)).instances > 0
            hidden += rows.size < 0.95 * alone.sum()
    assert 0.22 < np.median(sides) < 0.4
    assert hidden > 0.12 * len(sides)
    assert categories == set(CATEGORIES)


def test_shadow_falls_away_from_the_lamp():
    scene = scene_of(Solid(id=1, category="sphere", half=(0.3,) * 3, position=(0, 0, 1.0)), height=2.2)
    lit = render_frame(dataclasses.replace(scene, solids=()), 0.0, SIZE)
    frame = render_frame(scene, 0.0, SIZE)
    points = backproject(frame)
    on_floor = abs(points[..., 2]) < 1e-3
    on_floor[1:-1, 1:-1] &= on_floor[1:-1, :-2] & on_floor[1:-1, 2:] & on_floor[:-2, 1:-1]  # not on the ball's rim
    darkening = (lit.rgb.mean(-1) - frame.rgb.mean(-1))[on_floor]
    to, lamp_to_center = points[on_floor] - scene.light, np.array([0, 0, 1.0]) - scene.light
    along = to @ lamp_to_center / np.linalg.norm(to, axis=1)
    missed = np.sqrt(lamp_to_center @ lamp_to_center - along**2)  # distance of the center from the lamp's ray
    assert (darkening[missed < 0.28] > 20).all()
    assert (darkening[missed > 0.33] == 0).all()
    assert (missed < 0.28).sum() > 30


@pytest.mark.parametrize("kwargs", [{"num_solids": (1, 3)}, {"num_solids": (5, 4)}, {"duration": 0.0}])
def test_sample_scene_rejects(kwargs: dict):
    with pytest.raises(ValueError, match=next(iter(kwargs))):
        sample_scene(0, **kwargs)


# ---------------------------------------------------------------------------------------------------- written sets

PARAMETERS = {"scenes": {"train": 3, "val": 2}, "frames_per_scene": 3, "size": (64, 80), "seed": 7}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory):
    pytest.importorskip("pycocotools")
    return write_dataset(tmp_path_factory.mktemp("synthetic") / "world", **PARAMETERS)


def files_of(root) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


def test_writes_the_same_bytes_whatever_the_workers(world, tmp_path):
    again = write_dataset(tmp_path / "again", **PARAMETERS, workers=2)
    assert files_of(again) == files_of(world)
    assert [p.name for p in tmp_path.iterdir()] == ["again"]  # the temporary sibling is gone


def test_seeds_and_splits_are_disjoint(world, tmp_path):
    other = write_dataset(tmp_path / "other", **{**PARAMETERS, "seed": 8, "scenes": {"train": 1}})
    images = [data for root in (world, other) for name, data in files_of(root).items() if name.endswith(".jpg")]
    assert len(images) == 15 + 3
    assert len(set(images)) == len(images)


def test_coco_agrees_with_the_images(world):
    from pycocotools import mask as rle
    from pycocotools.coco import COCO

    coco = COCO(world / "annotations" / "instances_train.json")
    assert [c["name"] for c in coco.loadCats(coco.getCatIds())] == list(CATEGORIES)
    assert min(coco.getCatIds()) == 1
    assert len(coco.imgs) == 9
    tracks: dict[int, set] = {}
    for image in coco.imgs.values():
        stem = image["file_name"].removesuffix(".jpg")
        assert Image.open(world / "train" / image["file_name"]).size == (80, 64) == (image["width"], image["height"])
        ids = np.array(Image.open(world / "instances" / "train" / f"{stem}.png"))
        depth = np.array(Image.open(world / "depth" / "train" / f"{stem}.png"))
        assert depth.dtype == np.uint16
        scene = sample_scene((7, 0, image["video_id"] - 1))
        frame = render_frame(scene, image["time"], (64, 80))
        np.testing.assert_allclose(depth / 1000, frame.depth, atol=6e-4)
        np.testing.assert_array_equal(ids, frame.instances)
        np.testing.assert_allclose(image["camera_to_world"], frame.camera_to_world)
        np.testing.assert_allclose(image["intrinsics"], frame.intrinsics)
        annotations = coco.imgToAnns[image["id"]]
        enough = {i for i in np.unique(ids) if i and (ids == i).sum() >= writer_module.MIN_VISIBLE * ids.size}
        assert {a["object_id"] for a in annotations} == enough
        for annotation in annotations:
            mask = ids == annotation["object_id"]
            np.testing.assert_array_equal(coco.annToMask(annotation), mask)
            assert annotation["area"] == mask.sum()
            assert annotation["iscrowd"] == 0
            x, y, w, h = annotation["bbox"]
            assert mask[y : y + h, x : x + w].sum() == mask.sum()
            assert mask[y].any() and mask[y + h - 1].any() and mask[:, x].any() and mask[:, x + w - 1].any()  # noqa: PT018
            np.testing.assert_array_equal(rle.toBbox(annotation["segmentation"]), annotation["bbox"])
            solid = next(s for s in scene.solids if s.id == annotation["object_id"])
            assert CATEGORIES[annotation["category_id"] - 1] == solid.category
            identity = (image["video_id"], annotation["object_id"], annotation["category_id"])
            tracks.setdefault(annotation["instance_id"], set()).add(identity)
    assert all(len(identities) == 1 for identities in tracks.values())
    assert len({next(iter(identities)) for identities in tracks.values()}) == len(tracks)
    assert [v["id"] for v in coco.dataset["videos"]] == [1, 2, 3]
    order = [(image["video_id"], image["frame_id"]) for image in coco.imgs.values()]
    assert order == [(video, frame) for video in (1, 2, 3) for frame in (0, 1, 2)]


def test_reuses_an_equal_set_and_refuses_others(world, tmp_path, monkeypatch):
    monkeypatch.setattr(writer_module, "_write_split", lambda *_: pytest.fail("rendered again"))
    assert write_dataset(world, **PARAMETERS) == world
    with pytest.raises(DatasetError, match="seed 7 instead of 9; delete it"):
        write_dataset(world, **{**PARAMETERS, "seed": 9})
    (tmp_path / "precious").write_text("mine")
    with pytest.raises(DatasetError, match=r"no world\.json"):
        write_dataset(tmp_path, **PARAMETERS)
    assert (tmp_path / "precious").read_text() == "mine"


def test_an_error_in_the_middle_leaves_nothing(tmp_path, monkeypatch):
    calls = []

    def fail_at_third(*args):
        calls.append(args)
        if len(calls) == 3:
            raise RuntimeError("disk full")
        return render_frame(*args)

    monkeypatch.setattr(writer_module, "render_frame", fail_at_third)
    with pytest.raises(RuntimeError, match="disk full"):
        write_dataset(tmp_path / "world", **PARAMETERS)
    assert list(tmp_path.iterdir()) == []


def test_a_kill_in_the_middle_leaves_no_partial_set(tmp_path):
    root = tmp_path / "world"
    process = multiprocessing.get_context("spawn").Process(
        target=write_dataset, args=(root,), kwargs={**PARAMETERS, "scenes": {"train": 5000}}
    )
    process.start()
    deadline = time.monotonic() + 30
    while not list(tmp_path.rglob("*.jpg")) and time.monotonic() < deadline:
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert list(tmp_path.rglob("*.jpg"))  # it was at work
    assert not root.exists()
    assert write_dataset(root, **{**PARAMETERS, "scenes": {"val": 1}}) == root  # and the place is free for the next
    assert json.loads((root / "world.json").read_text())["scenes"] == {"val": 1}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"scenes": {"dev": 3}}, "scenes"),
        ({"scenes": {"train": 0}}, "scenes"),
        ({"scenes": {}}, "scenes"),
        ({"frames_per_scene": 0}, "frames_per_scene"),
        ({"workers": 0}, "workers"),
        ({"seed": -1}, "seed"),
        ({"size": (1, 64)}, "size"),
    ],
)
def test_write_dataset_rejects(tmp_path, changed: dict, message: str):
    with pytest.raises(ValueError, match=message):
        write_dataset(tmp_path / "world", **{**PARAMETERS, **changed})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.mmdet
def test_mmdet_loads_boxes_and_masks(world):
    pytest.importorskip("mmdet")
    from mmcv.transforms import LoadImageFromFile
    from mmdet.datasets import CocoDataset
    from mmdet.datasets.transforms import LoadAnnotations
    from mmengine.dataset import Compose

    dataset = CocoDataset(
        data_root=str(world),
        ann_file="annotations/instances_train.json",
        data_prefix={"img": "train/"},
        metainfo={"classes": CATEGORIES},
        filter_cfg={"filter_empty_gt": True, "min_size": 1},
    )
    ids = np.array(Image.open(world / "instances" / "train" / "0000" / "00000.png"))
    results = Compose([LoadImageFromFile(), LoadAnnotations(with_bbox=True, with_mask=True)])(dataset.get_data_info(0))
    assert results["img_path"].endswith("train/0000/00000.jpg")
    assert not results["gt_ignore_flags"].any()
    values = [i for i in np.unique(ids) if i and (ids == i).sum() >= writer_module.MIN_VISIBLE * ids.size]
    np.testing.assert_array_equal(results["gt_masks"].masks.astype(bool), np.stack([ids == i for i in values]))
    boxes = results["gt_bboxes"].tensor.numpy()
    rows, columns = np.nonzero(ids == values[0])
    np.testing.assert_array_equal(boxes[0], [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
