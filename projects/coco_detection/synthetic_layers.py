# Which layer of the encoder in the package is best for detection on the built-in synthetic dataset: a small version of
# configs/pe_spatial_layers_detection.py, a Mask R-CNN of pe_demo_cascade_synthetic.py's parts.
#
#   command   python tools/render_synthetic.py work_dirs/demo/world --train 400 --val 60 --size 192 192 --workers 2
#             python tools/sweep_layers.py projects/coco_detection/synthetic_layers.py --layers all
#             python tools/train.py projects/coco_detection/synthetic_layers.py --no-augmentation \
#                 --cfg-options "model.backbone.out_indices=[3]" model.backbone.frozen_stages=4    (one layer alone)
#   data      as rendered, or that of make demo
#   hardware  two CPU cores
#   cost      5 layers with --limit 200 --epochs 2: 3 minutes of one core
#   expected  then box AP 21.2 on layer 4, 4.6 on layer 0

_base_ = '../../configs/pe_demo_cascade_synthetic.py'

iterations = 100
head = _base_.model.roi_head
model = dict(
    type='MaskRCNN',
    backbone=dict(drop_path_rate=0.0, frozen_stages=5),
    roi_head=dict(
        _delete_=True,
        type='StandardRoIHead',
        bbox_roi_extractor=head.bbox_roi_extractor,
        bbox_head=head.bbox_head[0],
        mask_roi_extractor=head.mask_roi_extractor,
        mask_head=head.mask_head),
    train_cfg=dict(rcnn=dict(_delete_=True, **_base_.model.train_cfg.rcnn[0])))
train_dataloader = dict(batch_size=4)
optim_wrapper = dict(
    _delete_=True,
    type='OptimWrapper',
    optimizer=dict(type='AdamW', lr=1e-3, weight_decay=0.05, betas=(0.9, 0.99)),
    clip_grad=dict(max_norm=1.0))
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=20),
    dict(type='CosineAnnealingLR', eta_min_ratio=0.01, by_epoch=False, begin=20, end=iterations),
]
train_cfg = dict(max_iters=iterations, val_interval=iterations)
default_hooks = dict(checkpoint=dict(interval=iterations))
