# Does the schedule for small data learn from a few images? The demo's small Cascade Mask R-CNN on own data, at 320 px.
#
#   command   python tools/train.py projects/coco_detection/own_data_check.py --data ../shared/data/detection/nuts \
#                 --iterations 100 --seed 0
#             the same with --cfg-options model.backbone.init_cfg=None: from random weights
#   data      any dataset that --data reads; nuts has 8 + 4 images of 3 classes
#   hardware  two CPU cores
#   cost      10 minutes beside other jobs
#   expected  box AP50 0.66 on the 4 validation images, 0.28 from random weights (docs/benchmarks.md)

_base_ = '../../configs/pe_demo_cascade_synthetic.py'

size = (320, 320)
iterations = 200

model = dict(data_preprocessor=dict(pad_size_divisor=320), backbone=dict(drop_path_rate=0.0))
pipeline = [
    dict(type='pe_spatial.LoadImageFromFile'),
    dict(type='LoadAnnotations', with_bbox=True, with_mask=True),
    dict(type='RandomResize', scale=size, ratio_range=(0.75, 1.5), resize_type='Resize', keep_ratio=True),
    dict(type='RandomCrop', crop_type='absolute', crop_size=size, recompute_bbox=True, allow_negative_crop=True),
    dict(type='FilterAnnotations', min_gt_bbox_wh=(4, 4), keep_empty=False),
    dict(type='RandomFlip', prob=0.5),
    dict(type='PhotoMetricDistortion'),
    dict(type='PackDetInputs'),
]
test_pipeline = [
    dict(type='pe_spatial.LoadImageFromFile'),
    dict(type='Resize', scale=size, keep_ratio=True),
    dict(type='LoadAnnotations', with_bbox=True, with_mask=True),
    dict(type='PackDetInputs', meta_keys=('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor')),
]
train_dataloader = dict(batch_size=4, dataset=dict(pipeline=pipeline))
val_dataloader = dict(batch_size=4, dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader

train_cfg = dict(max_iters=iterations, val_interval=50)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=20),
    dict(type='CosineAnnealingLR', eta_min_ratio=0.01, by_epoch=False, begin=20, end=iterations),
]
default_hooks = dict(checkpoint=dict(interval=50))
