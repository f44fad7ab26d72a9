"""Frames of a camera or a network stream: always the newest one."""

import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import cv2
import numpy as np

from pe_spatial.errors import DatasetError


def is_live(source: str) -> bool:
    """Return whether `source` is the number of a camera or the address of a stream."""
    return source.isdecimal() or source.startswith(("rtsp://", "rtsps://", "rtmp://", "udp://", "tcp://"))


class LiveFrames:
    """The newest frame of a camera or a stream, again and again; frames that nobody takes in time are dropped.

    A thread reads, so that a slow taker does not lag behind. Where the source breaks off, it is opened again.

    Args:
        source: number of a camera, or an address such as rtsp://host/path.
        patience: seconds without a frame after which iteration ends with DatasetError.
        retry: seconds until the source is opened again.
        open: opens a source as `cv2.VideoCapture` does.

    `dropped` and `reconnected` count.
    """

    def __init__(
        self, source: str, *, patience: float = 30.0, retry: float = 1.0, open: Callable[[Any], Any] = cv2.VideoCapture
    ) -> None:
        self.source, self.patience, self.retry, self._open = source, patience, retry, open
        self.dropped = self.reconnected = 0

    def __iter__(self) -> Iterator[np.ndarray]:
        """Yield (H, W, 3) uint8 RGB."""
        newest: list[np.ndarray] = []
        changed, stop = threading.Condition(), threading.Event()
        reader = threading.Thread(target=self._read, args=(newest, changed, stop), daemon=True)
        reader.start()
        try:
            while True:
                with changed:
                    if not changed.wait_for(lambda: newest, self.patience):
                        raise DatasetError(
                            f"{self.source} gave no frame for {self.patience:g} s; check the camera or the address"
                        )
                    bgr = newest.pop()
                yield cv2.cvtColor(bgr, cv2.COLOR_BGR2RGB)
        finally:
            stop.set()
            reader.join(self.patience)

    def _read(self, newest: list[np.ndarray], changed: threading.Condition, stop: threading.Event) -> None:
        """Put the newest frame into the list until `stop`."""
        cv2.setLogLevel(0)  # a camera that is not there is reported by us
        number = int(self.source) if self.source.isdecimal() else self.source
        capture = self._open(number)
        while not stop.is_set():
            bgr = capture.read()[1]
            if bgr is None:
                capture.release()
                stop.wait(self.retry)
                capture = self._open(number)
                self.reconnected += 1
                continue
            with changed:
                self.dropped += len(newest)
                newest[:] = [bgr]
                changed.notify()
        capture.release()


def paced(frames: Iterator[np.ndarray], fps: float) -> Iterator[tuple[int, np.ndarray]]:
    """Yield how many frames of a video at `fps` each frame fills, so that the video keeps the time of the clock."""
    start, written = time.monotonic(), 0
    for frame in frames:
        due = max(written + 1, round((time.monotonic() - start) * fps))
        yield due - written, frame
        written = due
