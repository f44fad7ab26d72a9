"""Sets of videos: which sequences, which masks, and what is refused."""

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("mmengine")
from mmengine.registry import DATASETS

from pe_spatial.errors import ConfigError, DatasetError
from pe_spatial.tracking.vos.datasets import VideoDataset, davis_clips, sav_clips
from pe_spatial.tracking.vos.masks import write_mask


def save(path, ids=None):
    """Write a frame, or a mask with one column for each id."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if ids is None:
        Image.new("RGB", (8, 6)).save(path)
    else:
        write_mask(path, np.tile(np.array([*ids, *[0] * (8 - len(ids))], np.uint8), (6, 1)))


@pytest.fixture
def davis(tmp_path):
    for name in ("cat", "dog"):
        for t in range(3):
            save(tmp_path / f"JPEGImages/480p/{name}/{t:05d}.jpg")
            save(tmp_path / f"Annotations/480p/{name}/{t:05d}.png", [1, 2][: t + 1])
    (tmp_path / "ImageSets/2017").mkdir(parents=True)
    (tmp_path / "ImageSets/2017/val.txt").write_text("dog\ncat\n")
    return tmp_path


@pytest.fixture
def sav(tmp_path):
    for name in ("sav_1", "sav_2"):
        for t in range(9):
            save(tmp_path / f"JPEGImages_24fps/{name}/{t:05d}.jpg")
        for t in (0, 4, 8):
            save(tmp_path / f"Annotations_6fps/{name}/000/{t:05d}.png", [1])
            save(tmp_path / f"Annotations_6fps/{name}/001/{t:05d}.png", [1, 1] if t else [])
    (tmp_path / "sav_val.txt").write_text("sav_2\n")
    return tmp_path


def dataset(root, **options):
    built = DATASETS.build(dict(type="VideoDataset", data_root=str(root), **options))
    return [built[index]["clip"] for index in range(len(built))]


def begins(clip):
    return {frame: list(objects) for frame, objects in clip.prompts().items()}


def test_davis(davis):
    clips = davis_clips(davis)
    assert [(clip.name, len(clip), clip.overlapping) for clip in clips] == [("dog", 3, False), ("cat", 3, False)]
    assert clips[1].mask == davis / "Annotations/480p/cat/00000.png"
    assert begins(clips[0]) == {"00000": [1]}  # what appears later is not followed
    (davis / "some.txt").write_text("dog\n")
    assert [clip.name for clip in dataset(davis, sequences=str(davis / "some.txt"))] == ["dog"]


def test_youtube_vos_and_mose_have_no_480p_and_few_masks(davis):
    (davis / "ImageSets/2017/val.txt").unlink()
    for name in ("JPEGImages", "Annotations"):
        (davis / name / "480p").rename(davis / "flat")
        (davis / name).rmdir()
        (davis / "flat").rename(davis / name)
    (davis / "Annotations/cat/00002.png").unlink()
    cat, dog = dataset(davis, late_objects=True)
    assert begins(cat) == begins(dog) == {"00000": [1], "00001": [2]}
    (davis / "Annotations/cat/00000.png").unlink()
    assert begins(dataset(davis, late_objects=True)[0]) == {"00001": [1, 2]}
    with pytest.raises(DatasetError, match=r"first frame of .*cat has no mask .*cat/00000\.png.* need late_objects"):
        dataset(davis)


def test_sa_v(sav):
    clips = sav_clips(sav)
    assert [(clip.name, len(clip), clip.overlapping) for clip in clips] == [("sav_1", 9, True), ("sav_2", 9, True)]
    assert begins(clips[0]) == {"00000": [0], "00004": [1]}
    assert dataset(sav, layout="sa-v", sequences=str(sav / "sav_val.txt")) == clips[1:]


def test_nothing_is_read_before_it_is_asked_for(sav):
    for path in sav.glob("*/sav_1/**/*.*g"):
        path.write_bytes(b"broken")
    assert len(dataset(sav, layout="sa-v")) == 2


def test_what_lacks_is_named(davis, sav):
    with pytest.raises(DatasetError, match=r"1 of 1 sequences are not in .*480p, the first is cow"):
        davis_clips(davis, ["cow"])
    with pytest.raises(DatasetError, match=r"no folder .*absent/JPEGImages; give the root .* DAVIS' layout"):
        VideoDataset(str(davis / "absent"))
    with pytest.raises(DatasetError, match=r"no folder .*absent/JPEGImages_24fps; give the root .* SA-V's layout"):
        VideoDataset(str(davis / "absent"), layout="sa-v")
    (sav / "JPEGImages_24fps/sav_1").rename(sav / "JPEGImages_24fps/sav_3")
    with pytest.raises(DatasetError, match=r"no folder .*Annotations_6fps/sav_3; give"):
        sav_clips(sav)
    with pytest.raises(ConfigError, match="layout is 'lvos'; choose davis or sa-v"):
        VideoDataset(str(davis), layout="lvos")


def test_hidden_folders_are_no_sequences(davis):
    for name in ("JPEGImages/480p", "Annotations/480p"):
        (davis / name / ".ipynb_checkpoints").mkdir(parents=True, exist_ok=True)
    (davis / "ImageSets" / "2017" / "val.txt").unlink(missing_ok=True)
    assert not [clip.name for clip in davis_clips(davis) if clip.name.startswith(".")]


def test_masks_numbered_otherwise_than_the_frames_are_named(davis):
    folder = next(path for path in sorted((davis / "Annotations").rglob("*")) if (path / "00000.png").is_file())
    (folder / "00000.png").rename(folder / "0.png")
    with pytest.raises(DatasetError, match=r"first frame of .* has no mask .*00000\.png"):
        davis_clips(davis, [folder.name])
