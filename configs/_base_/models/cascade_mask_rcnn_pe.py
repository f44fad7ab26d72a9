# mask_rcnn_pe.py with three class-agnostic box heads at IoU 0.5, 0.6, 0.7 and one mask head on the final boxes: the
# cascade of detectron2@02b5c4e, which ViTDet uses. MMDetection's cascade weighs the stages 1, 1/2, 1/4, averages logits
# instead of probabilities, samples boxes at each stage, and trains three mask heads.

_base_ = './mask_rcnn_pe.py'

model = dict(
    type='CascadeRCNN',
    roi_head=dict(
        type='Detectron2CascadeRoIHead',
        num_stages=3,
        stage_loss_weights=[1.0, 1.0, 1.0],
        bbox_head=[
            dict(
                type='Detectron2BBoxHead',
                in_channels=256,
                conv_out_channels=256,
                fc_out_channels=1024,
                roi_feat_size=7,
                num_classes=80,
                norm_cfg=_base_.norm_cfg,
                cls_predictor_cfg=dict(type='Float32Linear'),
                reg_predictor_cfg=dict(type='Float32Linear'),
                reg_class_agnostic=True,
                bbox_coder=dict(type='Detectron2BoxCoder', target_stds=[0.1 / k, 0.1 / k, 0.2 / k, 0.2 / k]),
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
                sampler=sampler,
                mask_size=28,
                pos_weight=-1,
                debug=False) for iou, sampler in (
                    (0.5, _base_.model.train_cfg.rcnn.sampler),
                    (0.6, dict(type='PseudoSampler')),
                    (0.7, dict(type='PseudoSampler')),
                )
        ]))
