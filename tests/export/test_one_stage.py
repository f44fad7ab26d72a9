"""One-stage detectors and DETRs as graphs: one to one what MMDetection predicts, at every size and batch."""

import numpy as np
import pytest
import torch

pytest.importorskip("mmdet")
pytest.importorskip("onnxscript")
from helpers.encoders import TINY
from helpers.exported import EagerSession, predicted
from mmdet.models.dense_heads import PAAHead
from mmengine.config import ConfigDict
from mmengine.registry import MODELS, DefaultScope

import pe_spatial.engine  # noqa: F401  (registers)
from pe_spatial.errors import ConfigError
from pe_spatial.export.detector import exportable_of, graph_of, pixels_of
from pe_spatial.export.graph import export
from pe_spatial.runtime.compare import LIMITS, match, problems, worst
from pe_spatial.runtime.manifest import read_manifest
from pe_spatial.runtime.sessions import open_session
from pe_spatial.runtime.verify import objects

pytestmark = pytest.mark.mmdet
STRIDES, WIDTH = (8, 16, 32), 32
ANCHORS = dict(type="AnchorGenerator", strides=STRIDES, octave_base_scale=4, scales_per_octave=2, ratios=(0.5, 1.0))
SQUARES = dict(ANCHORS, scales_per_octave=1, ratios=(1.0,))
POINTS = dict(strides=STRIDES, regress_ranges=((-1, 64), (64, 128), (128, 1e8)))
DELTAS = dict(type="DeltaXYWHBBoxCoder", target_stds=(0.1, 0.1, 0.2, 0.2))
DISTANCES = dict(type="DistancePointBBoxCoder")
QUALITY = dict(type="QualityFocalLoss", use_sigmoid=True)
# fmt: off
HEADS = {
    "RetinaNet": dict(type="RetinaHead", anchor_generator=ANCHORS),
    "FCOS": dict(type="FCOSHead", norm_on_bbox=True, norm_cfg=None, **POINTS),
    "ATSS": dict(type="ATSSHead", anchor_generator=SQUARES, bbox_coder=DELTAS, norm_cfg=dict(type="BN")),
    "GFL": dict(type="GFLHead", anchor_generator=SQUARES, loss_cls=QUALITY, norm_cfg=dict(type="BN")),
    "TOOD": dict(type="TOODHead", anchor_generator=SQUARES, bbox_coder=DISTANCES, loss_cls=QUALITY, num_dcn=1,
                 anchor_type="anchor_free", norm_cfg=dict(type="BN")),
    "PAA": dict(type="PAAHead", anchor_generator=SQUARES, bbox_coder=DELTAS, norm_cfg=dict(type="BN")),
    "FOVEA": dict(type="FoveaHead", strides=STRIDES, base_edge_list=(16, 32, 64), norm_cfg=None,
                  scale_ranges=((8, 32), (16, 64), (32, 128)), loss_cls=dict(type="FocalLoss", use_sigmoid=True)),
    "YOLOX": dict(type="YOLOXHead", strides=STRIDES),
}
# fmt: on
TRANSFORMERS = {"DETR": {}, "DeformableDETR": {}, "DINO": dict(with_box_refine=True, as_two_stage=True)}
SIZES = ((1, 70, 100), (3, 128, 96))


def transformer(name, options):
    """Return the config of a small DETR."""
    part = dict(embed_dims=WIDTH, num_heads=2, dropout=0.0, batch_first=True)
    sampled = part if name == "DETR" else dict(embed_dims=WIDTH, num_heads=2, num_levels=3, batch_first=True)
    layer = dict(self_attn_cfg=part, ffn_cfg=dict(embed_dims=WIDTH, feedforward_channels=48))
    levels = {} if name == "DETR" else dict(num_feature_levels=3)
    loss = {} if name == "DETR" else dict(loss_cls=dict(type="FocalLoss", use_sigmoid=True))
    return dict(
        type=name, num_queries=20, positional_encoding=dict(num_feats=WIDTH // 2, normalize=True),
        encoder=dict(num_layers=1, layer_cfg=dict(layer, self_attn_cfg=sampled)),
        decoder=dict(num_layers=2, return_intermediate=True, post_norm_cfg=dict(type="LN") if name == "DETR" else None,
                     layer_cfg=dict(layer, cross_attn_cfg=sampled)),
        bbox_head=dict(type=f"{name}Head", num_classes=5, embed_dims=WIDTH, **loss),
        test_cfg=dict(max_per_img=15), **levels, **options,
        **(dict(dn_cfg=dict(label_noise_scale=0.5, box_noise_scale=1.0)) if name == "DINO" else {}),
    )  # fmt: skip


def one_stage(name):
    """Return the config of a small detector, whose head has few classes and many candidates."""
    head = dict(HEADS[name], num_classes=5, in_channels=WIDTH, feat_channels=WIDTH, stacked_convs=2)
    test = dict(nms_pre=60, min_bbox_size=0, score_thr=0.3, nms=dict(type="nms", iou_threshold=0.6), max_per_img=30)
    return dict(type=name, bbox_head=head, test_cfg=test)


def detector(name):
    """Return a detector whose scores and boxes differ."""
    model = transformer(name, TRANSFORMERS[name]) if name in TRANSFORMERS else one_stage(name)
    pyramid = dict(out_channels=16, strides=STRIDES)
    model["backbone"] = dict(type="PerceptionEncoderPyramid", variant=vars(TINY), geometry="release", pyramid=pyramid)
    model["neck"] = dict(type="ChannelMapper", in_channels=[16] * 3, out_channels=WIDTH)
    model["data_preprocessor"] = dict(type="DetDataPreprocessor", mean=[120.0] * 3, std=[60.0] * 3, bgr_to_rgb=True,
                                      pad_size_divisor=32)  # fmt: skip
    with DefaultScope.overwrite_default_scope("mmdet"):
        torch.manual_seed(0)
        model = MODELS.build(ConfigDict(model)).eval()
    for key, weight in model.named_parameters():
        if weight.ndim > 1 and not key.startswith("backbone"):
            torch.nn.init.normal_(weight, std=weight[0].numel() ** -0.5)
    return model


def pixels(*shape):
    """Return images that are coarse and fine."""
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 200, (shape[0], 16, 16, 3)).repeat(8, 1).repeat(8, 2)[:, : shape[1], : shape[2]]
    return (coarse + rng.integers(0, 56, coarse.shape)).astype(np.uint8)


def compared(session, model):
    """Return how far the detections of a session are from MMDetection's."""
    found = []
    for shape in SIZES:
        images = pixels(*shape)
        if isinstance(model.bbox_head, PAAHead):  # whose boxes in the padding are NaN in MMDetection
            images = images.repeat(2, 1).repeat(2, 2)[:, :128, :128]
        values = session.run({"pixels": images})
        values = {name: values[name] for name in ("boxes", "scores", "labels", "valid")}
        for i, theirs in enumerate(predicted(model, images)):
            found.append(match(objects({name: value[i] for name, value in values.items()}), theirs))
    return worst(found)


def graph(model):
    return exportable_of(graph_of(model, pixels_of(model.data_preprocessor, [])[0]))


@pytest.mark.parametrize("name", [*HEADS, *TRANSFORMERS])
def test_graph_predicts_what_the_detector_does(name):
    model = detector(name)
    found = compared(EagerSession(graph(model)), model)
    assert found["theirs"] > 20
    assert problems({}, found, LIMITS["fp32"]) == []


@pytest.mark.parametrize("name", ["ATSS", "PAA"])
def test_another_threshold_of_nms_is_another_result(name):
    model = detector(name)
    exportable = graph(model)
    exportable.module.model.bbox_head.test_cfg.nms.iou_threshold = 0.65
    assert problems({}, compared(EagerSession(exportable), model), LIMITS["fp32"])


@pytest.mark.long
@pytest.mark.parametrize("name", [*HEADS, *TRANSFORMERS])
def test_onnx_runtime_predicts_what_the_detector_does(tmp_path, name):
    model = detector(name)
    export(graph(model), tmp_path / "out")
    found = compared(open_session(tmp_path / "out", read_manifest(tmp_path / "out")), model)
    assert problems({}, found, LIMITS["fp32"]) == []


def test_what_a_graph_does_not_write_is_named():
    model = detector("FCOS")
    model.bbox_head.test_cfg.nms.type = "soft_nms"
    with pytest.raises(ConfigError, match=r"test_cfg.nms is 'soft_nms'; 'nms' is exported"):
        graph(model)
    model.bbox_head.test_cfg.update(nms=dict(type="nms", iou_threshold=0.5), nms_pre=-1)
    with pytest.raises(ConfigError, match="nms_pre is -1; give a number"):
        graph(model)

    class Other(type(model.bbox_head)):
        def _predict_by_feat_single(self):
            raise NotImplementedError

    model.bbox_head.__class__ = Other
    with pytest.raises(ConfigError, match="Other selects its results by a method of its own"):
        graph(model)
    del model.bbox_head
    with pytest.raises(ConfigError, match="a FCOS is not exported; detectors with a bbox_head"):
        graph(model)
