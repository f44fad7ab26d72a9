# DETA on PE as in perception_models@3e352cc:apps/detection/DETA_pe, with MMDetection's classes: the released weights
# give the released results. Another variant: model.backbone.variant. Another canvas:
# model.data_preprocessor.pad_size_divisor, and the sizes of the pipelines.

model = dict(
    type='DETA',
    num_queries=900,  # no weight depends on it; the released test-time augmentation uses 2000
    num_feature_levels=5,
    data_preprocessor=dict(
        type='CanvasPreprocessor',
        mean=[123.675, 116.28, 103.53],
        std=[58.395, 57.12, 57.375],
        bgr_to_rgb=True,
        pad_size_divisor=1824),  # zeros after normalization, to a square, in training and testing
    backbone=dict(
        type='PerceptionEncoderPyramid',
        variant='pe_spatial_g14_448',
        geometry='deta',
        drop_path_rate='vitdet',
        adapter='deta',  # strides 8, 16, 32
        grad_checkpointing=True,
        init_cfg=dict(type='Pretrained', checkpoint='released')),
    neck=dict(
        type='ChannelMapper',
        kernel_size=1,
        out_channels=256,
        act_cfg=None,
        norm_cfg=dict(type='GN', num_groups=32),
        bias=True,  # mmcv's 'auto' would leave it out before a norm
        num_outs=5),
    positional_encoding=dict(num_feats=128, normalize=True, offset=-0.5),
    encoder=dict(
        num_layers=6,
        layer_cfg=dict(
            self_attn_cfg=dict(embed_dims=256, num_heads=8, num_levels=5, dropout=0.0),
            ffn_cfg=dict(embed_dims=256, feedforward_channels=2048, ffn_drop=0.0))),
    decoder=dict(
        num_layers=6,
        return_intermediate=True,
        post_norm_cfg=None,
        layer_cfg=dict(
            self_attn_cfg=dict(embed_dims=256, num_heads=8, dropout=0.0),
            cross_attn_cfg=dict(embed_dims=256, num_heads=8, num_levels=5, dropout=0.0),
            ffn_cfg=dict(embed_dims=256, feedforward_channels=2048, ffn_drop=0.0))),
    bbox_head=dict(
        type='DETAHead',
        num_classes=80,
        embed_dims=256,
        loss_cls=dict(type='FocalLoss', use_sigmoid=True, gamma=2.0, alpha=0.25, loss_weight=1.0),
        loss_bbox=dict(type='L1Loss', loss_weight=5.0),
        loss_iou=dict(type='GIoULoss', loss_weight=2.0)),
    train_cfg=dict(
        proposal_assigner=dict(type='DETAFirstStageAssigner', pos_iou=0.7, num_positives=128, topk=4),
        assigner=dict(type='DETASecondStageAssigner', pos_iou=0.6, pos_fraction=0.25, topk=4)),
    # class_ids: COCO's numbers of the 80 classes. They part classes in the suppression, where the last digits of an IoU
    # depend on them; None for other classes. IoU threshold and candidates follow from the method.
    test_cfg=dict(
        method='nms',
        max_per_img=100,
        class_ids=[*range(1, 12), *range(13, 26), 27, 28, *range(31, 45), *range(46, 66), 67, 70, *range(72, 83),
                   *range(84, 91)]))
