"""A tracker in another runtime: the parts of a network as graphs, and what streams through them in numpy.

Shapes: B objects, g the model's grid, d its width, m channels of a memory, S its image size, H x W pixels of a frame.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from pe_spatial.images import bilinear_weights
from pe_spatial.predict.videos import VideoTracker
from pe_spatial.runtime.manifest import check_complete, read_manifest
from pe_spatial.runtime.sessions import Session, open_session
from pe_spatial.tracking.sam2.online import (
    MAX_LOGIT,
    Bank,
    Input,
    Memory,
    MemorySettings,
    OnlineTracker,
    Output,
    model_image,
)

_SURE = 100.0  # the sigmoid of this logit is 1


class ExportedTracker(VideoTracker):
    """Masks of objects through a video, each from a prompt (clicks, a box or a mask).

    Args:
        folder: what `pe-spatial export` wrote for a tracker.
        image_encoder: runs that part, which then takes no pixels; None opens the folder's.
        options: `backend` and `threads`, see `open_session`.
    """

    def __init__(self, folder: str | Path, *, image_encoder: Session | None = None, **options: Any) -> None:
        self.folder = Path(folder)
        self.manifest = read_manifest(folder)
        manifests = {name: read_manifest(self.folder / name) for name in self.manifest.options["parts"]}
        if image_encoder is None:
            check_complete(self.folder, manifests["image_encoder"])
        self._sessions = {
            name: image_encoder if image_encoder and name == "image_encoder" else
            open_session(self.folder / name, manifest, **options) for name, manifest in manifests.items()
        }  # fmt: skip
        self._inputs = {name: list(manifest.inputs) for name, manifest in manifests.items()}
        if image_encoder is not None:
            self._inputs["image_encoder"] = []
        self.mask_size: int = manifests["mask_decoder"].inputs["mask"]["shape"][-1]
        """Side of the logits that the decoder takes and returns, 4g."""

    def run(self, part: str, **values: np.ndarray) -> dict[str, np.ndarray]:
        """Run a part of the network; values that it does not take are ignored."""
        return self._sessions[part].run({name: np.ascontiguousarray(values[name]) for name in self._inputs[part]})

    def start(self, **options: Any) -> ExportedStream:
        """Return a tracker for frames that come one by one; `options` are those of `OnlineTracker`."""
        return ExportedStream(self, **{"non_overlapping": True, **options})


class ExportedStream(OnlineTracker):
    """An `OnlineTracker` whose network is an `ExportedTracker`; masks and logits are arrays."""

    def __init__(self, network: ExportedTracker, **options: Any) -> None:
        super().__init__(MemorySettings(**network.manifest.options["memory"]), **options)
        self.network = network

    def _encode(self, frame_rgb: np.ndarray) -> dict[str, np.ndarray]:
        return self.network.run("image_encoder", pixels=model_image(frame_rgb, self.settings.image_size)[None])

    def _run(self, features: Mapping[str, np.ndarray], batch: Sequence[Input]) -> list[Output]:
        masks = [one.mask for one in batch if one.mask is not None]
        found = self._decode_masks(features, np.stack(masks)) if masks else self._decode(features, batch)
        large = found["large"]
        if batch[0].clicks is not None and self.network.manifest.options["binarize"]:
            large = np.where(large > 0, np.float32(_SURE), np.float32(-_SURE))
        image = np.repeat(features["image"], len(batch), 0)
        encoded = self.network.run("memory_encoder", image=image, masks=large, scores=found["scores"])
        arrays = (found["logits"][:, 0], found["scores"], found["pointers"], encoded["memories"])
        return [  # copies, because a slice would keep the complete batch alive
            Output(logits.copy(), score, Memory(pointer.copy(), memory.copy()))
            for logits, score, pointer, memory in zip(*arrays, strict=True)
        ]

    def _decode_masks(self, features: Mapping[str, np.ndarray], masks: np.ndarray) -> dict[str, np.ndarray]:
        """Take masks (B, 1, S, S) as they are; the network adds a pointer to each object."""
        prompts = self.network.run("mask_prompt", masks=masks)
        image = np.repeat(features["image"], len(masks), 0)
        found = self._run_decoder(features, image, mask=prompts["prompts"], multimask=False)
        scores = np.full((len(masks), 1), 10.0, np.float32)
        large = masks * np.float32(20) - np.float32(10)
        return dict(logits=prompts["logits"], large=large, pointers=found["pointers"], scores=scores)

    def _decode(self, features: Mapping[str, np.ndarray], batch: Sequence[Input]) -> dict[str, np.ndarray]:
        """Decode objects from clicks, from memories, or both: `logits`, `large`, `pointers` and `scores`."""
        banks = [one.bank for one in batch if one.bank is not None]
        clicks = [one.clicks for one in batch if one.clicks is not None]
        before = [one.before for one in batch if one.before is not None]
        image = self._condition(features, banks) if banks else np.repeat(features["fresh"], len(batch), 0)
        given: dict[str, np.ndarray] = {}
        if clicks:
            points, labels = (np.stack(part) for part in zip(*clicks, strict=True))
            given = dict(points=points, labels=labels.astype(np.int64))
        if before:
            side = self.network.mask_size
            inputs = [_resized(one.clip(-MAX_LOGIT, MAX_LOGIT), (side, side), antialias=True) for one in before]
            given["mask"] = np.stack(inputs)[:, None]
        multimask, count = self.network.manifest.options["multimask"], len(clicks[0].labels) if clicks else 0
        least, most = multimask["points"]
        choose = multimask["tracked" if banks else "new"] and least <= count <= most
        return self._run_decoder(features, image, multimask=choose, **given)

    def _run_decoder(
        self, features: Mapping[str, np.ndarray], image: np.ndarray, *, multimask: bool,
        points: np.ndarray | None = None, labels: np.ndarray | None = None, mask: np.ndarray | None = None,
    ) -> dict[str, np.ndarray]:  # fmt: skip
        count, side = len(image), self.network.mask_size
        return self.network.run(
            "mask_decoder",
            image=image,
            points=np.zeros((count, 1, 2), np.float32) if points is None else points,
            labels=np.full((count, 1), -1) if labels is None else labels,
            mask=np.zeros((count, 1, side, side), np.float32) if mask is None else mask,
            use_mask=np.array([mask is not None]),
            multimask=np.array([multimask]),
            **{name: features[name] for name in ("middle", "fine") if name in features},
        )

    def _condition(self, features: Mapping[str, np.ndarray], banks: Sequence[Bank]) -> np.ndarray:
        """Attend from the frame to the memories of each object: (B, d, g, g)."""
        rows = np.array([[row for row, _ in bank.memories] for bank in banks]) % self.settings.num_maskmem
        back = np.array([[frames for frames, _ in bank.pointers] for bank in banks], np.float32)
        found = self.network.run(
            "memory_attention",
            image=features["image"],
            memories=np.stack([np.stack([memory for _, memory in bank.memories]) for bank in banks]),
            rows=rows,
            pointers=np.stack([np.stack([pointer for _, pointer in bank.pointers]) for bank in banks]),
            back=back / np.float32(self._reach() - 1),
        )
        return found["conditioned"]

    def _masks(self, outputs: Mapping[int, Output], frame_rgb: np.ndarray) -> dict[int, np.ndarray]:
        if not outputs:
            return {}
        logits = np.stack([_resized(output.logits, frame_rgb.shape[:2]) for output in outputs.values()])  # (B, H, W)
        if self.non_overlapping and len(logits) > 1:
            first = logits.argmax(0) == np.arange(len(logits))[:, None, None]
            logits = np.where(first, logits, np.minimum(logits, -10))
        return dict(zip(outputs, logits, strict=True))


def _resized(logits: np.ndarray, size: tuple[int, ...], *, antialias: bool = False) -> np.ndarray:
    """Return logits (h, w) in another `size`; those of masks have their own at other strides than 16."""
    rows, columns = (_weights(before, after, antialias) for before, after in zip(logits.shape, size, strict=True))
    return rows @ logits @ columns.T


@lru_cache(maxsize=16)
def _weights(size: int, out: int, antialias: bool) -> np.ndarray:
    return bilinear_weights(size, out, antialias=antialias).astype(np.float32)
