"""The federated loss of LVIS, and the hook that sets its class weights."""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from mmdet.models.losses import accuracy
from mmengine.hooks import Hook
from mmengine.registry import HOOKS, MODELS
from mmengine.runner import Runner
from torch import Tensor, nn

from pe_spatial.errors import ConfigError, DatasetError


@MODELS.register_module()
class FederatedLoss(nn.Module):
    """Sigmoid cross-entropy over a few classes at each step: those present, and others sampled at random.

    For `loss_cls` of a box head, which gets C + 1 outputs; the last one, background, is not trained. The loss is summed
    over RoIs and classes and divided by the number of RoIs (detectron2@02b5c4e:detectron2/modeling/roi_heads/
    fast_rcnn.py).

    A class is sampled with a probability proportional to its entry in the buffer `class_weights` (C,), which starts as
    zeros: `SetClassWeights` fills it before training, and checkpoints contain it.

    Args:
        num_classes: C.
        num_sample_classes: least number of classes that a step trains; background counts as one if it is present.
        loss_weight: factor of the loss.
    """

    class_weights: Tensor
    custom_cls_channels = True  # mmdet's box heads read these
    custom_activation = True
    custom_accuracy = True

    def __init__(self, *, num_classes: int, num_sample_classes: int = 50, loss_weight: float = 1.0) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.num_sample_classes = num_sample_classes
        self.loss_weight = loss_weight
        self.register_buffer("class_weights", torch.zeros(num_classes))

    def get_cls_channels(self, num_classes: int) -> int:
        """Return the number of outputs of a box head; ConfigError if its number of classes differs."""
        if num_classes != self.num_classes:
            raise ConfigError(
                f"the box head has num_classes={num_classes}, its FederatedLoss num_classes={self.num_classes}; set "
                "both to the number of classes"
            )
        return num_classes + 1

    def get_activation(self, cls_score: Tensor) -> Tensor:
        """Logits -> scores in [0, 1], both (N, C + 1); the last column has no meaning."""
        return cls_score.sigmoid()

    def get_accuracy(self, cls_score: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Logits (N, C + 1) and labels (N,) -> the percentage of objects whose class scores highest."""
        objects = labels < self.num_classes
        return {"acc_classes": accuracy(cls_score[objects, :-1], labels[objects])}

    def sample_classes(self, labels: Tensor) -> Tensor:
        """Labels (N,) in [0, C], C = background -> the unique classes in [0, C] to train, present ones first."""
        present = labels.unique()
        weights = F.pad(self.class_weights, (0, 1)).index_fill(0, present, 0)
        others = min(self.num_sample_classes - len(present), int(weights.count_nonzero()))
        return present if others <= 0 else torch.cat((present, weights.multinomial(others)))

    def forward(
        self,
        cls_score: Tensor,
        labels: Tensor,
        label_weights: Tensor | None = None,
        avg_factor: float | None = None,
        reduction_override: str | None = None,
    ) -> Tensor:
        """Logits (N, C + 1), labels (N,) and their weights (N,) -> the loss, in float32.

        `avg_factor` is the divisor, N if None. Raises ConfigError while the class weights are zero.
        """
        if reduction_override is not None:
            raise ConfigError(f"FederatedLoss is a mean over RoIs; it has no reduction_override={reduction_override!r}")
        if not self.class_weights.any():
            raise ConfigError(
                "the class weights of FederatedLoss are zero, so no class can be sampled; add "
                "dict(type='SetClassWeights') to custom_hooks, or load a checkpoint that contains them"
            )
        trained = self.class_weights.new_zeros(self.num_classes + 1).index_fill(0, self.sample_classes(labels), 1)
        targets = F.one_hot(labels, self.num_classes + 1).float()
        losses = F.binary_cross_entropy_with_logits(cls_score.float(), targets, trained.float(), reduction="none")
        losses = losses[:, :-1].sum(1)
        if label_weights is not None:
            losses = losses * label_weights
        return self.loss_weight * losses.sum() / (len(labels) if avg_factor is None else avg_factor)


@HOOKS.register_module()
class SetClassWeights(Hook):
    """Set the class weights of every `FederatedLoss` to powers of the numbers of training images of the classes.

    Args:
        power: exponent; 0.5 as released (detectron2@02b5c4e:detectron2/data/detection_utils.py).
    """

    def __init__(self, *, power: float = 0.5) -> None:
        self.power = power

    def before_train(self, runner: Runner) -> None:
        """Set the weights; ConfigError if there is no such loss, DatasetError if the dataset has no image_count."""
        losses = [module for module in runner.model.modules() if isinstance(module, FederatedLoss)]
        if not losses:
            raise ConfigError("SetClassWeights found no FederatedLoss in the model; remove it from custom_hooks")
        metainfo = runner.train_dataloader.dataset.metainfo
        counts = metainfo.get("image_count") if isinstance(metainfo, Mapping) else None
        if counts is None:
            raise DatasetError(
                "the training set has no image_count (number of images of each class), which FederatedLoss needs; use "
                "CheckedLVISDataset with a file that has image_count in its categories (lvis_v1_train.json)"
            )
        for loss in losses:
            if len(counts) != loss.num_classes:
                raise ConfigError(
                    f"the training set has {len(counts)} classes but FederatedLoss num_classes={loss.num_classes}; set "
                    f"num_classes of the loss and the heads to {len(counts)}"
                )
            loss.class_weights.copy_(torch.tensor(counts, dtype=torch.float32) ** self.power)
