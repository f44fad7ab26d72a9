"""The check of a NYUv2 download: complete, incomplete, broken, and untouched."""

from argparse import Namespace

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("mmseg")
from pe_spatial.cli import prepare_nyu
from pe_spatial.depth import nyu as nyu_module
from pe_spatial.errors import DatasetError

pytestmark = pytest.mark.mmseg


def write_pair(folder, scene, number, *, border):
    image = np.full((480, 640, 3), 120, np.uint8)
    if border:
        image[:7] = 0
    (folder / scene).mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(folder / scene / f"rgb_{number:05d}.jpg")
    Image.fromarray(np.full((480, 640), 2500, np.uint16)).save(folder / scene / f"sync_depth_{number:05d}.png")
    return f"{scene}/rgb_{number:05d}.jpg {scene}/sync_depth_{number:05d}.png 518.8579"


@pytest.fixture
def nyu(tmp_path, monkeypatch):
    """The layout of nyu.zip in miniature, for which 2 and 1 pairs are all."""
    for split, count in (("train", 2), ("test", 1)):
        monkeypatch.setitem(nyu_module.SPLITS, split, (count, *nyu_module.SPLITS[split][1:]))
    lines = ["/" + write_pair(tmp_path, "kitchen_0028b", n, border=False).replace(" k", " /k") for n in (0, 45)]
    (tmp_path / "nyu_train.txt").write_text("\n".join(lines))
    (tmp_path / "nyu_test.txt").write_text(write_pair(tmp_path, "bathroom", 1, border=True))
    return tmp_path


def run(root, capsys, every=1):
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*")}
    with pytest.raises(SystemExit) as end:
        prepare_nyu.run(Namespace(root=root, every=every))
    assert {path: path.stat().st_mtime_ns for path in root.rglob("*")} == before  # nothing is touched
    return end.value.code, capsys.readouterr().out


def test_complete(nyu, capsys):
    code, out = run(nyu, capsys)
    assert code == 0
    assert [line.split() for line in out.splitlines()[-4:]] == [
        ["split", "expected", "listed", "read", "broken"],
        ["train", "2", "2", "2", "0"],
        ["test", "1", "1", "1", "0"],
        ["complete"],
    ]
    assert ["train", "2", "2", "1", "0"] in [line.split() for line in run(nyu, capsys, every=2)[1].splitlines()]


def test_layout_of_bts(nyu, capsys):
    (nyu / "sync").mkdir()
    (nyu / "official_splits/test").mkdir(parents=True)
    (nyu / "kitchen_0028b").rename(nyu / "sync/kitchen_0028b")
    (nyu / "bathroom").rename(nyu / "official_splits/test/bathroom")
    for split in ("train", "test"):
        (nyu / f"nyu_{split}.txt").rename(nyu / f"nyudepthv2_{split}_files_with_gt.txt")
    code, out = run(nyu, capsys)
    assert code == 0
    assert "train: set ann_file='nyudepthv2_train_files_with_gt.txt', data_prefix={'img_path': 'sync'" in out
    assert "{'img_path': 'official_splits/test', 'depth_path': 'official_splits/test'}" in out


def test_what_is_wrong_is_named(nyu, capsys):
    Image.fromarray(np.full((480, 640), 120, np.uint8)).save(nyu / "kitchen_0028b/sync_depth_00000.png")
    (nyu / "kitchen_0028b/rgb_00045.jpg").write_bytes(b"half a pic")
    write_pair(nyu, "bathroom", 1, border=False)
    code, out = run(nyu, capsys)
    assert code == 1
    assert "sync_depth_00000.png contains uint8 values" in out
    assert "rgb_00045.jpg is not a readable image (10 bytes)" in out
    assert "1 test images are not black in their outermost rows" in out
    assert ["train", "2", "2", "2", "2"] in [line.split() for line in out.splitlines()]
    assert "incomplete" in out


@pytest.mark.parametrize(
    ("depth", "message"),
    [
        (np.zeros((480, 640)), "contains no depth"),
        (np.full((48, 64), 2500), "is 48x64"),
        (np.full((480, 640), 3), "has a median depth of 0.003 m"),
    ],
)
def test_wrong_depth_is_named(nyu, capsys, depth, message):
    Image.fromarray(depth.astype(np.uint16)).save(nyu / "bathroom/sync_depth_00001.png")
    code, out = run(nyu, capsys)
    assert code == 1
    assert message in out


def test_missing_files_and_lists(nyu, capsys):
    (nyu / "bathroom/rgb_00001.jpg").unlink()
    lines = (nyu / "nyu_train.txt").read_text().splitlines()
    (nyu / "nyu_train.txt").write_text(lines[0])
    code, out = run(nyu, capsys)
    assert code == 1
    assert "nyu_train.txt lists 1 pairs; published results use 2" in out
    assert "1 images and 0 depth maps of the 1 pairs" in out
    (nyu / "nyu_train.txt").write_text(lines[0] + "\nnonsense")
    assert "line 2: 'nonsense' is not" in run(nyu, capsys)[1]
    (nyu / "nyu_train.txt").unlink()
    code, out = run(nyu, capsys)
    assert code == 1
    assert "has neither nyu_train.txt nor nyudepthv2_train_files_with_gt.txt" in out


def test_no_folder(tmp_path):
    with pytest.raises(DatasetError, match="there is no folder"):
        prepare_nyu.run(Namespace(root=tmp_path / "absent", every=1))
