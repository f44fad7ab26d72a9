"""Clips of every layout: the right mask for each image, objects that come and go; what cannot be used is named."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("mmengine")
pytest.importorskip("mmcv")
from mmengine.dataset import pseudo_collate
from pycocotools import mask as rle
from torch.utils.data import DataLoader

from pe_spatial.engine.determinism import SeededIndex
from pe_spatial.errors import ConfigError, DatasetError
from pe_spatial.synthetic import write_dataset
from pe_spatial.tracking.sam2 import transforms
from pe_spatial.tracking.sam2.datasets import LoadClip, PngMasks, VideoClipDataset
from pe_spatial.tracking.vos.masks import write_mask

SIZE = (24, 40)
assert transforms.PackClip  # registers


def image(number, size=SIZE):
    """An image that says which frame it is: every pixel is 5 * `number`."""
    return np.full((*size, 3), 5 * number, np.uint8)


def ids(number, objects, size=SIZE):
    """The object i covers i rows from row `number` on, at its own columns."""
    mask = np.zeros(size, np.uint8)
    for n, i in enumerate(objects):
        mask[number : number + 2, 4 * n : 4 * n + 3] = i
    return mask


def save_frames(folder, numbers, name="{:05d}.png", size=SIZE):
    """Lossless frames, of which each shows its number."""
    folder.mkdir(parents=True)
    for number in numbers:
        Image.fromarray(image(number, size)).save(folder / name.format(number))


def save_masks(folder, numbers, objects, name="{:05d}.png", gray=False):
    """`objects` of frame -> ids."""
    folder.mkdir(parents=True)
    for number in numbers:
        mask = ids(number, objects(number))
        if gray:
            Image.fromarray(mask).save(folder / name.format(number))
        else:
            write_mask(folder / name.format(number), mask)


@pytest.fixture
def davis(tmp_path):
    """bear: 2 and 7, which is there from frame 3 on; cat: nothing to see in frame 0; short: two frames."""
    for name, count, objects in [
        ("bear", 8, lambda t: (2, 7) if t >= 3 else (2,)),
        ("cat", 5, lambda t: (1,) if t else ()),
        ("short", 2, lambda _: (1,)),
    ]:
        save_frames(tmp_path / "JPEGImages" / "480p" / name, range(count))
        save_masks(tmp_path / "Annotations" / "480p" / name, range(count), objects)
    return tmp_path


def dataset(root, layout="davis", names=None, load=None, **options):
    """A set of whole images: LoadClip and PackClip."""
    if names:
        (root / "names.txt").write_text("\n".join(names))
        options["sequences"] = str(root / "names.txt")
    pipeline = [dict(type="LoadClip", **{"num_frames": 3, "max_objects": 3, **(load or {})}), dict(type="PackClip")]
    return VideoClipDataset(data_root=str(root), layout=layout, pipeline=pipeline, **options)


def numbers(item):
    """The frames that the images show."""
    assert (item["inputs"] == item["inputs"][:, :1, :1, :1]).all()
    return [int(value) // 5 for value in item["inputs"][:, 0, 0, 0]]


def assert_as_drawn(item, objects, place=lambda number, _: number):
    """Every mask is what `ids` draws into the frame that the image shows; `objects` of frame -> all ids there."""
    for t, number in enumerate(numbers(item)):
        expected = ids(place(number, t), objects(number))
        for n, i in enumerate(item["data_samples"].objects):
            assert np.array_equal(item["masks"][n, t].numpy(), expected == i), (number, i)


def test_davis_clips_are_windows_with_the_masks_of_their_frames(davis):
    bear = dataset(davis, names=["bear"])
    seen = set()
    for seed in range(30):
        np.random.seed(seed)
        item = bear[0]
        start = numbers(item)[0]
        seen.add(start)
        assert numbers(item) == [start, start + 1, start + 2]
        assert sorted(item["data_samples"].objects) == ([2, 7] if start >= 3 else [2])  # visible in the first frame
        assert item["data_samples"].img_path == f"{davis}/JPEGImages/480p/bear {start:05d}..{start + 2:05d}"
        assert item["inputs"].shape == (3, 3, *SIZE)
        assert_as_drawn(item, lambda t: (2, 7) if t >= 3 else (2,))
    assert seen == set(range(6))


def test_time_may_run_backwards(davis):
    bear = dataset(davis, names=["bear"], load=dict(reverse_prob=0.5))
    directions = set()
    for seed in range(12):
        np.random.seed(seed)
        item = bear[0]
        directions.add(numbers(item)[1] - numbers(item)[0])
        assert sorted(item["data_samples"].objects) == ([2, 7] if numbers(item)[0] >= 3 else [2])
        assert_as_drawn(item, lambda t: (2, 7) if t >= 3 else (2,))  # 7 is absent at the end of some
    assert directions == {1, -1}


def test_the_first_frame_always_shows_an_object(davis):
    cat = dataset(davis, names=["cat"])
    starts = set()
    for seed in range(12):
        np.random.seed(seed)
        starts.add(numbers(cat[0])[0])
    assert starts == {1, 2}


def test_objects_are_drawn_at_random_up_to_the_maximum(davis):
    bear = dataset(davis, names=["bear"], load=dict(max_objects=1, num_frames=1))
    drawn = []
    for seed in range(40):
        np.random.seed(seed)
        item = bear[0]
        assert item["masks"].shape == (1, 1, *SIZE)
        if numbers(item)[0] >= 3:
            drawn += item["data_samples"].objects
    assert set(drawn) == {2, 7}


def test_short_videos_are_replaced_and_logged_once(davis, caplog):
    short = dataset(davis, names=["short", "bear"])
    with caplog.at_level("WARNING"):
        for _ in range(3):
            assert short[0]["data_samples"].video == "bear"
    load = LoadClip(num_frames=3, max_objects=1)
    assert load.transform(dataset(davis, names=["short"]).get_data_info(0)) is None
    assert load.skipped == {f"{davis}/JPEGImages/480p/short"}
    with pytest.raises(DatasetError, match=r"3 draws from .* gave no usable"):
        dataset(davis, names=["short"], max_refetch=2)[0]
    empty = dataset(davis, names=["cat"], load=dict(num_frames=5), max_refetch=2)
    with pytest.raises(DatasetError, match="gave no usable"):  # frame 0 is the only first one
        empty[0]


def test_lists_of_videos(davis):
    assert [v["video"] for v in dataset(davis).load_data_list()] == ["bear", "cat", "short"]
    lists = davis / "ImageSets" / "2017"
    lists.mkdir(parents=True)
    (lists / "train.txt").write_text("short\nbear\n")
    (lists / "val.txt").write_text("cat\n")
    assert [v["video"] for v in dataset(davis).load_data_list()] == ["short", "bear"]
    assert [v["video"] for v in dataset(davis, split="val").load_data_list()] == ["cat"]
    assert [v["video"] for v in dataset(davis, names=["cat", "bear"]).load_data_list()] == ["cat", "bear"]
    with pytest.raises(DatasetError, match=r"1 of 2 sequences are not in .*, the first is dog"):
        dataset(davis, names=["cat", "dog"])


@pytest.mark.parametrize("layout", ["youtube-vos", "mose"])
def test_only_annotated_frames_take_part(tmp_path, layout):
    """YouTube-VOS: every 5th; here also with images of all frames and gray masks with names of 8 digits."""
    save_frames(tmp_path / "train" / "JPEGImages" / "0a", range(21))
    save_masks(tmp_path / "train" / "Annotations" / "0a", range(0, 21, 5), lambda _: (1, 4), "{:08d}.png", gray=True)
    videos = dataset(tmp_path, layout)
    starts = set()
    for seed in range(12):
        np.random.seed(seed)
        item = videos[0]
        starts.add(numbers(item)[0])
        assert np.diff(numbers(item)).tolist() == [5, 5]
        assert_as_drawn(item, lambda _: (1, 4))
    assert starts == {0, 5, 10}


def test_names_that_are_no_numbers_have_to_be_equal(tmp_path):
    for number, name in enumerate(["a", "b", "c"]):
        save_frames(tmp_path / "train" / "JPEGImages" / name, [number], name + "{}.png")
        save_masks(tmp_path / "train" / "Annotations" / name, [number], lambda _: (1,), name + "{}.png")
    item = dataset(tmp_path, "mose", load=dict(num_frames=1))[1]
    assert item["data_samples"].frames == ["b1"]
    assert_as_drawn(item, lambda _: (1,))


def test_void_is_background_but_the_object_of_davis_2016(tmp_path):
    folder = tmp_path / "m"
    save_masks(folder, range(4), lambda t: [(), (1, 255), (255,), (2, 255)][t], gray=True)
    masks = PngMasks(folder)
    assert [sorted(masks.read(frame)) for frame in masks.frames] == [[], [1], [], [2]]
    binary = tmp_path / "binary"
    save_masks(binary, range(3), lambda t: (255,) if t else (), gray=True)
    masks = PngMasks(binary)
    assert [sorted(masks.read(frame)) for frame in masks.frames] == [[], [1], [1]]
    assert np.array_equal(masks.read("00002")[1], ids(2, (255,)) == 255)


def test_folders_of_objects_may_overlap_and_need_no_option(tmp_path):
    """As in SA-V's val, which takes prefixes: frames of 24 and masks of 6 per second, an object without all files."""
    save_frames(tmp_path / "JPEGImages_24fps" / "sav_1", range(17))
    one = np.zeros(SIZE, np.uint8)
    one[2:10, 3:20] = 255
    two = np.zeros(SIZE, np.uint8)
    two[5:12, 10:30] = 1
    for name, mask, frames in [("000", one, range(0, 17, 4)), ("003", two, (0, 4, 8))]:
        (tmp_path / "Annotations_6fps" / "sav_1" / name).mkdir(parents=True)
        for number in frames:
            write_mask(tmp_path / "Annotations_6fps" / "sav_1" / name / f"{number:05d}.png", mask)
    videos = dataset(
        tmp_path,
        "mose",
        data_prefix=dict(img_path="JPEGImages_24fps", ann_path="Annotations_6fps"),
        load=dict(num_frames=5),
    )
    item = videos[0]
    assert numbers(item) == [0, 4, 8, 12, 16]
    masks = dict(zip(item["data_samples"].objects, item["masks"].numpy(), strict=True))
    assert sorted(masks) == [0, 3]
    assert np.array_equal(masks[0][4], one > 0)
    assert np.array_equal(masks[3][2], two > 0)
    assert not masks[3][3:].any()


def sav_file(path, frames):
    """`frames`: lists of masks, or None."""

    def encode(mask):
        code = rle.encode(np.asfortranarray(mask, dtype=np.uint8))
        return {"size": list(mask.shape), "counts": code["counts"].decode()}

    masklet = [frame if frame is None else [None if m is None else encode(m) for m in frame] for frame in frames]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(dict(video_id=path.stem, masklet=masklet, video_height=SIZE[0], video_width=SIZE[1])))


def test_sav_reads_masklets_of_every_fourth_frame(tmp_path):
    save_frames(tmp_path / "frames" / "sav_1", range(22))
    objects = np.zeros((2, *SIZE), bool)
    objects[0, 2:10, 3:20] = objects[1, 5:12, 10:30] = True
    nothing = np.zeros(SIZE, bool)
    frames = [[*objects], [objects[0], nothing], None, [None, objects[1]], [*objects], [*objects[::-1]]]
    sav_file(tmp_path / "ann" / "sav_1_manual.json", frames)
    sav_file(tmp_path / "ann" / "sav_1_auto.json", [[objects[0] & objects[1]]] * 6)
    prefix = dict(img_path="frames", ann_path="ann")
    item = dataset(tmp_path, "sa-v", data_prefix=prefix, load=dict(num_frames=4))[0]
    assert numbers(item) == [0, 4, 16, 20]  # 8 has no annotation, and 12 lacks one of the two objects
    order = item["data_samples"].objects
    assert sorted(order) == [0, 1]
    masks = item["masks"].numpy()[np.argsort(order)]
    assert np.array_equal(masks[:, 0], objects)
    assert np.array_equal(masks[:, 1], np.stack([objects[0], nothing]))
    assert np.array_equal(masks[:, 3], objects[::-1])
    item = dataset(tmp_path, "sa-v", data_prefix=prefix, load=dict(num_frames=4), auto=True)[0]
    assert sorted(item["data_samples"].objects) == [0, 1, 2]
    assert np.array_equal(item["masks"][item["data_samples"].objects.index(2), 3], objects[0] & objects[1])
    (tmp_path / "ann" / "sav_1_auto.json").unlink()  # not every video has one
    assert len(dataset(tmp_path, "sa-v", data_prefix=prefix, auto=True)[0]["masks"]) == 2
    (tmp_path / "ann" / "sav_1_manual.json").write_text('{"masklet": [[{"size": [2, 2]}]]}')
    with pytest.raises(DatasetError, match=r"a mask of frame 00000 of .*sav_1_manual.json cannot be decoded"):
        dataset(tmp_path, "sa-v", data_prefix=prefix, load=dict(num_frames=1))[0]


def test_static_images_are_clips_of_one_frame(tmp_path):
    save_frames(tmp_path / "images", range(4))
    box = np.zeros(SIZE, np.uint8)
    box[4:12, 10:30] = 1
    code = rle.encode(np.asfortranarray(box))
    runs = np.diff(np.flatnonzero(np.diff(box.ravel("F"), prepend=1 - box[0, 0], append=2)))  # column by column
    plain = {"size": list(SIZE), "counts": runs.tolist()}
    shapes = [
        (11, 0, [[10, 4, 30, 4, 30, 12, 10, 12]], 0),
        (12, 0, {**code, "counts": code["counts"].decode()}, 0),
        (13, 1, plain, 0),
        (14, 1, {**code, "counts": code["counts"].decode()}, 1),  # a crowd
        (15, 2, plain, 1),
    ]
    coco = dict(
        images=[dict(id=i, file_name=f"{i:05d}.png", height=SIZE[0], width=SIZE[1]) for i in range(4)],
        annotations=[dict(id=a, image_id=i, segmentation=s, iscrowd=crowd) for a, i, s, crowd in shapes],
    )
    (tmp_path / "instances.json").write_text(json.dumps(coco))
    prefix = dict(img_path="images", ann_path="instances.json")
    images = dataset(tmp_path, "images", data_prefix=prefix, load=dict(num_frames=1))
    assert len(images) == 2  # crowds are no objects
    for index, objects in enumerate([[11, 12], [13]]):
        item = images[index]
        assert numbers(item) == [index]
        assert sorted(item["data_samples"].objects) == objects
        for mask in item["masks"]:
            assert np.array_equal(mask[0], box > 0)
    coco["images"][0].pop("height")
    (tmp_path / "instances.json").write_text(json.dumps(coco))
    with pytest.raises(DatasetError, match="not in COCO's format"):
        dataset(tmp_path, "images", data_prefix=prefix)


def test_the_synthetic_world_has_its_own_layout(tmp_path):
    root = write_dataset(tmp_path / "world", scenes={"train": 1, "val": 1}, frames_per_scene=3, size=(48, 64))
    item = dataset(root, "synthetic", split="val")[0]
    assert item["data_samples"].frames == ["00000", "00001", "00002"]
    truth = np.stack([np.asarray(Image.open(root / f"instances/val/0000/{t:05d}.png")) for t in range(3)])
    for i, mask in zip(item["data_samples"].objects, item["masks"].numpy(), strict=True):
        assert np.array_equal(mask, truth == i)
        assert mask[0].any()
    frame = np.asarray(Image.open(root / "val/0000/00002.jpg"))
    assert np.array_equal(item["inputs"][2].permute(1, 2, 0).numpy(), frame)
    prefix = dict(img_path="val", ann_path="annotations/instances_val.json")
    images = dataset(root, "images", data_prefix=prefix, load=dict(num_frames=1))
    assert images[2]["data_samples"].video == "0000/00002"


def test_real_sequences(shared, tmp_path):
    root = shared / "data" / "video"
    (tmp_path / "names.txt").write_text("bmx-trees\nlabelme-truck-car\nbike\n")
    pipeline = [
        dict(type="LoadClip", num_frames=4, max_objects=3),
        dict(type="ClipFlip", prob=0.5),
        dict(type="ClipAffine", degrees=25, shear=20),
        dict(type="ClipResize", size=128),
        dict(type="ClipColorJitter", brightness=0.1, contrast=0.03, saturation=0.03),
        dict(type="ClipGrayscale", prob=0.05),
        dict(type="ClipColorJitter", brightness=0.1, contrast=0.05, saturation=0.05, per_frame=True),
        dict(type="PackClip"),
    ]
    videos = VideoClipDataset(
        data_root=str(root), layout="davis", sequences=str(tmp_path / "names.txt"), pipeline=pipeline
    )
    for index, objects in enumerate([1, 2]):
        item = videos[index]
        assert item["inputs"].shape == (4, 3, 128, 128)
        assert item["masks"].shape[1:] == (4, 128, 128)
        assert len(item["masks"]) <= objects
        assert item["masks"][:, 0].any(-1).any(-1).all()
    assert videos[2]["data_samples"].video != "bike"  # one mask


def test_equal_draws_give_equal_clips_in_data_workers(davis):
    videos = VideoClipDataset(
        data_root=str(davis),
        layout="davis",
        pipeline=[
            dict(type="SeedAugmentation"),
            dict(type="LoadClip", num_frames=3, max_objects=2, reverse_prob=0.5),
            dict(type="ClipFlip", prob=0.5),
            dict(type="ClipAffine", degrees=25, shear=20),
            dict(type="ClipResize", size=32),
            dict(type="PackClip"),
        ],
    )
    sampler = [SeededIndex(0, 0, 0, number) for number in range(6)] + [SeededIndex(1, 0, 0, 7), SeededIndex(2, 0, 0, 8)]
    loader = DataLoader(videos, batch_size=2, sampler=sampler, num_workers=2, collate_fn=pseudo_collate)
    batches = list(loader)
    assert [len(batch["inputs"]) for batch in batches] == [2] * 4
    assert batches[0]["inputs"][0].shape == (3, 3, 32, 32)
    again = [videos[draw] for draw in sampler]
    for number, one in enumerate(again[:7]):  # the last is replaced: with what, follows from its worker's past
        batch, place = batches[number // 2], number % 2
        assert torch.equal(batch["inputs"][place], one["inputs"])
        assert torch.equal(batch["masks"][place], one["masks"])
        assert batch["data_samples"][place].frames == one["data_samples"].frames
    assert len({str(item["data_samples"].frames) for item in again}) > 2


def test_broken_files_are_named_or_skipped_and_logged_once(davis):
    broken = davis / "JPEGImages" / "480p" / "bear" / "00002.png"
    broken.write_bytes(broken.read_bytes()[:60])
    window = dict(num_frames=8)
    with pytest.raises(DatasetError, match=r"bear/00002.png (cannot be decoded|is not a readable image)"):
        dataset(davis, names=["bear"], load=window)[0]
    load = LoadClip(num_frames=8, max_objects=1, skip_broken=True)
    for _ in range(2):
        assert load.transform(dataset(davis, names=["bear"]).get_data_info(0)) is None
    assert len(load.skipped) == 1


def test_images_and_masks_of_different_size_are_named(davis):
    for folder, message in [
        ("Annotations", r"bear/00004.png is 24x40 .* but .*/Annotations/480p/bear/00004.png is 24x38"),
        ("JPEGImages", r"bear/00004.png is 24x38 .* but .*/Annotations/480p/bear/00004.png is 24x40"),
    ]:
        path = davis / folder / "480p" / "bear" / "00004.png"
        whole = path.read_bytes()
        Image.open(path).crop((0, 0, 38, 24)).save(path)
        with pytest.raises(DatasetError, match=message):
            dataset(davis, names=["bear"], load=dict(num_frames=8))[0]
        path.write_bytes(whole)
    for folder in ("Annotations", "JPEGImages"):
        path = davis / folder / "480p" / "bear" / "00004.png"
        Image.open(path).crop((0, 0, 38, 24)).save(path)
    with pytest.raises(DatasetError, match=r"bear/00004.png is 24x38 .* but .*bear/00000.png is 24x40"):
        dataset(davis, names=["bear"], load=dict(num_frames=8))[0]


def test_absent_folders_and_empty_sets_are_named(tmp_path, davis):
    with pytest.raises(DatasetError, match=r"no folder .*nowhere/JPEGImages; check data_root"):
        dataset(tmp_path / "nowhere")
    (tmp_path / "empty" / "JPEGImages").mkdir(parents=True)
    with pytest.raises(DatasetError, match=r"no folder .*empty/Annotations"):
        dataset(tmp_path / "empty")
    (tmp_path / "empty" / "Annotations").mkdir()
    with pytest.raises(DatasetError, match="holds no sequences"):
        dataset(tmp_path / "empty")
    masks = Path(davis, "Annotations", "480p", "cat")
    masks.rename(masks.with_name("dog"))
    with pytest.raises(DatasetError, match=re.escape(f"1 of 3 videos have no masks, the first is {masks};")):
        dataset(davis)
    masks.mkdir()
    with pytest.raises(DatasetError, match="cat holds no mask"):
        dataset(davis, names=["cat"])[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(layout="vos"), "layout is 'vos'; choose davis"),
        (dict(layout="sa-v"), "the layout sa-v needs both of data_prefix"),
        (dict(layout="images", data_prefix=dict(img_path="a")), "the layout images needs both"),
        (dict(data_prefix=dict(img="a")), "data_prefix holds img; it takes"),
        (dict(auto=True), "auto=True is for the layout sa-v"),
        (dict(split="val", names=["bear"]), "split is 'val', but"),
        (dict(layout="sa-v", split="val", data_prefix=dict(img_path="a", ann_path="b")), "split is 'val', but"),
    ],
)
def test_options_that_cannot_be_meant(davis, options, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        dataset(davis, **options)


def test_numbers_of_frames_and_objects_are_positive():
    with pytest.raises(ConfigError, match="num_frames is 0 and max_objects 3"):
        LoadClip(num_frames=0, max_objects=3)
