"""Images and videos of any size to features: squashed to the pretraining square, in batches, read ahead by threads."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from pe_spatial.encoder.variants import EncoderConfig
from pe_spatial.errors import DatasetError
from pe_spatial.video import count_frames, decode_video

from .model import PECore
from .protocol import frame_numbers

Pixels = np.ndarray
FRAMES = 8
"""Frames of a video."""


def squash(rgb: Pixels, config: EncoderConfig, side: int | None = None) -> Tensor:
    """Resize (H, W, 3) uint8 RGB to a square, that of the pretraining, bilinearly, and normalize it: (3, S, S).

    Source: perception_models@3e352cc:core/vision_encoder/transforms.py. EXIF has turned the image already.
    """
    side = side or config.img_size
    resized = np.array(Image.fromarray(rgb).resize((side, side), Image.Resampling.BILINEAR))
    x = torch.from_numpy(resized).permute(2, 0, 1).float()
    mean, std = (torch.tensor(value)[:, None, None] for value in (config.mean, config.std))
    return (x - mean) / std


def video_frames(path: Path) -> list[Pixels]:
    """Return the `FRAMES` frames of a video, evenly from the first to the last; a shorter one repeats some."""
    announced = count_frames(path)
    frames, count = _pick(path, announced)
    if count != announced:  # containers may be wrong
        frames, _ = _pick(path, count)
    return [frames[i] for i in frame_numbers(count, FRAMES)]


def _pick(path: Path, count: int) -> tuple[dict[int, Pixels], int]:
    """Return the wanted frames of a video that is believed to have `count`, and how many it has."""
    wanted, frames, number = set(frame_numbers(count, FRAMES)), {}, 0
    for number, rgb in enumerate(decode_video(path)):
        if number in wanted:
            frames[number] = rgb
    return frames, number + 1


def batched_ahead(
    items: Iterable[Callable[[], Tensor]], batch_size: int, *, failed: dict[int, str] | None = None, threads: int = 4
) -> Iterator[Tensor]:
    """Yield the results of `items` in order, stacked in batches, while threads compute the next ones.

    An item that raises DatasetError is left out, and its number and the reason go into `failed`; None raises it.
    """
    iterator = iter(items)
    with ThreadPoolExecutor(threads) as pool:
        coming = deque(pool.submit(item) for item in islice(iterator, 2 * batch_size))
        ready: list[Tensor] = []
        number = 0
        while coming:
            try:
                ready.append(coming.popleft().result())
            except DatasetError as error:
                if failed is None:
                    raise
                failed[number] = str(error)
            number += 1
            coming.extend(pool.submit(item) for item in islice(iterator, 1))
            if ready and (len(ready) == batch_size or not coming):
                yield torch.stack(ready)
                ready = []


@torch.inference_mode()
def embed(
    model: PECore, readers: Sequence[Callable[[], Pixels | list[Pixels]]], *, batch_size: int = 32,
    normalize_frames: bool = False, failed: dict[int, str] | None = None, done: Callable[[int], object] = id,
) -> Tensor:  # fmt: skip
    """Return the normalized features (N, D), float32 on the CPU, of images or videos.

    Args:
        model: the PE-Core, on its device.
        readers: functions that return an image (H, W, 3) or the frames of a video.
        batch_size: images, or videos, per forward pass.
        normalize_frames: average normalized features of frames, as the released retrieval does.
        failed: as in `batched_ahead`.
        done: gets the number of finished ones after each batch.
    """
    config, like = model.config.vision, model.logit_scale

    def prepare(read: Callable[[], Pixels | list[Pixels]]) -> Tensor:
        pixels = read()
        if isinstance(pixels, list):
            return torch.stack([squash(one, config) for one in pixels])
        return squash(pixels, config)

    parts = [torch.zeros(0, model.config.output_dim)]
    for batch in batched_ahead((partial(prepare, read) for read in readers), batch_size, failed=failed):
        batch = batch.to(like.device, like.dtype)
        videos = batch.ndim == 5
        features = model.encode_video(batch, normalize_frames) if videos else model.encode_image(batch)
        parts.append(F.normalize(features.float(), dim=-1).cpu())
        done(len(batch))
    return torch.cat(parts)
