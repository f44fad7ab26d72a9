"""Videos in and out: what is missing or broken is named, and nothing is written by halves."""

import cv2
import numpy as np
import pytest
from PIL import Image

from pe_spatial.errors import DatasetError
from pe_spatial.tracking.masks import PALETTE, write_mask
from pe_spatial.tracking.video import Clip, list_frames, overlay, write_overlay

SIZE = (48, 64)


def picture(i, size=SIZE):
    """A smooth picture, so that codecs keep it."""
    y, x = np.mgrid[: size[0], : size[1]]
    return np.stack([2 * y + 20, 2 * x + 10, np.full(size, 10 * i)], -1).astype(np.uint8)


def save_frames(folder, names, size=SIZE):
    folder.mkdir(parents=True, exist_ok=True)
    for i, name in enumerate(names):
        Image.fromarray(picture(i, size)).save(folder / name)
    return folder


def save_video(path, count, size=SIZE, fps=12):
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"mp4v"), fps, size[::-1])
    for i in range(count):
        writer.write(picture(i, size)[..., ::-1])
    writer.release()
    return path


def read_video(path):
    capture, frames = cv2.VideoCapture(str(path)), []
    while (one := capture.read())[0]:
        frames.append(one[1][..., ::-1])
    return frames, capture.get(cv2.CAP_PROP_FPS)


@pytest.fixture
def mask(tmp_path):
    ids = np.zeros(SIZE, np.uint8)
    ids[8:24, 8:40] = 3
    ids[30:40, 50:] = 255
    write_mask(tmp_path / "mask.png", ids)
    return tmp_path / "mask.png"


def names(paths):
    return [path.name for path in paths]


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        (["00001.jpg", "00000.jpg", "00002.png"], ["00000.jpg", "00001.jpg", "00002.png"]),
        (["f10.jpg", "f9.jpg", "f8.jpg", "f7.jpg"], ["f7.jpg", "f8.jpg", "f9.jpg", "f10.jpg"]),  # by number
        (["00010.jpg", "00000.jpg", "00005.jpg"], ["00000.jpg", "00005.jpg", "00010.jpg"]),  # YouTube-VOS
        (["10.jpg", "13.jpg", "18.jpg"], ["10.jpg", "13.jpg", "18.jpg"]),  # times, not counters
        (["b.jpg", "a1.jpg", "notes.txt", ".hidden.jpg"], ["a1.jpg", "b.jpg"]),
        (["one.png"], ["one.png"]),
    ],
)
def test_frames_are_listed_in_order(tmp_path, files, expected):
    for file in files:
        (tmp_path / file).touch()
    assert names(list_frames(tmp_path)) == expected


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ([f"{i:05d}.jpg" for i in range(9) if i not in (3, 7)], "lacks the frames 00003, 00007; restore them"),
        ([f"{i:05d}.jpg" for i in range(0, 50, 5) if i != 20], "lacks the frames 00020;"),
        ([f"im{i}.jpg" for i in range(30) if not 3 < i < 12], "lacks the frames 4, 5, 6, 7, 8 and 3 more"),
        (["00000.jpg", "00000.png"], r"holds a frame twice, for instance as 00000\.png"),
        (["notes.txt"], r"holds no frames, that is pictures that end in \.jpg, \.jpeg, \.png"),
    ],
)
def test_a_folder_that_lacks_frames_is_refused(tmp_path, files, words):
    for file in files:
        (tmp_path / file).touch()
    with pytest.raises(DatasetError, match=words):
        list_frames(tmp_path)
    with pytest.raises(DatasetError, match="no folder of frames at"):
        list_frames(tmp_path / "absent")


def test_a_folder_is_read_one_frame_at_a_time(tmp_path, mask):
    frames = list_frames(save_frames(tmp_path / "cat", ["00000.png", "00001.png", "00002.png"]))
    clip = Clip("cat", frames, mask)
    first, stream = clip.load()
    assert (len(clip), clip.fps) == (3, 24)
    assert np.unique(first).tolist() == [0, 3]  # void is background
    frames[2].write_bytes(b"broken")  # not read yet
    for i in range(2):
        name, rgb = next(stream)
        assert name == f"{i:05d}"
        assert np.array_equal(rgb, picture(i))
    with pytest.raises(DatasetError, match=r"00002\.png is no picture"):
        next(stream)


def test_a_truncated_frame_is_named(tmp_path, mask):
    folder = save_frames(tmp_path / "cat", ["00000.jpg", "00001.jpg"])
    data = (folder / "00001.jpg").read_bytes()
    (folder / "00001.jpg").write_bytes(data[: len(data) // 2])
    with pytest.raises(DatasetError, match=r"00001\.jpg cannot be decoded"):
        list(Clip("cat", list_frames(folder), mask).load()[1])


def test_a_video_file_is_read(tmp_path, mask):
    clip = Clip("cat", save_video(tmp_path / "cat.mp4", 5), mask)
    assert (len(clip), clip.fps) == (5, 12)
    frames = list(clip.load()[1])
    assert [name for name, _ in frames] == ["00000", "00001", "00002", "00003", "00004"]
    for i, (_, rgb) in enumerate(frames):
        assert np.abs(rgb.astype(int) - picture(i)).mean() < 8  # red is red


def test_videos_that_cannot_be_read_are_named(tmp_path, mask):
    (tmp_path / "text.mp4").write_text("no video")
    with pytest.raises(DatasetError, match=r"OpenCV cannot open the video .*text\.mp4"):
        list(Clip("cat", tmp_path / "text.mp4", mask).load()[1])
    with pytest.raises(DatasetError, match=r"no video at .*absent\.mp4"):
        list(Clip("cat", tmp_path / "absent.mp4", mask).load()[1])


def test_a_video_that_breaks_off_is_an_error(tmp_path, mask):
    """The index stands at the end of an AVI, so it opens, and its pictures end early."""
    path = tmp_path / "cat.avi"
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"MJPG"), 12, SIZE[::-1])
    for i in range(40):
        writer.write(picture(i))
    writer.release()
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(DatasetError, match=r"cat\.avi can be decoded up to frame \d+ of 40"):
        list(Clip("cat", path, mask).load()[1])


def test_masks_and_frames_must_fit(tmp_path, mask):
    folder = save_frames(tmp_path / "cat", ["00000.png", "00001.png"])
    Image.fromarray(picture(1, (48, 60))).save(folder / "00001.png")
    frames = Clip("cat", list_frames(folder), mask).load()[1]
    next(frames)
    with pytest.raises(DatasetError, match=r"00001\.png is 48x60 \(height x width\) but .*mask\.png is 48x64"):
        next(frames)
    video = Clip("cat", save_video(tmp_path / "cat.mp4", 2, (32, 64)), mask)
    with pytest.raises(DatasetError, match=r"frame 0 of .*cat\.mp4 is 32x64"):
        next(video.load()[1])


def test_a_binary_mask_holds_object_1(tmp_path):
    """DAVIS 2016 writes 255."""
    ids = np.zeros(SIZE, np.uint8)
    ids[:9] = 255
    write_mask(tmp_path / "binary.png", ids)
    assert np.array_equal(Clip("cat", (), tmp_path / "binary.png").load()[0], ids > 0)


def test_a_mask_without_objects_is_refused(tmp_path):
    write_mask(tmp_path / "empty.png", np.zeros(SIZE, np.uint8))
    with pytest.raises(DatasetError, match=r"empty\.png holds no object to follow"):
        Clip("cat", (), tmp_path / "empty.png").load()


def test_a_mask_in_colours_is_refused(tmp_path):
    Image.fromarray(picture(0)).save(tmp_path / "rgb.png")
    with pytest.raises(DatasetError, match=r"rgb\.png is a 8-bit RGB picture, not an index mask"):
        Clip("cat", (), tmp_path / "rgb.png").load()


def test_overlay_colours_objects_and_leaves_the_rest():
    rgb = picture(3)
    ids = np.zeros(SIZE, np.uint8)
    ids[8:24, 8:40] = 3
    drawn = overlay(rgb, ids)
    assert drawn.dtype == np.uint8
    assert np.array_equal(drawn[ids == 0], rgb[ids == 0])
    assert np.array_equal(drawn[8, 8], PALETTE[3])  # the rim
    assert np.array_equal(drawn[15, 20], rgb[15, 20] // 2 + PALETTE[3] // 2)


@pytest.mark.parametrize("size", [SIZE, (47, 63)])
def test_overlay_videos_have_every_frame(tmp_path, size):
    frames = [f"{i:05d}.png" for i in range(4)]
    folder = save_frames(tmp_path / "cat", frames, size)
    ids = np.zeros(size, np.uint8)
    ids[8:40, 8:40] = 1
    for frame in frames:
        write_mask(tmp_path / "masks" / frame, ids)
    clip = Clip("cat", list_frames(folder), tmp_path / "masks" / frames[0])
    write_overlay(clip, tmp_path / "masks", tmp_path / "out" / "cat.mp4")
    drawn, fps = read_video(tmp_path / "out" / "cat.mp4")
    assert (len(drawn), fps) == (4, 24)
    assert abs(int(drawn[2][20, 20, 0]) - int(overlay(picture(2, size), ids)[20, 20, 0])) < 20
    assert names((tmp_path / "out").iterdir()) == ["cat.mp4"]


def test_an_overlay_that_fails_leaves_nothing(tmp_path, mask):
    folder = save_frames(tmp_path / "cat", ["00000.png", "00001.png"])
    write_mask(tmp_path / "masks" / "00000.png", np.zeros(SIZE, np.uint8))
    with pytest.raises(DatasetError, match=r"cannot open .*00001\.png"):
        write_overlay(Clip("cat", list_frames(folder), mask), tmp_path / "masks", tmp_path / "out" / "cat.mp4")
    assert not list((tmp_path / "out").iterdir())
