"""Two-stage detection in MMDetection as Detectron2 computes it, so that the released detectors give the same boxes.

Each class changes only what differs. Source of every rule: detectron2@02b5c4e:detectron2/modeling. Rules that are
options of MMDetection (RoIAlign, thresholds) are set in configs/_base_/models/.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from mmdet.models.dense_heads import RPNHead
from mmdet.models.layers import multiclass_nms
from mmdet.models.roi_heads import CascadeRoIHead, Shared4Conv1FCBBoxHead, SingleRoIExtractor, StandardRoIHead
from mmdet.models.task_modules.assigners import AssignResult, MaxIoUAssigner
from mmdet.models.task_modules.coders import DeltaXYWHBBoxCoder
from mmdet.models.task_modules.samplers import SamplingResult
from mmdet.models.utils import empty_instances, unpack_gt_instances
from mmdet.structures.bbox import bbox2roi
from mmengine.registry import MODELS, TASK_UTILS
from mmengine.structures import InstanceData
from torch import Tensor, nn

from pe_spatial.errors import ConfigError


@MODELS.register_module()
class Float32Linear(nn.Linear):
    """A linear layer in float32 under autocast, for `cls_predictor_cfg` and `reg_predictor_cfg` of box heads."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return super().forward(x.float())


@TASK_UTILS.register_module()
class Detectron2BoxCoder(DeltaXYWHBBoxCoder):
    """DeltaXYWHBBoxCoder that clamps the logarithm of a size only from above (box_regression.py).

    MMDetection clamps it from below too, unless it also clamps centers: here to infinity.

    Args:
        target_stds: standard deviations of dx, dy, dw, dh: the inverse of Detectron2's weights.
    """

    def __init__(self, *, target_stds: Sequence[float]) -> None:
        super().__init__(target_stds=target_stds, add_ctr_clamp=True, ctr_clamp=float("inf"))


@TASK_UTILS.register_module()
class Detectron2MaxIoUAssigner(MaxIoUAssigner):
    """MaxIoUAssigner in which a low-quality match makes an anchor positive, for the object that it overlaps most.

    MMDetection instead assigns it to the object that has no better anchor (matcher.py).
    """

    def assign_wrt_overlaps(self, overlaps: Tensor, gt_labels: Tensor) -> AssignResult:
        """IoU (objects, boxes) in [0, 1] and labels (objects,) -> the assignment."""
        result = super().assign_wrt_overlaps(overlaps, gt_labels)
        if overlaps.numel():
            positive = result.gt_inds > 0
            best = overlaps.argmax(dim=0)[positive]
            result.gt_inds[positive] = best + 1
            result.labels[positive] = gt_labels[best]
        return result


@MODELS.register_module()
class Detectron2RPNHead(RPNHead):
    """RPNHead that ranks by logits, and divides its losses by the sampler's quota, not by the number of samples.

    Ranking by probability, as MMDetection does, ties all logits above 17 (proposal_generator/{rpn,proposal_utils}.py).
    The two predictors compute in float32 under autocast: in bfloat16 the scores of neighboring anchors tie, and mmcv's
    NMS on CPUs takes float32 only. The convolutions before them, nearly all of the cost, stay in the low precision.
    """

    def forward_single(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(B, C, H, W) -> objectness (B, A, H, W) and box deltas (B, 4 A, H, W), both float32."""
        x = F.relu(self.rpn_conv(x))
        with torch.autocast(x.device.type, enabled=False):
            x = x.float()
            return self.rpn_cls(x), self.rpn_reg(x)

    def get_targets(
        self, anchors: list[Any], valid: list[Any], gt_instances: list[InstanceData], *args: Any, **options: Any
    ) -> tuple[Any, ...]:
        """As in MMDetection, but the last entry, the divisor of both losses, is fixed by the batch."""
        *targets, _ = super().get_targets(anchors, valid, gt_instances, *args, **options)
        return (*targets, self.train_cfg["sampler"]["num"] * len(gt_instances))

    def _predict_by_feat_single(
        self,
        cls_score_list: Sequence[Tensor],
        bbox_pred_list: Sequence[Tensor],
        score_factor_list: object,  # noqa: ARG002  (mmdet names it)
        mlvl_priors: Sequence[Tensor],
        img_meta: Mapping[str, Any],
        cfg: Any,
        rescale: bool = False,
        with_nms: bool = True,
    ) -> InstanceData:
        cfg = cfg or self.test_cfg
        boxes, logits, levels = [], [], []
        for level, (score, delta, priors) in enumerate(zip(cls_score_list, bbox_pred_list, mlvl_priors, strict=True)):
            score = score.permute(1, 2, 0).flatten()  # (H W A,)
            delta = delta.permute(1, 2, 0).reshape(-1, 4)
            score, index = score.topk(min(cfg.nms_pre, len(score)))
            boxes.append(self.bbox_coder.decode(priors[index], delta[index], max_shape=img_meta["img_shape"]))
            logits.append(score)
            levels.append(torch.full_like(index, level))
        results = InstanceData(bboxes=torch.cat(boxes), scores=torch.cat(logits), level_ids=torch.cat(levels))
        results = self._bbox_post_process(results, cfg, rescale, with_nms, img_meta)
        results.scores = results.scores.sigmoid()
        return results


@MODELS.register_module()
class Detectron2RoIExtractor(SingleRoIExtractor):
    """SingleRoIExtractor that rounds at the boundaries between levels as Detectron2 does (poolers.py)."""

    def map_roi_levels(self, rois: Tensor, num_levels: int) -> Tensor:
        """RoIs (N, 5) as (image, x1, y1, x2, y2) in pixels -> the level (N,) of each."""
        sides = ((rois[:, 3] - rois[:, 1]) * (rois[:, 4] - rois[:, 2])).sqrt()
        levels = torch.floor(4 + torch.log2(sides / (4 * self.finest_scale) + 1e-8)) - 2
        return levels.clamp(0, num_levels - 1).long()


def _not_empty(boxes: Tensor) -> Tensor:
    return (boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])


@MODELS.register_module()
class Detectron2BBoxHead(Shared4Conv1FCBBoxHead):
    """Box head that drops non-finite rows before it selects boxes, and empty boxes afterwards (fast_rcnn.py)."""

    def probabilities(self, cls_score: Tensor) -> Tensor:
        """Logits (N, C + 1) -> probabilities in [0, 1], the background in the last column."""
        return self.loss_cls.get_activation(cls_score) if self.custom_activation else cls_score.softmax(-1)

    def _predict_by_feat_single(
        self,
        roi: Tensor,
        cls_score: Tensor,
        bbox_pred: Tensor,
        img_meta: Mapping[str, Any],
        rescale: bool = False,
        rcnn_test_cfg: Any = None,
    ) -> InstanceData:
        return self.select(roi, self.probabilities(cls_score), bbox_pred, img_meta, rescale, rcnn_test_cfg)

    def select(
        self, roi: Tensor, scores: Tensor, bbox_pred: Tensor, img_meta: Mapping[str, Any], rescale: bool, cfg: Any
    ) -> InstanceData:
        """Decode, clip, and keep the best boxes of each class.

        Args:
            roi: (N, 5) as (image, x1, y1, x2, y2), in pixels of the input.
            scores, bbox_pred: probabilities (N, C + 1), and deltas (N, 4 C) or (N, 4).
            img_meta: img_shape (h, w) and scale_factor (w, h) of the image.
            rescale: return boxes in pixels of the original image.
            cfg: score_thr, nms and max_per_img.
        """
        boxes = self.bbox_coder.decode(roi[:, 1:], bbox_pred)
        finite = boxes.isfinite().all(1) & scores.isfinite().all(1)
        height, width = img_meta["img_shape"]
        boxes = boxes[finite].reshape(-1, 4)
        boxes[:, 0::2].clamp_(0, width)
        boxes[:, 1::2].clamp_(0, height)
        boxes = boxes.reshape(-1, bbox_pred.shape[1])
        best, labels = multiclass_nms(boxes, scores[finite], cfg.score_thr, cfg.nms, cfg.max_per_img)
        keep = _not_empty(best)
        best, labels = best[keep], labels[keep]
        scale = best.new_tensor(img_meta["scale_factor"]).repeat(2) if rescale else 1
        return InstanceData(bboxes=best[:, :4] / scale, scores=best[:, 4], labels=labels)


@MODELS.register_module()
class Detectron2CascadeRoIHead(CascadeRoIHead):
    """Cascade R-CNN with one mask head, on the final boxes (roi_heads/cascade_rcnn.py).

    - The gradient of each stage into the shared features is scaled by 1 / stages; the losses keep their weights.
    - Stages after the first train on all boxes of the previous stage, assigned anew: give them a PseudoSampler.
    - Scores are the mean of the stages' probabilities (MMDetection averages logits).
    - The mask head trains on the samples of the first stage.

    Args as in CascadeRoIHead, with one `mask_roi_extractor` and one `mask_head`. Box heads must be `Detectron2BBoxHead`
    with `reg_class_agnostic=True`.
    """

    _mask_forward = StandardRoIHead._mask_forward
    predict_mask = StandardRoIHead.predict_mask

    def init_bbox_head(self, bbox_roi_extractor: Any, bbox_head: Any) -> None:
        """Build the box heads; ConfigError if one of them cannot be refined without classes."""
        super().init_bbox_head(bbox_roi_extractor, bbox_head)
        if not all(isinstance(head, Detectron2BBoxHead) and head.reg_class_agnostic for head in self.bbox_head):
            raise ConfigError(f"{type(self).__name__} needs box heads Detectron2BBoxHead(reg_class_agnostic=True)")

    def init_mask_head(self, mask_roi_extractor: Mapping[str, Any], mask_head: Mapping[str, Any]) -> None:
        self.share_roi_extractor = False
        self.mask_roi_extractor = MODELS.build(mask_roi_extractor)
        self.mask_head = MODELS.build(mask_head)

    def loss(
        self, x: tuple[Tensor, ...], rpn_results_list: list[InstanceData], batch_data_samples: Any
    ) -> dict[str, Tensor]:
        """Levels (B, C, h, w), proposals and annotations -> losses `s{stage}.loss_{cls,bbox}` and `loss_mask`."""
        gt_instances, ignored, metas = unpack_gt_instances(batch_data_samples)
        boxes = [results.bboxes for results in rpn_results_list]
        losses: dict[str, Tensor] = {}
        first: list[SamplingResult] = []
        for stage in range(self.num_stages):
            priors = [InstanceData(priors=b) for b in boxes]
            assigned = map(self.bbox_assigner[stage].assign, priors, gt_instances, ignored)
            samples = list(map(self.bbox_sampler[stage].sample, assigned, priors, gt_instances))
            first = first or samples
            out = self.bbox_loss(stage, x, samples)
            weight = self.stage_loss_weights[stage]
            for name, value in out["loss_bbox"].items():
                losses[f"s{stage}.{name}"] = value * weight if "loss" in name else value
            if stage < self.num_stages - 1:
                boxes = self._refine(stage, [s.priors for s in samples], out["bbox_pred"].detach(), metas)
                boxes = [b[_not_empty(b)] for b in boxes]
        if self.with_mask:
            losses.update(self.mask_loss(x, first, gt_instances))
        return losses

    def mask_loss(
        self, x: tuple[Tensor, ...], samples: list[SamplingResult], gt_instances: list[InstanceData]
    ) -> dict[str, Tensor]:
        preds = self._mask_forward(x, bbox2roi([s.pos_priors for s in samples]))["mask_preds"]
        return self.mask_head.loss_and_target(preds, samples, gt_instances, self.train_cfg[0])["loss_mask"]

    def predict_bbox(
        self,
        x: tuple[Tensor, ...],
        batch_img_metas: list[dict[str, Any]],
        rpn_results_list: list[InstanceData],
        rcnn_test_cfg: Any,
        rescale: bool = False,
    ) -> list[InstanceData]:
        """Levels (B, C, h, w) and proposals -> boxes, scores and labels of each image."""
        rois, scores, deltas = self._stages(x, batch_img_metas, [results.bboxes for results in rpn_results_list])
        head = self.bbox_head[-1]
        if not sum(map(len, rois)):
            device, classes = x[0].device, head.num_classes
            return empty_instances(batch_img_metas, device, "bbox", num_classes=classes, box_type=head.predict_box_type)
        return [
            head.select(*image, meta, rescale, rcnn_test_cfg)
            for *image, meta in zip(rois, scores, deltas, batch_img_metas, strict=True)
        ]

    def forward(
        self, x: tuple[Tensor, ...], rpn_results_list: list[InstanceData], batch_data_samples: Any
    ) -> tuple[Any, ...]:
        """Return mean probabilities, last deltas, and the mask logits of the last RoIs, of each image."""
        metas = [sample.metainfo for sample in batch_data_samples]
        rois, scores, deltas = self._stages(x, metas, [results.bboxes for results in rpn_results_list])
        return scores, deltas, self._mask_forward(x, torch.cat(rois))["mask_preds"].split([len(r) for r in rois])

    def _bbox_forward(self, stage: int, x: tuple[Tensor, ...], rois: Tensor) -> dict[str, Tensor]:
        extractor = self.bbox_roi_extractor[stage]
        feats = extractor(x[: extractor.num_inputs], rois)
        if feats.requires_grad:
            feats.register_hook(lambda gradient: gradient / self.num_stages)
        cls_score, bbox_pred = self.bbox_head[stage](feats)
        return {"cls_score": cls_score, "bbox_pred": bbox_pred, "bbox_feats": feats}

    def _stages(
        self, x: tuple[Tensor, ...], metas: list[dict[str, Any]], boxes: list[Tensor]
    ) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Return the RoIs, the mean probabilities and the deltas of the last stage, of each image."""
        sizes = [len(b) for b in boxes]  # empty boxes stay, so that rows remain aligned
        probabilities = []
        for stage, head in enumerate(self.bbox_head):
            rois = bbox2roi(boxes)
            out = self._bbox_forward(stage, x, rois)
            probabilities.append(head.probabilities(out["cls_score"]))
            if stage < self.num_stages - 1:
                boxes = self._refine(stage, boxes, out["bbox_pred"], metas)
        mean = torch.stack(probabilities).mean(0)
        return rois.split(sizes), mean.split(sizes), out["bbox_pred"].split(sizes)

    def _refine(self, stage: int, boxes: list[Tensor], deltas: Tensor, metas: list[dict[str, Any]]) -> list[Tensor]:
        decode = self.bbox_head[stage].bbox_coder.decode
        return [
            decode(box, delta, max_shape=meta["img_shape"])
            for box, delta, meta in zip(boxes, deltas.split([len(b) for b in boxes]), metas, strict=True)
        ]
