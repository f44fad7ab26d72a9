# Cascade Mask R-CNN on the built-in synthetic dataset: a small version of pe_spatial_cascade_coco.py.
#
#   command   make demo        (or python tools/demo.py, which renders the world and runs this config)
#   hardware  two CPU cores, no GPU, about 2 GB of memory
#   cost      6 minutes after set-up
#   expected  box AP 0.51, mask AP 0.51 on 120 images of unseen scenes (measured here, docs/benchmarks.md)
#
# Small are: images of 192 px, patches of 8 px, an encoder of five blocks pretrained on other scenes of the same world
# (projects/synthetic_pretraining), pyramid and heads of 64 and 128 channels, few proposals.

_base_ = ['_base_/pixels.py', '_base_/detection_runtime.py']

classes = ('sphere', 'box', 'cylinder', 'cone', 'torus')
size = 192
strides = (4, 8, 16, 32)
width = 64

model = dict(
    type='CascadeRCNN',
    data_preprocessor=dict(
        type='DetDataPreprocessor',
        **_base_.encoder_pixels,
        pad_mask=True,
        pad_size_divisor=size),
    backbone=dict(
        type='PerceptionEncoderPyramid',
        variant='pe_synthetic_xs8_192',
        geometry='release',
        drop_path_rate=0.05,
        pyramid=dict(strides=strides, out_channels=width),
        init_cfg=dict(type='Pretrained', checkpoint='released')),
    rpn_head=dict(
        type='Detectron2RPNHead',
        in_channels=width,
        feat_channels=width,
        anchor_generator=dict(type='AnchorGenerator', scales=[8], ratios=[0.5, 1.0, 2.0], strides=strides),
        bbox_coder=dict(type='DeltaXYWHBBoxCoder'),
        loss_cls=dict(type='CrossEntropyLoss', use_sigmoid=True, loss_weight=1.0),
        loss_bbox=dict(type='L1Loss', loss_weight=1.0)),
    roi_head=dict(
        type='CascadeRoIHead',
        num_stages=3,
        stage_loss_weights=[1, 0.5, 0.25],
        bbox_roi_extractor=dict(
            type='SingleRoIExtractor',
            roi_layer=dict(type='RoIAlign', output_size=7, sampling_ratio=2, use_torchvision=True),
            out_channels=width,
            featmap_strides=strides,
            finest_scale=24),
        bbox_head=[
            dict(
                type='Shared2FCBBoxHead',
                in_channels=width,
                fc_out_channels=128,
                roi_feat_size=7,
                num_classes=len(classes),
                reg_class_agnostic=True,
                cls_predictor_cfg=dict(type='Float32Linear'),
                reg_predictor_cfg=dict(type='Float32Linear'),
                bbox_coder=dict(
                    type='DeltaXYWHBBoxCoder',
                    target_means=[0.0] * 4,
                    target_stds=[0.1 / k, 0.1 / k, 0.2 / k, 0.2 / k]),
                loss_cls=dict(type='CrossEntropyLoss', loss_weight=1.0),
                loss_bbox=dict(type='L1Loss', loss_weight=1.0)) for k in (1, 2, 3)
        ],
        mask_roi_extractor=dict(
            type='SingleRoIExtractor',
            roi_layer=dict(type='RoIAlign', output_size=14, sampling_ratio=2, use_torchvision=True),
            out_channels=width,
            featmap_strides=strides,
            finest_scale=24),
        mask_head=dict(
            type='FCNMaskHead',
            num_convs=2,
            in_channels=width,
            conv_out_channels=width,
            num_classes=len(classes),
            loss_mask=dict(type='CrossEntropyLoss', use_mask=True, loss_weight=1.0))),
    train_cfg=dict(
        rpn=dict(
            assigner=dict(
                type='MaxIoUAssigner', pos_iou_thr=0.7, neg_iou_thr=0.3, min_pos_iou=0.3, match_low_quality=True),
            sampler=dict(type='RandomSampler', num=64, pos_fraction=0.5, add_gt_as_proposals=False),
            allowed_border=-1,
            pos_weight=-1),
        rpn_proposal=dict(nms_pre=200, max_per_img=100, nms=dict(type='nms', iou_threshold=0.7), min_bbox_size=0),
        rcnn=[
            dict(
                assigner=dict(
                    type='MaxIoUAssigner', pos_iou_thr=iou, neg_iou_thr=iou, min_pos_iou=iou, match_low_quality=False),
                sampler=dict(type='RandomSampler', num=32, pos_fraction=0.25, add_gt_as_proposals=True),
                mask_size=28,
                pos_weight=-1) for iou in (0.5, 0.6, 0.7)
        ]),
    test_cfg=dict(
        rpn=dict(nms_pre=200, max_per_img=100, nms=dict(type='nms', iou_threshold=0.7), min_bbox_size=0),
        rcnn=dict(score_thr=0.05, nms=dict(type='nms', iou_threshold=0.5), max_per_img=30, mask_thr_binary=0.5)))

data_root = 'work_dirs/demo/world/'
dataset = dict(type='CheckedCocoDataset', data_root=data_root, metainfo=dict(classes=classes))
train_dataloader = dict(
    batch_size=8,
    num_workers=0,
    sampler=dict(type='InfiniteSampler', shuffle=True),
    dataset=dict(
        **dataset,
        ann_file='annotations/instances_train.json',
        data_prefix=dict(img='train/'),
        pipeline=[
            dict(type='pe_spatial.LoadImageFromFile'),
            dict(type='LoadAnnotations', with_bbox=True, with_mask=True),
            dict(type='Resize', scale=(size, size), keep_ratio=True),
            dict(type='RandomFlip', prob=0.5),
            dict(type='PhotoMetricDistortion'),
            dict(type='PackDetInputs'),
        ]))
val_dataloader = dict(
    batch_size=8,
    num_workers=0,
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(
        **dataset,
        ann_file='annotations/instances_val.json',
        data_prefix=dict(img='val/'),
        test_mode=True,
        pipeline=[
            dict(type='pe_spatial.LoadImageFromFile'),
            dict(type='Resize', scale=(size, size), keep_ratio=True),
            dict(type='LoadAnnotations', with_bbox=True, with_mask=True),  # in pixels of the original, as results are
            dict(
                type='PackDetInputs', meta_keys=('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor')),
        ]))
test_dataloader = val_dataloader
val_evaluator = dict(
    type='CheckedCocoMetric', ann_file=data_root + 'annotations/instances_val.json', metric=['bbox', 'segm'])
test_evaluator = val_evaluator

iterations = 350
train_cfg = dict(type='IterBasedTrainLoop', max_iters=iterations, val_interval=iterations)
val_cfg = dict(type='ValLoop')
test_cfg = dict(type='TestLoop')
optim_wrapper = dict(
    type='BFloat16OptimWrapper',
    optimizer=dict(type='AdamW', lr=1e-3, weight_decay=0.05, betas=(0.9, 0.99)),
    clip_grad=dict(max_norm=1.0),
    constructor='LayerDecayOptimWrapperConstructor',
    paramwise_cfg=dict(layer_decay_rate=0.7, decay_norm_bias=False))
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=30),
    dict(type='CosineAnnealingLR', eta_min_ratio=0.01, by_epoch=False, begin=30, end=iterations),
]
default_hooks = dict(
    logger=dict(interval=25), checkpoint=dict(interval=iterations, max_keep_ckpts=1))
log_processor = dict(window_size=25)
randomness = dict(seed=0)
