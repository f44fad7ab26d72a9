"""Losses and gradients with 4 x 2 images are those of 8 images, for four families; averaging 4 losses is not."""

import copy

import numpy as np
import pytest
import torch
from helpers.tiny_deta import tiny_deta
from torch.testing import assert_close

pytest.importorskip("mmdet")
from helpers.repository import CONFIGS
from mmdet.structures import DetDataSample
from mmdet.structures.mask import BitmapMasks
from mmengine.config import Config
from mmengine.hub import get_config
from mmengine.registry import MODELS, init_default_scope
from mmengine.structures import InstanceData

import pe_spatial.detection
import pe_spatial.integrations.openmmlab  # noqa: F401  (registers)

pytestmark = pytest.mark.mmdet
SIDE, IMAGES, CLASSES, WIDTH = 64, 8, 3, 32
OBJECTS = (4, 0, 1, 1, 3, 0, 0, 2)
VARIANT = dict(img_size=SIDE, patch_size=16, embed_dim=32, depth=2, num_heads=2)


def backbone(strides, widths, **options):
    return dict(
        type="PerceptionEncoderPyramid", variant=VARIANT, pyramid=dict(strides=strides, out_channels=widths), **options
    )


def cascade():
    model = Config.fromfile(CONFIGS / "_base_" / "models" / "cascade_mask_rcnn_pe.py").model
    model.data_preprocessor.pad_size_divisor = SIDE
    model.backbone.update(variant=VARIANT, geometry="release", drop_path_rate=0.0, init_cfg=None)
    model.backbone.pyramid.out_channels = WIDTH
    model.rpn_head.update(in_channels=WIDTH, feat_channels=WIDTH)
    head = model.roi_head
    head.bbox_roi_extractor.out_channels = head.mask_roi_extractor.out_channels = WIDTH
    for box_head in head.bbox_head:
        box_head.update(in_channels=WIDTH, conv_out_channels=WIDTH, fc_out_channels=32, num_classes=CLASSES)
    head.mask_head.update(in_channels=WIDTH, conv_out_channels=WIDTH, num_classes=CLASSES)
    for stage in model.train_cfg.rcnn:
        stage.sampler.num = 64
    return model


def deta():
    return tiny_deta().model


def atss():
    model = get_config("mmdet::atss/atss_r50_fpn_1x_coco.py").model
    model.backbone = backbone((8, 16, 32), WIDTH)
    model.neck.update(in_channels=[WIDTH] * 3, start_level=0, out_channels=WIDTH)
    model.bbox_head.update(in_channels=WIDTH, feat_channels=WIDTH, num_classes=CLASSES, stacked_convs=1)
    return model


def detr():
    model = get_config("mmdet::detr/detr_r50_8xb2-150e_coco.py").model
    model.backbone = backbone((32,), WIDTH)
    model.neck.update(in_channels=[WIDTH], out_channels=WIDTH)
    model.num_queries = 12
    model.positional_encoding.num_feats = WIDTH // 2
    for name in ("encoder", "decoder"):
        layer = model[name].layer_cfg
        model[name].num_layers = 2
        for attention in ("self_attn_cfg", "cross_attn_cfg"):
            if attention in layer:
                layer[attention].update(embed_dims=WIDTH, num_heads=2)
        layer.ffn_cfg.update(embed_dims=WIDTH, feedforward_channels=WIDTH)
    model.bbox_head.update(embed_dims=WIDTH, num_classes=CLASSES)
    return model


def sample(index):
    """Return `OBJECTS[index]` squares with their masks."""
    corners = [(4 + 30 * (i % 2), 4 + 30 * (i // 2)) for i in range(OBJECTS[index])]
    masks = np.zeros((len(corners), SIDE, SIDE), np.uint8)
    for mask, (x, y) in zip(masks, corners, strict=True):
        mask[y : y + 24, x + index : x + 24] = 1
    found = DetDataSample()
    found.gt_instances = InstanceData(
        bboxes=torch.tensor([[x + index, y, x + 24, y + 24] for x, y in corners], dtype=torch.float32).reshape(-1, 4),
        labels=torch.arange(len(corners)) % CLASSES,
        masks=BitmapMasks(masks, SIDE, SIDE),
    )
    shape = (SIDE, SIDE)
    found.set_metainfo(dict(img_id=index, img_shape=shape, ori_shape=shape, scale_factor=(1, 1)))
    return found


def step(model, batches):
    """Return the mean of the losses of `batches` (first and last index), and its gradients."""
    generator = torch.Generator().manual_seed(0)
    images = [torch.randint(256, (3, SIDE, SIDE), generator=generator, dtype=torch.uint8) for _ in range(IMAGES)]
    torch.manual_seed(1)
    np.random.seed(1)  # samplers shuffle by either
    losses = []
    for first, last in batches:
        data = dict(inputs=images[first:last], data_samples=[sample(i) for i in range(first, last)])
        found = model(**model.data_preprocessor(data, True), mode="loss")
        loss, logged = model.parse_losses(found)
        (loss / len(batches)).backward()
        losses.append({name: value.detach() for name, value in logged.items()})
    mean = {name: sum(x[name] for x in losses) / len(losses) for name in losses[0]}
    return mean, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def deviation(grads, expected):
    """Return the largest difference of the gradient of a parameter, relative to the norm of that gradient."""
    scale = 1e-3 * max(x.norm() for x in expected.values())  # what is zero but for rounding
    return max(float((grads[name] - x).norm() / max(x.norm(), scale)) for name, x in expected.items())


@pytest.mark.parametrize("family", [cascade, deta, atss, detr])
def test_four_times_two_images_equal_eight(family):
    init_default_scope("mmdet")
    cfg = family()

    def build(size):
        torch.manual_seed(0)
        model = MODELS.build(copy.deepcopy(dict(cfg, backbone=dict(cfg.backbone, micro_batch=size))))
        model.init_weights()
        return model.train()

    losses, grads = step(build(None), [(0, IMAGES)])
    losses_of_parts, grads_of_parts = step(build(2), [(0, IMAGES)])
    assert_close(losses_of_parts, losses, rtol=1e-5, atol=0)
    assert grads.keys() == grads_of_parts.keys()
    assert deviation(grads_of_parts, grads) < 1e-5

    averaged, grads_of_averages = step(build(None), [(i, i + 2) for i in range(0, IMAGES, 2)])
    assert abs(averaged["loss"] / losses["loss"] - 1) > 1e-4
    assert deviation(grads_of_averages, grads) > 0.1
