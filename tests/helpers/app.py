"""Models for tests of the page: a detector and a depth model that know the answer, tiny trackers and encoders."""

import multiprocessing
import threading
import time
from contextlib import contextmanager

import cv2
import numpy as np
import torch
from helpers.encoders import randomize
from helpers.language import WORD_CORE, tiny_core
from helpers.processes import free_port
from helpers.videos import moving

from pe_spatial import EncoderConfig, PerceptionEncoder
from pe_spatial.app.models import Models
from pe_spatial.features.extract import FeatureExtractor
from pe_spatial.predict.masks import MaskCrop
from pe_spatial.predict.results import DepthMap, Detections

TINY = dict(img_size=128, patch_size=16, embed_dim=32, depth=4, num_heads=2)


class Busy:
    """Takes a moment, and counts how many do so at once."""

    lock, now, most = threading.Lock(), 0, 0

    def __enter__(self):
        with Busy.lock:
            Busy.now += 1
            Busy.most = max(Busy.most, Busy.now)
        time.sleep(0.3)

    def __exit__(self, *_):
        with Busy.lock:
            Busy.now -= 1


class FakeDetector:
    """Finds a cat at 0.9 and a dog at 0.4 in every image."""

    task = "detection"

    def __call__(self, rgb):
        height, width = rgb.shape[:2]
        with Busy():
            mask = np.zeros((height, width), bool)
        mask[2:20, 2:30] = True
        return Detections(
            boxes=np.array([[2, 2, 30, 20], [40, 30, 60, 50]], np.float32),
            scores=np.array([0.9, 0.4], np.float32),
            labels=np.array([0, 1]),
            class_names=("cat", "dog"),
            image_size=(height, width),
            crops=(MaskCrop.cut(mask), MaskCrop.cut(~mask)),
        )


class FakeDepth:
    """Depth of 1 to 3 m from left to right."""

    task = "depth"

    def __init__(self, quantity="meter"):
        self.quantity = quantity

    def __call__(self, rgb):
        height, width = rgb.shape[:2]
        with Busy():
            depth = np.broadcast_to(np.linspace(1, 3, width, dtype=np.float32), (height, width)).copy()
        return DepthMap(depth=depth, quantity=self.quantity)


class FakeTogether:
    """The two above on one encode."""

    tasks = ("detection", "depth")

    def stream(self, images):
        self.frames = 0
        for rgb in images:
            self.frames += 1
            yield dict(detection=FakeDetector()(rgb), depth=FakeDepth()(rgb))

    def report(self):
        heads = dict(detection=20.0, depth=5.4)
        return dict(frames=self.frames, encodes=1.0, encoder=10.0, heads=heads, total=35.4, separate=45.4)


class TinyTracker:
    """Starts trackers with random weights."""

    task = "tracking"

    def __init__(self):
        from pe_spatial.tracking.sam2.model import build_pe_sam2

        torch.manual_seed(0)
        encoder = EncoderConfig(img_size=64, patch_size=8, embed_dim=32, depth=1, num_heads=2)
        self.model = randomize(build_pe_sam2(encoder, 4, d_model=32, mem_dim=8, layers=1, feedforward=32)).eval()
        self.model.sam_mask_decoder.pred_obj_score_head.layers[-1].bias.data.fill_(50)

    def start(self):
        from pe_spatial.tracking.sam2.streaming import StreamingTracker

        return StreamingTracker(self.model, non_overlapping=True)


def encoder(seed):
    torch.manual_seed(seed)
    return FeatureExtractor(PerceptionEncoder(EncoderConfig(**TINY), out_indices=range(4)).eval())


def fake_models(**options):
    fakes = FakeDetector(), FakeDepth(), TinyTracker(), FakeTogether()
    predictors = dict(zip(("detection", "depth", "tracking", "together"), fakes, strict=True))
    encoders = dict(tiny=encoder(0), other=encoder(1))
    return Models(predictors=predictors, encoders=encoders, words=tiny_core(WORD_CORE), **options)


def write_clip(path, frames):
    path.parent.mkdir(exist_ok=True)
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"mp4v"), 10, (128, 96))
    for _, rgb, _ in moving(frames):
        writer.write(rgb[..., ::-1])
    writer.release()
    return path


@contextmanager
def served(**options):
    """Serve the fake models at a free port, and give the address."""
    from pe_spatial.app.page import build_page, serve

    models = fake_models(**options)
    page = build_page(models)
    yield serve(page, models, host="127.0.0.1", port=free_port())
    page.close(verbose=False)


def serve_until_killed(connection, options):
    with served(**options) as address:
        connection.send(address)
        threading.Event().wait()


def start_server(**options):
    """Serve the fake models in another process; return it and the address."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=serve_until_killed, args=(theirs, options), daemon=True)
    process.start()
    theirs.close()
    return process, ours.recv()
