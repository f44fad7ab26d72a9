# mask_rcnn_pe.py with three class-agnostic box heads at IoU 0.5, 0.6, 0.7, and MMDetection's mask head for each stage.
# A stage weighs 1/3 in the losses: the same gradient into shared layers as detectron2's cascade, which scales it by 1/3
# (the heads' own step does not depend on the weight, because AdamW is scale-invariant).

_base_ = './mask_rcnn_pe.py'

model = dict(
    type='CascadeRCNN',
    roi_head=dict(
        type='CascadeRoIHead',
        num_stages=3,
        stage_loss_weights=[1 / 3, 1 / 3, 1 / 3],
        bbox_head=[
            dict(
                type='Shared4Conv1FCBBoxHead',
                in_channels=256,
                conv_out_channels=256,
                fc_out_channels=1024,
                roi_feat_size=7,
                num_classes=80,
                norm_cfg=_base_.norm_cfg,
                cls_predictor_cfg=dict(type='Float32Linear'),
                reg_predictor_cfg=dict(type='Float32Linear'),
                reg_class_agnostic=True,
                bbox_coder=dict(
                    type='DeltaXYWHBBoxCoder',
                    target_means=[0.0] * 4,
                    target_stds=[0.1 / k, 0.1 / k, 0.2 / k, 0.2 / k]),
                loss_cls=dict(type='CrossEntropyLoss', use_sigmoid=False, loss_weight=1.0),
                loss_bbox=dict(type='L1Loss', loss_weight=1.0)) for k in (1, 2, 3)
        ]),
    train_cfg=dict(
        rcnn=[
            dict(
                assigner=dict(
                    type='MaxIoUAssigner',
                    pos_iou_thr=iou,
                    neg_iou_thr=iou,
                    min_pos_iou=iou,
                    match_low_quality=False,
                    ignore_iof_thr=-1),
                sampler=dict(
                    type='RandomSampler', num=512, pos_fraction=0.25, neg_pos_ub=-1, add_gt_as_proposals=True),
                mask_size=28,
                pos_weight=-1,
                debug=False) for iou in (0.5, 0.6, 0.7)
        ]))
