"""SAM 2 on a Perception Encoder as a model of mmengine: trained on clips, evaluated on videos."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any
from unittest import mock

import numpy as np
import torch
from mmengine.logging import MessageHub
from mmengine.model import BaseDataPreprocessor, BaseModel
from mmengine.registry import MODELS
from torch import Tensor

import pe_spatial.integrations.openmmlab  # noqa: F401  (registers optimizers and hooks)
from pe_spatial.encoder.checkpoint import load_checkpoint
from pe_spatial.errors import ConfigError, DatasetError
from pe_spatial.planning.registry import register_example, total_loss
from pe_spatial.tracking.sam2.losses import MultiStepLoss
from pe_spatial.tracking.sam2.model import IMAGENET_MEAN, IMAGENET_STD, build_pe_sam2, load_sam2_weights
from pe_spatial.tracking.sam2.prompts import Prompt
from pe_spatial.tracking.sam2.streaming import StreamingTracker
from pe_spatial.tracking.sam2.training import Prompting, predict_clip
from pe_spatial.tracking.vos.clip import Clip
from pe_spatial.tracking.vos.masks import join_masks

PROMPTS = ("mask", "box", "click")


@MODELS.register_module()
class PESAM2(BaseModel):
    """A promptable tracker: `tracker` holds its weights, everything else says how it is trained and evaluated.

    Args:
        tracker: arguments of `build_pe_sam2`.
        encoder_weights: of the encoder, as in `load_checkpoint`.
        sam2_weights: of all but the encoder and its neck, as in `load_sam2_weights`.
        prompting: options of `Prompting`.
        loss: options of `MultiStepLoss`.
        recompute: as in `predict_clip`.
        prompt: what the objects of a video are given by when it is evaluated: 'mask', the annotation itself
            (semi-supervised), or a 'box' or a 'click' derived from it.
        corrections: further clicks on the frame of a box or a click, each into the middle of the largest error.
        streaming: options of `StreamingTracker`.
        seed: of the prompts. Those of a step follow from it and the step's number, so that all processes draw alike, as
            the release has it, and a run that resumes goes on with the next ones.
    """

    loads_released_weights = True

    def __init__(
        self,
        tracker: Mapping[str, Any],
        *,
        encoder_weights: str | None = None,
        sam2_weights: str | None = None,
        prompting: Mapping[str, Any] | None = None,
        loss: Mapping[str, Any] | None = None,
        recompute: bool = False,
        prompt: str = "mask",
        corrections: int = 0,
        streaming: Mapping[str, Any] | None = None,
        seed: int = 42,
    ) -> None:
        if prompt not in PROMPTS:
            raise ConfigError(f"prompt is {prompt!r}; allowed are {', '.join(map(repr, PROMPTS))}")
        if corrections and prompt == "mask":
            raise ConfigError(
                f"corrections is {corrections}, but a mask is the truth already; take prompt='click' or 'box'"
            )
        super().__init__(data_preprocessor=BaseDataPreprocessor())
        self.tracker = build_pe_sam2(**tracker)
        self.encoder_weights, self.sam2_weights = encoder_weights, sam2_weights
        self.prompting = Prompting(**(prompting or {}))
        self.loss = MultiStepLoss(**(loss or {}))
        self.recompute, self.prompt, self.corrections, self.seed = recompute, prompt, corrections, seed
        self.streaming = dict(streaming or {})
        mean, std = (torch.tensor(values)[:, None, None] for values in (IMAGENET_MEAN, IMAGENET_STD))
        self.register_buffer("_mean", 255 * mean, persistent=False)
        self.register_buffer("_std", 255 * std, persistent=False)

    def init_weights(self) -> None:
        """Load what the config names; the rest stays random."""
        if self.is_init:
            return
        if self.encoder_weights is not None:
            load_checkpoint(self.tracker.image_encoder.trunk.encoder, self.encoder_weights)
        if self.sam2_weights is not None:
            load_sam2_weights(self.tracker, self.sam2_weights)
        self.is_init = True

    def forward(
        self,
        inputs: Sequence[Tensor] | None = None,
        masks: Sequence[Tensor] | None = None,
        data_samples: Any = None,  # noqa: ARG002  (names, for messages)
        clip: Sequence[Clip] | None = None,
        mode: str = "tensor",
    ) -> dict[str, Tensor] | list[dict[str, Any]]:
        """Return the losses of clips (mode 'loss') or the masks of videos (mode 'predict').

        Args:
            inputs: of each clip its frames (T, 3, S, S) uint8, R, G, B, as `PackClip` gives them.
            masks: of each clip its objects (N, T, S, S) bool.
            data_samples: of each clip its names.
            clip: videos, as `VideoDataset` gives them.
            mode: 'loss' or 'predict'.
        """
        if mode == "loss" and inputs is not None and masks is not None:
            return self.losses(inputs, masks)
        if mode == "predict" and clip is not None:
            return [self.follow(one) for one in clip]
        raise ConfigError(
            f"a PESAM2 was called with mode {mode!r}; it takes 'loss' with clips of a VideoClipDataset and 'predict' "
            "with videos of a VideoDataset"
        )

    def losses(self, inputs: Sequence[Tensor], masks: Sequence[Tensor]) -> dict[str, Tensor]:
        """Return the losses of clips, which need equal numbers of frames; see `forward`."""
        side = self.tracker.image_size
        shapes = sorted({tuple(frames.shape) for frames in inputs})
        if len(shapes) > 1 or shapes[0][1:] != (3, side, side):
            raise ConfigError(
                f"a batch holds clips of {shapes}; all need one number of frames and {side} x {side} pixels, for which "
                f"the pipeline says dict(type='ClipResize', size={side})"
            )
        images = (torch.stack(list(inputs)) - self._mean) / self._std
        targets = torch.cat(list(masks)).transpose(0, 1)  # (T, N, S, S)
        clip_of = torch.tensor([i for i, objects in enumerate(masks) for _ in objects], device=targets.device)
        step = MessageHub.get_current_instance().get_info("iter", 0)
        plan = self.prompting.draw(len(targets), np.random.default_rng((self.seed, step)))
        return self.loss(predict_clip(self.tracker, images, targets, clip_of, plan, recompute=self.recompute), targets)

    @torch.no_grad()
    def follow(self, clip: Clip) -> dict[str, Any]:
        """Return `video`, `frames` (names) and `pred_masks`, which `JandFMetric` scores.

        A mask is (H, W) uint8, the objects' ids. Where the annotations may overlap it is a mask (H, W) bool by id, and
        of the annotated frames alone: SA-V has 24 frames a second and annotates 6.
        """
        options = dict(non_overlapping=not clip.overlapping, **self.streaming)
        tracker = StreamingTracker(self.tracker, num_frames=len(clip), **options)
        truth, annotated = clip.prompts(), clip.annotated() if clip.overlapping else None
        names, masks = [], []
        for name, rgb in clip.read():
            found = self._step(tracker, rgb, truth.get(name, {}))
            if annotated is None or name in annotated:
                names.append(name)
                masks.append(join_masks(found, rgb.shape[:2]) if annotated is None else found)
        return dict(video=clip.name, frames=names, pred_masks=masks)

    def _step(
        self, tracker: StreamingTracker, rgb: np.ndarray, truth: Mapping[int, np.ndarray]
    ) -> dict[int, np.ndarray]:
        if self.prompt == "mask":
            found = tracker.step(rgb, {i: Prompt(mask=mask) for i, mask in truth.items()})
            return {i: mask.cpu().numpy() for i, mask in found.items()} | dict(truth)
        prompts = {i: _box(mask) if self.prompt == "box" else _click(mask) for i, mask in truth.items()}
        found = tracker.step(rgb, prompts)
        for _ in range(self.corrections if truth else 0):
            found |= tracker.refine({i: _click(mask, found[i].cpu().numpy()) for i, mask in truth.items()})
        return {i: mask.cpu().numpy() for i, mask in found.items()}


def track_clip(
    tracker: StreamingTracker, clip: Clip, prompts: Mapping[int, Mapping[int, Prompt]]
) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """Yield the name, the image (H, W, 3) uint8 RGB and the index mask (H, W) uint8 of each frame.

    Args:
        tracker: with masks that do not overlap.
        clip: its own masks are not read.
        prompts: frame number -> object id -> `Prompt`.

    Raises DatasetError for a prompt on a frame that does not exist.
    """
    count = 0
    for name, rgb in clip.read():
        masks = tracker.step(rgb, prompts.get(count))
        count += 1
        yield name, rgb, join_masks({i: mask.cpu().numpy() for i, mask in masks.items()}, rgb.shape[:2])
    beyond = [frame for frame in prompts if frame >= count]
    if beyond:
        raise DatasetError(f"{clip.name} has {count} frames, so there is no frame {min(beyond)} to prompt on")


def _click(truth: np.ndarray, predicted: np.ndarray | None = None) -> Prompt:
    """Click into the middle of the object (H, W), or of what is wrong about it."""
    from sam2.modeling.sam2_utils import get_next_point

    pair = (None if mask is None else torch.from_numpy(mask)[None, None] for mask in (truth, predicted))
    points, labels = get_next_point(*pair, "center")
    return Prompt(points=points[0], labels=labels[0])


def _box(truth: np.ndarray) -> Prompt:
    rows, columns = np.flatnonzero(truth.any(1)), np.flatnonzero(truth.any(0))
    return Prompt(box=(columns[0], rows[0], columns[-1] + 1, rows[-1] + 1))


@register_example(
    PESAM2,
    counted="encoder, tracker and losses with {objects} objects in a clip, and as many prompts and clicks as can be "
    "drawn",
)
def _planned_loss(model: PESAM2, clips: Tensor, objects: int, replaced: ExitStack) -> Tensor:
    replaced.enter_context(mock.patch.object(Prompting, "draw", lambda self, frames, _: self.most(frames)))
    batch_size, frames, _, h, w = clips.shape
    masks = torch.empty(batch_size, objects, frames, h, w, dtype=torch.bool, device=clips.device)
    return total_loss(model, inputs=list(clips.to(torch.uint8)), masks=list(masks))
