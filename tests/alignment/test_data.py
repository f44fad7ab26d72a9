"""Images without labels from folders, COCO files and tar shards; views; what is broken is named and nothing is lost."""

import io
import json
import tarfile

import numpy as np
import pytest

pytest.importorskip("mmcv")
from mmengine.registry import DATASETS, TRANSFORMS
from PIL import Image

import pe_spatial.alignment  # noqa: F401  (registers)
from pe_spatial.errors import ConfigError, DatasetError

pytestmark = pytest.mark.mmdet
LOAD = [dict(type="LoadUnlabeled"), dict(type="FixedView", size=16), dict(type="PackViews")]


def png(value, size=(20, 30)):
    stream = io.BytesIO()
    Image.fromarray(np.full((*size, 3), value, np.uint8)).save(stream, "png")
    return stream.getvalue()


def shard(path, values):
    with tarfile.open(path, "w") as tar:
        for value in values:
            for suffix, content in ((".png", png(value)), (".txt", b"a caption")):
                about = tarfile.TarInfo(f"{value:04d}{suffix}")
                about.size = len(content)
                tar.addfile(about, io.BytesIO(content))
    return path


def colors(dataset):
    return [int(dataset[i]["inputs"].float().mean().round()) for i in range(len(dataset))]


def test_folder_coco_file_and_shards_give_the_same_images(tmp_path):
    (tmp_path / "in/side").mkdir(parents=True)
    for name, value in (("a", 10), ("side/b", 20), ("side/.hidden", 30)):
        (tmp_path / f"in/{name}.png").write_bytes(png(value))
    (tmp_path / "in/notes.txt").write_text("no image")
    (tmp_path / "list.json").write_text(json.dumps(dict(images=[dict(file_name="side/b.png")])))
    root = dict(type="UnlabeledImages", data_root=str(tmp_path), pipeline=LOAD)
    assert colors(DATASETS.build(dict(root, data_prefix=dict(img="in")))) == [10, 20]
    assert colors(DATASETS.build(dict(root, data_prefix=dict(img="in"), ann_file="list.json"))) == [20]
    shard(tmp_path / "part-0.tar", [10, 20])
    shard(tmp_path / "part-1.tar", [40])
    shards = dict(type="TarShards", data_root=str(tmp_path), shards="part-*.tar", pipeline=LOAD)
    dataset = DATASETS.build(shards)
    assert colors(dataset) == [10, 20, 40]
    assert dataset[2]["data_samples"].metainfo["img_path"].endswith("part-1.tar/0040.png")


def test_complete_images_of_a_shard_that_is_cut_off_are_used_and_it_is_named(tmp_path, log):
    path = shard(tmp_path / "a.tar", [10, 20, 30])
    with tarfile.open(path) as tar:
        inside = tar.getmembers()[4].offset_data + 10
    path.write_bytes(path.read_bytes()[:inside])
    shard(tmp_path / "b.tar", [40])
    dataset = DATASETS.build(dict(type="TarShards", data_root=str(tmp_path), pipeline=LOAD))
    assert colors(dataset) == [10, 20, 40]
    (line,) = [text for text, _ in log if "shards" in text]
    assert "1 of 2 shards" in line
    assert "a.tar is damaged after 2 images, which are used" in line
    path.write_bytes(b"nothing of a tar file" * 100)
    (tmp_path / "b.tar").unlink()
    with pytest.raises(DatasetError, match=r"1 shards of .* hold no image; .*a\.tar is damaged after 0 images"):
        DATASETS.build(dict(type="TarShards", data_root=str(tmp_path), pipeline=LOAD))


def test_broken_image_is_logged_and_replaced_and_one_image_is_enough(tmp_path, log):
    (tmp_path / "good.png").write_bytes(png(50))
    (tmp_path / "broken.png").write_bytes(png(50)[:40])
    dataset = DATASETS.build(dict(type="UnlabeledImages", data_root=str(tmp_path), pipeline=LOAD, max_refetch=50))
    assert colors(dataset) == [50, 50]
    assert any("broken.png" in text for text, _ in log)
    (tmp_path / "broken.png").unlink()
    assert colors(DATASETS.build(dict(type="UnlabeledImages", data_root=str(tmp_path), pipeline=LOAD))) == [50]


def test_missing_data_ends_in_a_sentence(tmp_path):
    root = dict(data_root=str(tmp_path), pipeline=[])
    for options, message in (
        (dict(type="UnlabeledImages"), "has no images; give another data_root"),
        (dict(type="UnlabeledImages", data_prefix=dict(img="none")), "there is no folder"),
        (dict(type="UnlabeledImages", ann_file="none.json"), r"none\.json is no COCO file"),
        (dict(type="TarShards"), r"no file matches .*\*\.tar"),
    ):
        with pytest.raises(DatasetError, match=message):
            DATASETS.build({**root, **options})
    with pytest.raises(ConfigError, match="ratio is"):
        TRANSFORMS.build(dict(type="AspectJitter", size=16, ratio=(2, 1)))
    with pytest.raises(ConfigError, match="brightness is 2"):
        TRANSFORMS.build(dict(type="ColorJitter", brightness=2))


def test_views_move_labels_with_the_image_and_stay_in_range():
    generator = np.random.default_rng(0)
    ids = generator.integers(0, 4, (8, 12), np.uint8).repeat(20, 0).repeat(20, 1)
    steps = [TRANSFORMS.build(dict(type=name)) for name in ("FlipView", "PackViews")]
    steps.insert(0, TRANSFORMS.build(dict(type="AspectJitter", size=160)))
    np.random.seed(0)
    for _ in range(4):
        results = dict(img=np.stack([ids * 60] * 3, -1), instances=ids, img_path="x")
        for step in steps:
            results = step(results)
        view, labels = results["inputs"][0].float() / 60, results["data_samples"].instances.data[0].float()
        assert view.shape == labels.shape == (160, 160)
        assert ((view - labels).abs() < 0.5).float().mean() > 0.85
    jitter = TRANSFORMS.build(dict(type="ColorJitter"))
    image = generator.integers(0, 256, (8, 8, 3), np.uint8)
    changed = [jitter(dict(img=image))["img"] for _ in range(50)]
    ratio = [float(x.mean() / image.mean()) for x in changed]
    assert 0.6 < min(ratio) < 0.8
    assert 1.1 < max(ratio) < 1.4
    same = TRANSFORMS.build(dict(type="ColorJitter", brightness=0, saturation=0))(dict(img=image))["img"]
    assert np.array_equal(same, image)
