"""Pairs of images and depth maps: lists, tables, folders; what is missing or wrong is named."""

import logging

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("mmseg")
from mmengine.registry import DATASETS

from pe_spatial.depth.datasets import DepthPairDataset
from pe_spatial.depth.transforms import LoadDepth, PackDepthInputs
from pe_spatial.engine.loading import LoadCheckedImage
from pe_spatial.errors import ConfigError, DatasetError
from pe_spatial.synthetic import write_dataset

pytestmark = pytest.mark.mmseg
NYU = ("rgb_{}.jpg", "sync_depth_{}.png")
PIPELINE = [LoadCheckedImage(), LoadDepth(), PackDepthInputs()]


def write_pair(folder, number, *, depth=None, size=(24, 32)):
    """Write a pair of NYUv2's names; return its line in a list."""
    folder.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((*size, 3), 40 + number, np.uint8)).save(folder / f"rgb_{number:05d}.jpg")
    depth = np.full(size, 2000 + number) if depth is None else depth
    Image.fromarray(depth.astype(np.uint16)).save(folder / f"sync_depth_{number:05d}.png")
    return f"/{folder.name}/rgb_{number:05d}.jpg /{folder.name}/sync_depth_{number:05d}.png 518.8579"


@pytest.fixture
def nyu(tmp_path):
    """Three pairs in two scenes, and a list as BTS has them: leading slashes, no newline at the end."""
    lines = [write_pair(tmp_path / scene, n) for scene, n in (("kitchen_1", 0), ("kitchen_1", 7), ("cafe_2", 3))]
    (tmp_path / "train.txt").write_text("\n".join(lines))
    return tmp_path


def build(root, ann_file="train.txt", **options):
    options = {"scale": 1000, "pipeline": [], **options}
    return DepthPairDataset(data_root=str(root), ann_file=ann_file, **options)


def test_list_of_bts(nyu, log):
    dataset = build(nyu, max_depth=10.0, intrinsics=(500, 500, 16, 12), expected=3, pipeline=PIPELINE)
    assert len(dataset) == 3
    sample = dataset[2]["data_samples"]
    assert sample.img_path == str(nyu / "cafe_2/rgb_00003.jpg")
    assert sample.depth_path == str(nyu / "cafe_2/sync_depth_00003.png")
    assert sample.intrinsics == (500, 500, 16, 12)
    assert sample.max_depth == 10
    np.testing.assert_allclose(sample.gt_depth_map.data, 2.003)
    assert "train.txt: 3 pairs (0 more without depth, 0 missing)" in log[-1][0]


def test_lines_without_depth_are_counted(nyu, log):
    with (nyu / "train.txt").open("a") as file:
        file.write("\n\n2011_09_26/image_02/data/69.png None 721.5377\n2011_09_26/image_02/data/70.png None 721.5377\n")
    assert len(build(nyu, expected=3)) == 3
    assert "3 pairs (2 more without depth, 0 missing)" in log[-1][0]


@pytest.mark.parametrize(
    "line",
    ["one.jpg", "a.jpg b.png 518 7", "a.jpg b.png focal", "a.jpg b.png -5", "a.jpg b.png nan", "a b.jpg c.png"],
)
def test_wrong_lines_are_named(nyu, line):
    lines = (nyu / "train.txt").read_text().splitlines()
    (nyu / "train.txt").write_text("\n".join([*lines[:2], "", line, lines[2]]))
    with pytest.raises(DatasetError, match=rf"train.txt, line 4: '{line}' is not 'image depth focal_length'"):
        build(nyu)


def test_number_of_pairs_is_compared(nyu):
    with pytest.raises(DatasetError, match=r"train.txt contains 3 pairs instead of 24231; complete the dataset"):
        build(nyu, expected=24231)


def test_missing_files_are_counted_and_named(nyu, log):
    (nyu / "kitchen_1/rgb_00007.jpg").unlink()
    (nyu / "cafe_2/sync_depth_00003.png").unlink()
    message = (
        r"1 images and 1 depth maps of the 3 pairs in .*train.txt are missing: .*rgb_00007.jpg, "
        r".*sync_depth_00003.png; check data_root .* or set skip_missing=True"
    )
    with pytest.raises(DatasetError, match=message):
        build(nyu)
    dataset = build(nyu, skip_missing=True)
    assert [dataset[0]["img_path"], len(dataset)] == [str(nyu / "kitchen_1/rgb_00000.jpg"), 1]
    assert "1 pairs (0 more without depth, 2 missing)" in log[-1][0]
    with pytest.raises(DatasetError, match="1 images and 1 depth maps") as error:
        build(nyu, test_mode=True)
    assert "skip_missing" not in str(error.value)
    with pytest.raises(DatasetError, match="3 images and 3 depth maps"):  # all of them: not a hole but a wrong root
        build(nyu / "elsewhere", ann_file=str(nyu / "train.txt"), skip_missing=True)


def test_absent_and_unreadable_lists(nyu):
    with pytest.raises(DatasetError, match=r"there is no file .*val.txt; check data_root .*prepare_nyu"):
        build(nyu, ann_file="val.txt")
    (nyu / "binary.txt").write_bytes(b"\xff\xfe\x00\x81")
    with pytest.raises(DatasetError, match=r"binary.txt is not readable as text"):
        build(nyu, ann_file="binary.txt")
    (nyu / "empty.txt").write_text("\n")
    with pytest.raises(DatasetError, match=r"empty.txt contains no pairs"):
        build(nyu, ann_file="empty.txt")


def test_folders_of_nyuv2(nyu):
    dataset = build(nyu, "", names=NYU, expected=3)
    listed = build(nyu)
    pairs = [{(d[i]["img_path"], d[i]["depth_path"]) for i in range(3)} for d in (dataset, listed)]
    assert pairs[0] == pairs[1]
    with pytest.raises(DatasetError, match=r"there is no folder .*absent; check data_root"):
        build(nyu, "", names=NYU, data_prefix=dict(img_path="absent"))
    with pytest.raises(DatasetError, match=r"contains no pairs"):
        build(nyu, "", names=("{}.tif", "{}.png"))


def test_folders_of_the_synthetic_world(tmp_path):
    root = write_dataset(tmp_path / "world", scenes={"train": 2}, frames_per_scene=2, size=(48, 64))
    dataset = build(
        root, "", names=("{}.jpg", "{}.png"), data_prefix=dict(img_path="train", depth_path="depth/train"),
        pipeline=PIPELINE, max_depth=20.0,
    )  # fmt: skip
    assert len(dataset) == 4
    sample = dataset[3]["data_samples"]
    assert sample.depth_path.endswith("depth/train/0001/00001.png")
    assert sample.gt_depth_map.data.min() > 0.1


def test_table_of_real_pairs(shared, log):
    dataset = DepthPairDataset(ann_file="pairs.csv", data_root=str(shared / "data/depth"), pipeline=PIPELINE)
    samples = {dataset[i]["data_samples"].img_path.split("/")[-3]: dataset[i]["data_samples"] for i in range(16)}
    assert len(dataset) == 16
    medians = {name: float(np.median(s.gt_depth_map.data[s.gt_depth_map.data > 0])) for name, s in samples.items()}
    for name, low, high in (("nyuv2_eigen", 1, 5), ("nyuv2_raw_basement", 1, 5), ("kitti", 5, 30)):
        assert low < medians[name] < high
    assert samples["kitti"].max_depth == 80
    assert samples["kitti"].intrinsics == (707.0493, 707.0493, 604.0814, 180.5066)
    assert samples["nyuv2_raw_basement"].max_depth == 10
    holes = [float((samples[n].gt_depth_map.data == 0).float().mean()) for n in ("nyuv2_eigen", "nyuv2_raw_basement")]
    assert holes[0] == 0
    assert 0.2 < holes[1] < 0.4
    assert not log[1:]


TABLE = "rgb,depth,units_per_meter,fx,fy,cx,cy\nkitchen_1/rgb_00000.jpg,kitchen_1/sync_depth_00000.png,1000,5,5,2,2\n"


def test_options_take_the_place_of_columns(nyu):
    (nyu / "table.csv").write_text(TABLE)
    entry = build(nyu, "table.csv", scale=None)[0]
    assert (entry["depth_scale"], entry["intrinsics"]) == (1000, (5, 5, 2, 2))
    assert "max_depth" not in entry
    entry = build(nyu, "table.csv", scale=256, intrinsics=(7, 7, 1, 1), max_depth=80)[0]
    assert (entry["depth_scale"], entry["intrinsics"], entry["max_depth"]) == (256, (7, 7, 1, 1), 80)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("image,depth\na,b\n", "has the columns image, depth; it needs rgb and depth"),
        ("rgb,depth,scale\na,b,1\n", "has the columns rgb, depth, scale; .* allows units_per_meter"),
        ("rgb,depth,fx,fy\na,b,1,1\n", r"\(fx, fy, cx, cy together\)"),
        (TABLE + "a.jpg,b.png,0,5,5,2,2\n", "line 3: 'a.jpg,b.png,0,5,5,2,2' has a wrong units_per_meter"),
        (TABLE + "a.jpg,b.png,1000,5,x,2,2\n", "line 3: .* has a wrong fy"),
        (TABLE + "a.jpg,b.png,1000,5,5,inf,2\n", "line 3: .* has a wrong cx"),
        (TABLE + "a.jpg,,1000,5,5,2,2\n", "line 3: .* has a wrong rgb, depth"),
        (TABLE + "a.jpg,b.png,1000,5,5,2,2,9\n", "line 3: .* or number of fields"),
        (TABLE + "a.jpg,b.png,,5,5,2,2\n", "line 3 has no units_per_meter; add it, or set scale"),
    ],
)
def test_wrong_tables_are_named(nyu, text, message):
    (nyu / "table.csv").write_text(text)
    with pytest.raises(DatasetError, match=message):
        build(nyu, "table.csv", scale=None)


def test_training_draws_another_pair_for_an_empty_map(nyu, log):
    lines = (nyu / "train.txt").read_text() + "\n" + write_pair(nyu / "cafe_2", 9, depth=np.zeros((24, 32)))
    (nyu / "train.txt").write_text(lines)
    dataset = build(nyu, pipeline=[LoadCheckedImage(), LoadDepth(skip_empty=True), PackDepthInputs()])
    assert all(dataset[3]["data_samples"].gt_depth_map.data.any() for _ in range(10))
    empty = [message for message, level in log if level == logging.WARNING]
    assert len(empty) == 1  # each kind of file is named once, then at 10, 100, ...
    assert "no depth in" in empty[0]
    assert "sync_depth_00009.png: skipped (1 such files" in empty[0]
    kept = build(nyu, pipeline=PIPELINE, test_mode=True)
    assert not kept[3]["data_samples"].gt_depth_map.data.any()
    with pytest.raises(ConfigError, match="skip_empty is True in a test pipeline"):
        build(nyu, pipeline=[LoadCheckedImage(), LoadDepth(skip_empty=True)], test_mode=True)


def test_nothing_usable_ends(nyu, log):
    for path in nyu.glob("*/sync_depth_*.png"):
        Image.fromarray(np.zeros((24, 32), np.uint16)).save(path)
    dataset = build(nyu, pipeline=[LoadCheckedImage(), LoadDepth(skip_empty=True)], max_refetch=20)
    with pytest.raises(DatasetError, match=r"21 draws from .*train.txt gave no usable image"):
        dataset[0]
    assert len(log) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(ann_file="list.json"), "ann_file is list.json; give a list"),
        (dict(names=NYU), "ann_file is 'train.txt' and names is .*; give exactly one"),
        (dict(ann_file=""), "ann_file is '' and names is None; give exactly one"),
        (dict(ann_file="", names=("a.jpg", "{}.png")), "two patterns with one {} each"),
        (dict(scale=None), "scale is None; give the units"),
        (dict(scale=0), "scale is 0; give the units"),
        (dict(min_depth=3, max_depth=2), "min_depth is 3 and max_depth 2"),
        (dict(intrinsics=(5, 5)), r"intrinsics is \(5, 5\); give \(fx, fy, cx, cy\)"),
        (dict(data_prefix=dict(depth_map_path="d")), "data_prefix has the keys depth_map_path; allowed are img_path"),
        (dict(skip_missing=True, test_mode=True), "skip_missing=True would omit pairs"),
    ],
)
def test_wrong_options_are_refused(nyu, options, message):
    with pytest.raises(ConfigError, match=message):
        build(nyu, **options)


def test_registered(nyu):
    cfg = dict(type="DepthPairDataset", data_root=str(nyu), ann_file="train.txt", scale=1000, pipeline=[])
    assert DATASETS.build(cfg).metainfo == {"classes": (), "palette": [], "image_size": (24, 32)}


def test_hidden_files_and_folders_are_no_pairs(nyu):
    for name in ("kitchen_1/._rgb_00000.jpg", ".ipynb_checkpoints/rgb_00000.jpg", "kitchen_1/.trash/rgb_00001.jpg"):
        (nyu / name).parent.mkdir(exist_ok=True)
        (nyu / name).write_bytes(b"")
    assert len(DepthPairDataset(data_root=str(nyu), names=NYU, scale=1000, pipeline=[])) == 3
    dataset = DepthPairDataset(data_root=str(nyu), names=("{}.jpg", "{}.png"), scale=1000, pipeline=[], lazy_init=True)
    images = [pair["img_path"] for pair in dataset._folder_pairs("{}.jpg", "{}.png")]
    assert len(images) == 3
