"""SAM 2 on a Perception Encoder as an mmengine model: trained on clips, evaluated on videos."""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any
from unittest import mock

import numpy as np
import torch
from mmengine.logging import MessageHub
from mmengine.model import BaseDataPreprocessor, BaseModel
from mmengine.registry import MODELS
from torch import Tensor

import pe_spatial.engine
import pe_spatial.integrations.openmmlab  # noqa: F401  (both register optimizers and hooks)
from pe_spatial.encoder.checkpoint import load_checkpoint
from pe_spatial.errors import ConfigError
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
    """A promptable tracker: `tracker` has the weights, the other arguments control training and evaluation.

    Args:
        tracker: arguments of `build_pe_sam2`.
        encoder_weights: weights of the encoder, as in `load_checkpoint`.
        sam2_weights: weights of all but the encoder and its neck, as in `load_sam2_weights`.
        prompting: options of `Prompting`.
        loss: options of `MultiStepLoss`.
        recompute: as in `predict_clip`.
        prompt: prompt for the objects of a video in evaluation: 'mask', the annotation itself (semi-supervised), or a
            'box' or a 'click' derived from it.
        corrections: further clicks on the frame of a box or a click, each at the center of the largest error.
        streaming: options of `StreamingTracker`.
        seed: random seed of the prompts. The prompts of a step follow from it and the step's number, so that all
            processes draw the same ones, as in the release, and a resumed run continues with the next ones.
    """

    loads_released_weights = True
    is_init: bool

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
            raise ConfigError(f"corrections is {corrections}, but a mask needs none; choose prompt='click' or 'box'")
        super().__init__(data_preprocessor=BaseDataPreprocessor())
        self.tracker = build_pe_sam2(**tracker)
        self.prompting, self.loss = Prompting(**(prompting or {})), MultiStepLoss(**(loss or {}))
        if encoder_weights is not None:
            self.tracker.image_encoder.trunk.encoder.base_source = encoder_weights
        self.encoder_weights, self.sam2_weights, self.streaming = encoder_weights, sam2_weights, dict(streaming or {})
        self.recompute, self.prompt, self.corrections, self.seed = recompute, prompt, corrections, seed
        mean, std = (torch.tensor(values)[:, None, None] for values in (IMAGENET_MEAN, IMAGENET_STD))
        self.register_buffer("_mean", 255 * mean, persistent=False)
        self.register_buffer("_std", 255 * std, persistent=False)

    def init_weights(self) -> None:
        """Load the weights that the config names; the others stay random."""
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
        data_samples: Any = None,  # noqa: ARG002  (names, for error messages)
        clip: Sequence[Clip] | None = None,
        mode: str = "tensor",
    ) -> dict[str, Tensor] | list[dict[str, Any]]:
        """Return the losses of clips (mode 'loss') or the masks of videos (mode 'predict').

        Clips have frames `inputs` (T, 3, S, S) uint8 RGB and objects `masks` (N, T, S, S) bool, as from `PackClip`, and
        equal numbers of frames. Videos are the `clip` of `VideoDataset`.
        """
        if mode == "loss" and inputs is not None and masks is not None:
            return self.losses(inputs, masks)
        if mode == "predict" and clip is not None:
            return [self.track(one) for one in clip]
        raise ConfigError(
            f"a PESAM2 was called with mode {mode!r}; allowed are 'loss' with clips of a VideoClipDataset and "
            "'predict' with videos of a VideoDataset"
        )

    def losses(self, inputs: Sequence[Tensor], masks: Sequence[Tensor]) -> dict[str, Tensor]:
        side = self.tracker.image_size
        shapes = sorted({tuple(frames.shape) for frames in inputs})
        if len(shapes) > 1 or shapes[0][1:] != (3, side, side):
            raise ConfigError(
                f"a batch has clips of {shapes}; all need the same number of frames and {side} x {side} pixels: put "
                f"dict(type='ClipResize', size={side}) into the pipeline"
            )
        images = (torch.stack(list(inputs)) - self._mean) / self._std
        targets = torch.cat(list(masks)).transpose(0, 1)  # (T, N, S, S)
        clip_of = torch.tensor([i for i, objects in enumerate(masks) for _ in objects], device=targets.device)
        step = MessageHub.get_current_instance().get_info("iter", 0)
        plan = self.prompting.draw(len(targets), np.random.default_rng((self.seed, step)))
        return self.loss(predict_clip(self.tracker, images, targets, clip_of, plan, recompute=self.recompute), targets)

    @torch.no_grad()
    def track(self, clip: Clip) -> dict[str, Any]:
        """Return `video`, `frames` (names) and `pred_masks`, which `JandFMetric` scores.

        Masks are index masks (H, W) uint8. If annotations may overlap they are object id -> (H, W) bool, for the
        annotated frames only: SA-V has 24 frames per second and annotates 6.
        """
        options = dict(non_overlapping=not clip.overlapping, **self.streaming)
        tracker = StreamingTracker(self.tracker, num_frames=len(clip), **options)
        truth, annotated = clip.prompts(), clip.annotated() if clip.overlapping else None
        names, masks = [], []
        for name, rgb in clip.read():
            predicted = self._step(tracker, rgb, truth.get(name, {}))
            if annotated is None or name in annotated:
                names.append(name)
                masks.append(join_masks(predicted, rgb.shape[:2]) if annotated is None else predicted)
        return dict(video=clip.name, frames=names, pred_masks=masks)

    def _step(
        self, tracker: StreamingTracker, rgb: np.ndarray, truth: Mapping[int, np.ndarray]
    ) -> dict[int, np.ndarray]:
        if self.prompt == "mask":
            masks = tracker.step(rgb, {i: Prompt(mask=mask) for i, mask in truth.items()})
            return {i: mask.cpu().numpy() for i, mask in masks.items()} | dict(truth)
        prompts = {i: _box(mask) if self.prompt == "box" else _click(mask) for i, mask in truth.items()}
        masks = tracker.step(rgb, prompts)
        for _ in range(self.corrections if truth else 0):
            masks |= tracker.refine({i: _click(mask, masks[i].cpu().numpy()) for i, mask in truth.items()})
        return {i: mask.cpu().numpy() for i, mask in masks.items()}


def _click(truth: np.ndarray, predicted: np.ndarray | None = None) -> Prompt:
    """Click at the center of the object (H, W), or of the largest error of a prediction."""
    from sam2.modeling.sam2_utils import get_next_point

    pair = (None if mask is None else torch.from_numpy(mask)[None, None] for mask in (truth, predicted))
    points, labels = get_next_point(*pair, "center")
    return Prompt(points=points[0], labels=labels[0])


def _box(truth: np.ndarray) -> Prompt:
    rows, columns = np.flatnonzero(truth.any(1)), np.flatnonzero(truth.any(0))
    return Prompt(box=(columns[0], rows[0], columns[-1] + 1, rows[-1] + 1))


@register_example(
    PESAM2, counted="encoder, tracker and losses with {objects} objects in a clip, and the most prompts and clicks"
)
def _planned_loss(model: PESAM2, clips: Tensor, objects: int, replaced: ExitStack) -> Tensor:
    replaced.enter_context(mock.patch.object(Prompting, "draw", lambda self, frames, _: self.most(frames)))
    batch_size, frames, _, h, w = clips.shape
    masks = torch.empty(batch_size, objects, frames, h, w, dtype=torch.bool, device=clips.device)
    return total_loss(model, inputs=list(clips.to(torch.uint8)), masks=list(masks))
