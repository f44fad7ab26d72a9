"""Frames of folders in order, frames of video files, and errors that name what is missing or broken."""

import cv2
import numpy as np
import pytest

from pe_spatial.errors import DatasetError
from pe_spatial.video import decode_video, list_frames


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
        (["00000.jpg", "00000.png"], r"holds a frame twice, for example 00000\.png"),
        (["notes.txt"], r"holds no frames, that is, images that end in \.jpg, \.jpeg, \.png"),
    ],
)
def test_a_folder_that_lacks_frames_is_refused(tmp_path, files, words):
    for file in files:
        (tmp_path / file).touch()
    with pytest.raises(DatasetError, match=words):
        list_frames(tmp_path)
    with pytest.raises(DatasetError, match="no folder of frames at"):
        list_frames(tmp_path / "absent")


def test_videos_that_cannot_be_read_are_named(tmp_path):
    (tmp_path / "text.mp4").write_text("no video")
    with pytest.raises(DatasetError, match=r"OpenCV cannot open the video .*text\.mp4"):
        next(decode_video(tmp_path / "text.mp4"))
    with pytest.raises(DatasetError, match=r"no video at .*absent\.mp4"):
        next(decode_video(tmp_path / "absent.mp4"))


def test_a_video_that_breaks_off_is_an_error(tmp_path):
    """The index is at the end of an AVI, so it opens, and its images end early."""
    path = tmp_path / "cat.avi"
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"MJPG"), 12, (64, 48))
    rng = np.random.default_rng(0)
    for _ in range(40):
        writer.write(rng.integers(0, 255, (48, 64, 3), np.uint8))
    writer.release()
    assert len(list(decode_video(path))) == 40
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(DatasetError, match=r"cat\.avi ends after [1-9]\d* of 40 frames"):
        list(decode_video(path))
