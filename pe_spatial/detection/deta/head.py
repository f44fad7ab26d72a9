"""DETA's class and box heads, their losses, and detection by NMS instead of a set of queries.

Boxes are (cx, cy, w, h) in 0..1 of the unpadded input, unless stated otherwise. Source:
perception_models@3e352cc:apps/detection/DETA_pe/models/deformable_detr.py.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from mmdet.models.dense_heads import DeformableDETRHead
from mmdet.structures.bbox import bbox_cxcywh_to_xyxy, bbox_xyxy_to_cxcywh
from mmdet.utils import reduce_mean
from mmengine.model import bias_init_with_prob
from mmengine.registry import MODELS, TASK_UTILS
from mmengine.structures import InstanceData
from torch import Tensor

from pe_spatial.detection.deta.assigners import Match
from pe_spatial.detection.deta.postprocess import postprocess
from pe_spatial.errors import ConfigError


@MODELS.register_module()
class DETAHead(DeformableDETRHead):
    """Class and box heads of DETA: one pair for each decoder layer, and the last pair for the encoder's proposals.

    All losses are divided by the number of objects in the batch (mean over ranks, at least 1). All proposals train,
    also padded and invalid ones; their class 0 is "object".

    Args as in DeformableDETRHead, except:
        sync_cls_avg_factor: the mean over ranks cannot be disabled; ConfigError if False.
        loss_cls: must use the sigmoid; ConfigError otherwise.
        classifier: options of a `TextClassifierHead` for the classes of the decoder layers; None is a linear layer.
            The encoder's proposals keep one.
        train_cfg: `proposal_assigner`, a DETAFirstStageAssigner, and `assigner`, a DETASecondStageAssigner.
        test_cfg: options of `postprocess`.
    """

    def __init__(
        self,
        *args: Any,
        sync_cls_avg_factor: bool = True,
        classifier: Mapping[str, Any] | None = None,
        train_cfg: Mapping[str, Any] | None = None,
        test_cfg: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> None:
        if not sync_cls_avg_factor:
            raise ConfigError("sync_cls_avg_factor=False: DETAHead always divides by the mean over ranks; remove it")
        self.classifier = classifier
        super().__init__(*args, sync_cls_avg_factor=True, train_cfg=train_cfg, test_cfg=test_cfg or {}, **options)
        if not self.loss_cls.use_sigmoid:
            raise ConfigError("loss_cls has use_sigmoid=False: DETAHead needs one score per class, as in FocalLoss")
        if train_cfg:
            if "proposal_assigner" not in train_cfg:
                raise ConfigError(f"train_cfg has {sorted(train_cfg)}: add proposal_assigner, a DETAFirstStageAssigner")
            self.proposal_assigner = TASK_UTILS.build(train_cfg["proposal_assigner"])

    def _init_layers(self) -> None:
        super()._init_layers()
        if self.classifier is not None:
            options = dict(prior=bias_init_with_prob(0.01), background=False) | dict(self.classifier)
            options |= dict(in_features=self.embed_dims, out_features=self.cls_out_channels)
            for layer in range(self.num_pred_layer - 1):
                self.cls_branches[layer] = MODELS.build(options)

    def loss(
        self,
        hidden_states: Tensor,
        references: Sequence[Tensor],
        proposals: Mapping[str, Tensor],
        batch_data_samples: Sequence[Any],
    ) -> dict[str, Tensor]:
        """Return the weighted losses of all layers.

        Args:
            hidden_states: outputs of the decoder layers (L, B, Q, dim).
            references: L + 1 boxes (B, Q, 4): the start of each layer, and the result of the last one.
            proposals: `init_reference` (B, Q, 4), and for all N tokens of the encoder `anchors` (B, N, 4),
                `enc_logits` (B, N, C) and `enc_boxes` (B, N, 4).
            batch_data_samples: images with objects in pixels of the input.
        """
        objects = [sample.gt_instances for sample in batch_data_samples]
        metas = [sample.metainfo for sample in batch_data_samples]
        logits, boxes = self(hidden_states, references)
        return self.loss_by_feat(logits, boxes, proposals, objects, metas)

    def loss_by_feat(
        self,
        all_layers_cls_scores: Tensor,
        all_layers_bbox_preds: Tensor,
        proposals: Mapping[str, Tensor],
        batch_gt_instances: Sequence[InstanceData],
        batch_img_metas: Sequence[Mapping[str, Any]],
    ) -> dict[str, Tensor]:
        """Logits (L, B, Q, C), boxes (L, B, Q, 4), and more as in `loss` -> `[d{layer}.|enc_]loss_{cls,bbox,iou}`."""
        sizes = [_size(meta["img_shape"], all_layers_bbox_preds) for meta in batch_img_metas]
        objects = [bbox_xyxy_to_cxcywh(gt.bboxes / size) for gt, size in zip(batch_gt_instances, sizes, strict=True)]
        labels = [gt.labels for gt in batch_gt_instances]
        number = torch.tensor([sum(map(len, labels))], dtype=torch.float32, device=all_layers_cls_scores.device)
        divisor = reduce_mean(number).clamp(min=1).item()

        matches = list(map(self.assigner.assign, proposals["init_reference"], objects))
        last = len(all_layers_cls_scores) - 1
        losses = {}
        for layer, outputs in enumerate(zip(all_layers_cls_scores, all_layers_bbox_preds, strict=True)):
            values = self.loss_by_feat_single(*outputs, matches, objects, labels, sizes, divisor)
            losses.update(_named("" if layer == last else f"d{layer}.", values))

        outputs = proposals["enc_logits"], proposals["enc_boxes"]
        matches = list(map(self.proposal_assigner.assign, proposals["anchors"], objects))
        labels = [torch.zeros_like(label) for label in labels]
        values = self.loss_by_feat_single(*outputs, matches, objects, labels, sizes, divisor)
        return losses | _named("enc_", values)

    def loss_by_feat_single(
        self,
        cls_scores: Tensor,
        bbox_preds: Tensor,
        matches: Sequence[Match],
        objects: Sequence[Tensor],
        labels: Sequence[Tensor],
        sizes: Sequence[Tensor],
        divisor: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the losses of classes, of boxes and of GIoU of one layer.

        Args:
            cls_scores, bbox_preds: logits (B, N, C) and boxes (B, N, 4).
            matches, objects, labels: matches, boxes (G, 4) and classes (G,) of the objects, for each image.
            sizes: (w, h, w, h) of each image, in pixels.
            divisor: divisor of all three losses.
        """
        classes = [_class_targets(cls_scores.shape[1:], m, label) for m, label in zip(matches, labels, strict=True)]
        loss_cls = self.loss_cls(cls_scores.flatten(0, 1), torch.cat(classes), avg_factor=divisor)

        boxes = torch.cat([box[index] for box, (index, _) in zip(bbox_preds, matches, strict=True)])
        targets = torch.cat([box[index] for box, (_, index) in zip(objects, matches, strict=True)])
        loss_bbox = self.loss_bbox(boxes, targets, avg_factor=divisor)
        # in pixels: mmdet clamps areas to 1e-6, which would be a small object in an image of size 1
        size = torch.cat([size.expand(len(index), 4) for size, (index, _) in zip(sizes, matches, strict=True)])
        boxes, targets = bbox_cxcywh_to_xyxy(boxes) * size, bbox_cxcywh_to_xyxy(targets) * size
        return loss_cls, loss_bbox, self.loss_iou(boxes, targets, avg_factor=divisor)

    def _predict_by_feat_single(
        self, cls_score: Tensor, bbox_pred: Tensor, img_meta: Mapping[str, Any], rescale: bool = True
    ) -> InstanceData:
        size = img_meta["ori_shape" if rescale else "img_shape"]
        return postprocess(cls_score, bbox_pred, size=size[:2], **self.test_cfg)


def _size(shape: Sequence[int], like: Tensor) -> Tensor:
    height, width = shape[:2]
    return like.new_tensor([width, height, width, height])


def _class_targets(shape: Sequence[int], match: Match, labels: Tensor) -> Tensor:
    """(N, C) -> classes (N,): C without an object, and the class of the last object of several."""
    number, background = shape
    index, owner = match
    owners = owner.new_full((number,), -1).scatter_reduce(0, index, owner, "amax")
    targets = labels.new_full((number,), background)
    targets[owners >= 0] = labels[owners[owners >= 0]]
    return targets


def _named(prefix: str, values: Sequence[Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}loss_{name}": value for name, value in zip(("cls", "bbox", "iou"), values, strict=True)}
