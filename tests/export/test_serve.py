"""The serving example of the docs answers on loopback, in batches, and refuses what is too large."""

import importlib.util
import io
import json
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from helpers.processes import free_port
from helpers.repository import REPO
from PIL import Image

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")
import uvicorn

from pe_spatial.errors import DatasetError
from pe_spatial.predict.results import Detections

BAD = 13  # width of images that the detector refuses


class Detector:
    """Finds one object as large as the image."""

    def __init__(self):
        self.batches = []

    def __call__(self, images, *, batch_size):
        assert len(images) <= batch_size
        if any(image.shape[1] == BAD for image in images):
            raise DatasetError("an image does not fit the canvas")
        self.batches.append(len(images))
        return [
            Detections(boxes=np.array([[0, 0, i.shape[1], i.shape[0]]], np.float32), scores=np.array([0.9], np.float32),
                       labels=np.array([0]), class_names=("thing",), image_size=i.shape[:2])
            for i in images
        ]  # fmt: skip


@pytest.fixture
def server():
    spec = importlib.util.spec_from_file_location("serve", REPO / "docs" / "serve.py")
    serve = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(serve)
    detector = Detector()
    port = free_port()
    running = uvicorn.Server(uvicorn.Config(serve.create_app(detector), port=port, log_level="error"))
    thread = threading.Thread(target=running.run, daemon=True)
    thread.start()
    while not running.started:
        time.sleep(0.01)
    yield f"http://127.0.0.1:{port}/detect", detector, serve
    running.should_exit = True
    thread.join()


def png(width, height):
    file = io.BytesIO()
    Image.fromarray(np.zeros((height, width, 3), np.uint8)).save(file, format="PNG")
    return file.getvalue()


def ask(url, body):
    with urllib.request.urlopen(urllib.request.Request(url, data=body), timeout=20) as answer:
        return json.loads(answer.read())


def test_requests_are_answered_in_batches_and_limits_hold(server, monkeypatch):
    url, detector, serve = server
    monkeypatch.setattr(serve, "WAIT", 0.2)
    with ThreadPoolExecutor(6) as pool:
        answers = list(pool.map(lambda width: ask(url, png(width, 20)), range(14, 20)))
    assert [answer[0]["box"][2] for answer in answers] == [14, 15, 16, 17, 18, 19]
    assert answers[0][0] == dict(name="thing", score=0.9, box=[0, 0, 14, 20])
    assert max(detector.batches) > 1
    assert ask(f"{url}?score=0.95", png(10, 10)) == []
    monkeypatch.setattr(serve, "MAX_PIXELS", 50)
    for body, code in ((b"no image", 400), (png(10, 10), 413)):
        with pytest.raises(urllib.error.HTTPError) as error:
            ask(url, body)
        assert error.value.code == code


def test_one_bad_image_does_not_fail_the_others(server, monkeypatch):
    url, _, serve = server
    monkeypatch.setattr(serve, "WAIT", 0.2)
    with ThreadPoolExecutor(3) as pool:
        calls = [pool.submit(ask, url, png(width, 20)) for width in (BAD, 14, 15)]
        assert [call.result()[0]["box"][2] for call in calls[1:]] == [14, 15]
        with pytest.raises(urllib.error.HTTPError) as error:
            calls[0].result()
    assert error.value.code == 400


def test_pixels_are_counted_before_decoding_and_bodies_have_a_length(server, monkeypatch):
    url, _, serve = server
    monkeypatch.setattr(serve, "MAX_PIXELS", 50)
    monkeypatch.setattr(serve, "decode_rgb", None)
    chunks = urllib.request.Request(url, data=iter([b"x"]), headers={"Transfer-Encoding": "chunked"})
    for request, code in ((urllib.request.Request(url, data=png(10, 10)), 413), (chunks, 411)):
        with pytest.raises(urllib.error.HTTPError) as error:
            urllib.request.urlopen(request, timeout=20)
        assert error.value.code == code
