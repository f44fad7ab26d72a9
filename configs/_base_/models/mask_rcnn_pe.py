# Mask R-CNN on PE as in perception_models@3e352cc:apps/detection/detectron2_pe, with MMDetection's classes: the
# released weights give the released results. Widths, depth, windows, global blocks, drop path
# and layer decay follow from the variant.

_base_ = '../pixels.py'

norm_cfg = dict(type='ChannelLayerNorm', eps=1e-6)  # over channels; mmcv's build_norm_layer would default to 1e-5
strides = [4, 8, 16, 32, 64]
model = dict(
    type='MaskRCNN',
    data_preprocessor=dict(
        type='DetDataPreprocessor',
        **_base_.detector_pixels,
        pad_mask=True,
        pad_size_divisor=1024),  # zeros after normalization, to a square, in training and testing
    backbone=dict(
        type='PerceptionEncoderPyramid',
        variant='pe_spatial_b16_512',
        geometry='vitdet',
        drop_path_rate='vitdet',
        pyramid=dict(strides=strides, out_channels=256),
        init_cfg=dict(type='Pretrained', checkpoint='released')),
    neck=None,
    rpn_head=dict(
        type='Detectron2RPNHead',
        in_channels=256,
        feat_channels=256,
        num_convs=2,
        anchor_generator=dict(type='AnchorGenerator', scales=[8], ratios=[0.5, 1.0, 2.0], strides=strides),
        bbox_coder=dict(type='Detectron2BoxCoder', target_stds=[1.0] * 4),
        loss_cls=dict(type='CrossEntropyLoss', use_sigmoid=True, loss_weight=1.0),
        loss_bbox=dict(type='L1Loss', loss_weight=1.0)),
    roi_head=dict(
        type='StandardRoIHead',
        bbox_roi_extractor=dict(
            type='Detectron2RoIExtractor',
            # torchvision's computes in float32 under autocast, on CPU too; mmcv's knows no bfloat16
            roi_layer=dict(type='RoIAlign', output_size=7, sampling_ratio=0, use_torchvision=True),
            out_channels=256,
            featmap_strides=strides[:-1]),
        bbox_head=dict(
            type='Detectron2BBoxHead',
            in_channels=256,
            conv_out_channels=256,
            fc_out_channels=1024,
            roi_feat_size=7,
            num_classes=80,
            norm_cfg=norm_cfg,
            cls_predictor_cfg=dict(type='Float32Linear'),
            reg_predictor_cfg=dict(type='Float32Linear'),
            reg_class_agnostic=False,
            bbox_coder=dict(type='Detectron2BoxCoder', target_stds=[0.1, 0.1, 0.2, 0.2]),
            loss_cls=dict(type='CrossEntropyLoss', use_sigmoid=False, loss_weight=1.0),
            loss_bbox=dict(type='L1Loss', loss_weight=1.0)),
        mask_roi_extractor=dict(
            type='Detectron2RoIExtractor',
            roi_layer=dict(type='RoIAlign', output_size=14, sampling_ratio=0, use_torchvision=True),
            out_channels=256,
            featmap_strides=strides[:-1]),
        mask_head=dict(
            type='FCNMaskHead',
            num_convs=4,
            in_channels=256,
            conv_out_channels=256,
            num_classes=80,
            norm_cfg=norm_cfg,
            loss_mask=dict(type='CrossEntropyLoss', use_mask=True, loss_weight=1.0))),
    train_cfg=dict(
        rpn=dict(
            assigner=dict(
                type='Detectron2MaxIoUAssigner',
                pos_iou_thr=0.7,
                neg_iou_thr=0.3,
                min_pos_iou=0.0,
                match_low_quality=True,
                ignore_iof_thr=-1),
            sampler=dict(
                type='RandomSampler', num=256, pos_fraction=0.5, neg_pos_ub=-1, add_gt_as_proposals=False),
            allowed_border=-1,
            pos_weight=-1,
            debug=False),
        rpn_proposal=dict(
            nms_pre=2000, max_per_img=1000, nms=dict(type='nms', iou_threshold=0.7), min_bbox_size=0),
        rcnn=dict(
            assigner=dict(
                type='MaxIoUAssigner',
                pos_iou_thr=0.5,
                neg_iou_thr=0.5,
                min_pos_iou=0.5,
                match_low_quality=False,
                ignore_iof_thr=-1),
            sampler=dict(
                type='RandomSampler', num=512, pos_fraction=0.25, neg_pos_ub=-1, add_gt_as_proposals=True),
            mask_size=28,
            pos_weight=-1,
            debug=False)),
    test_cfg=dict(
        rpn=dict(nms_pre=1000, max_per_img=1000, nms=dict(type='nms', iou_threshold=0.7), min_bbox_size=0),
        rcnn=dict(
            score_thr=0.05, nms=dict(type='nms', iou_threshold=0.5), max_per_img=100, mask_thr_binary=0.5)))
tta_model = dict(type='BoxTTA', tta_cfg=dict(nms=dict(type='nms', iou_threshold=0.5), max_per_img=100))
