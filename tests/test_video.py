"""Frames of folders in order, frames of video files, and errors that name what is missing or broken."""

import struct
from types import SimpleNamespace

import cv2
import numpy as np
import pytest

from pe_spatial.errors import DatasetError
from pe_spatial.video import count_frames, decode_video, frame_rate, list_frames, mp4_writer


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


def write_video(path, *, count=20, fps=24, size=(48, 64), codec="mp4v"):
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*codec), fps, size[::-1])
    assert writer.isOpened()
    rng = np.random.default_rng(0)
    for _ in range(count):
        writer.write(rng.integers(0, 255, (*size, 3), np.uint8))
    writer.release()
    return path


def patch(path, name, change):
    """Write the bytes of a file anew, with `change(data, position of name)`."""
    data = bytearray(path.read_bytes())
    change(data, data.index(name))
    path.write_bytes(data)
    return path


def longer_mkv(path):
    """Its container is 20 % longer than its frames, as with a longer audio track: OpenCV announces 24 of 20 frames."""

    def change(data, at):
        data[at + 3 : at + 11] = struct.pack(">d", 1.2 * struct.unpack(">d", data[at + 3 : at + 11])[0])

    return patch(write_video(path), b"\x44\x89", change)


def trimmed_mp4(path):
    """An edit list hides the second half, as phones trim: MP4's exact count of samples is not that of the frames."""

    def change(data, at):
        data[at + 12 : at + 16] = struct.pack(">I", struct.unpack(">I", data[at + 12 : at + 16])[0] // 2)

    return patch(write_video(path), b"elst", change)


def cut_avi(path):
    """The index is at the end of an AVI, so it opens, and its images end early."""
    data = write_video(path, codec="MJPG").read_bytes()
    path.write_bytes(data[: len(data) // 2])
    return path


SHORT = {"long.mkv": longer_mkv, "trimmed.mp4": trimmed_mp4, "cut.avi": cut_avi}


@pytest.mark.parametrize("name", SHORT)
def test_frames_of_a_container_that_announces_more_are_kept(tmp_path, caplog, name):
    path = SHORT[name](tmp_path / name)
    announced, frames = count_frames(path), list(decode_video(path))
    assert 5 <= len(frames) <= 20 < announced + 1
    assert len(frames) < announced
    (message,) = caplog.messages
    assert f"{name} has {len(frames)} frames, and its container announces {announced}" in message


def test_a_complete_video_gives_no_warning(tmp_path, caplog):
    assert len(list(decode_video(write_video(tmp_path / "a.mp4")))) == 20
    assert not caplog.messages


def test_a_video_without_frames_is_an_error(tmp_path, monkeypatch):
    path = write_video(tmp_path / "a.mp4")
    nothing = SimpleNamespace(get=lambda _: 20.0, read=lambda: (False, None))
    monkeypatch.setattr("pe_spatial.video._open", lambda _: nothing)
    with pytest.raises(DatasetError, match=r"no frame of .*a\.mp4 can be decoded"):
        list(decode_video(path))


@pytest.mark.parametrize("fps", [119.997, 211.222, 239.987, 29.97002997, 59.94005994, 7000.3, 0.33333, 12])
def test_every_frame_rate_can_be_written(tmp_path, fps):
    """MPEG-4 has 16 bits for the time base; OpenCV takes 211.222 as 211222 / 1000."""
    with mp4_writer(tmp_path / "a.mp4", fps) as write:
        for _ in range(3):
            write(np.zeros((48, 64, 3), np.uint8))
    capture = cv2.VideoCapture(str(tmp_path / "a.mp4"))
    assert capture.get(cv2.CAP_PROP_FPS) == pytest.approx(fps, rel=1e-2)
    assert count_frames(tmp_path / "a.mp4") == 3


@pytest.mark.parametrize(("fps", "expected"), [(24, 24), (239.99, 239.99), (240, 240), (1000, None), (600, None)])
def test_the_clock_of_a_browser_recording_is_not_its_frame_rate(tmp_path, fps, expected):
    assert frame_rate(write_video(tmp_path / "a.mp4", count=3, fps=fps)) == (expected and pytest.approx(expected))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0, 0.0, -9.2e18])
def test_counts_and_rates_that_are_not_sensible_are_unknown(tmp_path, monkeypatch, value):
    path = write_video(tmp_path / "a.webm", count=3, codec="VP80")
    monkeypatch.setattr("pe_spatial.video._open", lambda _: SimpleNamespace(get=lambda _: value))
    assert frame_rate(path) is None
    assert count_frames(path) == 0


@pytest.mark.parametrize("size", [(48, 64), (47, 63), (1, 1), (48, 63)])
def test_odd_sizes_keep_every_pixel(tmp_path, size):
    h, w = size
    frame = np.full((h, w, 3), 100, np.uint8)
    with mp4_writer(tmp_path / "a.mp4", 24) as write:
        for _ in range(2):
            write(frame)
    (first, _) = decode_video(tmp_path / "a.mp4")
    assert first.shape == (h + h % 2, w + w % 2, 3)
    assert abs(int(first[h - 1, w - 1, 0]) - 100) < 10


def test_frames_that_mpeg_4_cannot_hold_are_named(tmp_path):
    with (
        pytest.raises(DatasetError, match=r"a\.mp4 .*9000x16"),
        mp4_writer(tmp_path / "a.mp4", 24) as write,
    ):
        write(np.zeros((16, 9000, 3), np.uint8))
    assert not list(tmp_path.iterdir())


def test_frames_that_do_not_arrive_in_the_file_are_an_error(tmp_path):
    """OpenCV says nothing about frames of another size or a full disk."""

    def write_both():
        with mp4_writer(tmp_path / "a.mp4", 24) as write:
            write(np.zeros((48, 64, 3), np.uint8))
            write(np.zeros((64, 48, 3), np.uint8))

    with pytest.raises(DatasetError, match=r"a\.mp4 got 1 of 2 frames"):
        write_both()
    assert not list(tmp_path.iterdir())


def test_a_turned_video_is_read_upright(tmp_path):
    """As phones write them: stored 64 x 48 (width x height), with a matrix that turns it by 90 degrees."""

    def change(data, at):
        data[at + 44 : at + 80] = struct.pack(">9i", 0, 65536, 0, -65536, 0, 0, 48 * 65536, 0, 1 << 30)

    path = patch(write_video(tmp_path / "a.mp4", count=3), b"tkhd", change)
    assert [frame.shape for frame in decode_video(path)] == [(64, 48, 3)] * 3
