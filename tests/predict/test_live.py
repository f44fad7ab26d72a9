"""Frames of a camera: the newest ones, through interruptions, at the time of the clock."""

import itertools
import time

import numpy as np
import pytest

pytest.importorskip("cv2")
from pe_spatial.errors import DatasetError
from pe_spatial.predict.live import LiveFrames, is_live, paced


class Camera:
    """Gives numbered frames every few milliseconds, and None once after `breaks` frames."""

    def __init__(self, breaks=None):
        self.number, self.opened, self.breaks = 0, [], breaks

    def __call__(self, source):
        self.opened.append(source)
        return self

    def read(self):
        time.sleep(0.002)
        self.number += 1
        if self.number == self.breaks:
            return False, None
        return True, np.full((4, 6, 3), (self.number % 250, 0, 0), np.uint8)

    def release(self):
        pass


def test_what_is_live():
    assert is_live("0")
    assert is_live("rtsp://host/path")
    assert not is_live("a.mp4")
    assert not is_live("https://a.org/b.mp4")


def test_frames_are_the_newest_and_others_are_dropped():
    camera = Camera()
    frames = LiveFrames("3", open=camera)
    numbers = []
    for rgb in frames:
        numbers.append(int(rgb[0, 0, 2]))  # BGR became RGB
        if len(numbers) == 4:
            break
        time.sleep(0.03)
        assert camera.number - numbers[-1] >= 5
    assert camera.opened == [3]
    assert numbers == sorted(numbers)
    assert frames.dropped >= 10
    assert all(b - a >= 5 for a, b in itertools.pairwise(numbers))


def test_a_source_that_breaks_off_is_opened_again():
    camera = Camera(breaks=3)
    frames = LiveFrames("rtsp://x", open=camera, retry=0.01)
    for rgb in frames:
        if rgb[0, 0, 2] > 5:
            break
    assert frames.reconnected == 1
    assert camera.opened == ["rtsp://x"] * 2


def test_a_source_without_frames_is_given_up():
    camera = Camera()
    camera.read = lambda: (False, None)
    with pytest.raises(DatasetError, match=r"rtsp://x gave no frame for 0.1 s; check the camera or the address"):
        next(iter(LiveFrames("rtsp://x", open=camera, patience=0.1, retry=0.01)))


def test_a_video_keeps_the_time_of_the_clock():
    def slow():
        for i in range(4):
            time.sleep(0.05)
            yield np.full(1, i)

    pieces = list(paced(slow(), fps=100))
    assert [int(frame[0]) for _, frame in pieces] == [0, 1, 2, 3]
    assert 16 <= sum(times for times, _ in pieces) <= 40
    assert all(times >= 1 for times, _ in paced(iter([np.zeros(1)] * 3), fps=0.001))
