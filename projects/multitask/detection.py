# Boxes on the small world of this folder: a Faster R-CNN of the demo's parts on the frozen encoder in the package.
#
#   command   python tools/train.py projects/multitask/detection.py
#   data      as joint.py
#   hardware  one CPU core
#   cost      150 s of a busy core
#   expected  box AP 25.5 with --deterministic on 200 images of other clips, measured here

_base_ = '../coco_detection/synthetic_layers.py'

data_root = 'work_dirs/multitask/world/'
size = 128
pipeline = [
    dict(type='pe_spatial.LoadImageFromFile'),
    dict(type='LoadAnnotations', with_bbox=True),
    dict(type='RandomFlip', prob=0.5),
    dict(type='PackDetInputs'),
]
test_pipeline = [
    dict(type='pe_spatial.LoadImageFromFile'),
    dict(type='Resize', scale=(size, size), keep_ratio=True),
    dict(type='LoadAnnotations', with_bbox=True),
    dict(type='PackDetInputs', meta_keys=('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor')),
]
model = dict(
    type='FasterRCNN',
    data_preprocessor=dict(pad_mask=False, pad_size_divisor=size),
    rpn_head=dict(anchor_generator=dict(scales=[4])),
    roi_head=dict(mask_roi_extractor=None, mask_head=None))
train_dataloader = dict(batch_size=4, dataset=dict(data_root=data_root, pipeline=pipeline))
val_dataloader = dict(dataset=dict(data_root=data_root, pipeline=test_pipeline))
test_dataloader = val_dataloader
val_evaluator = dict(ann_file=data_root + 'annotations/instances_val.json', metric='bbox')
test_evaluator = val_evaluator

iterations = 300
train_cfg = dict(max_iters=iterations, val_interval=iterations)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.02, by_epoch=False, begin=0, end=30),
    dict(type='CosineAnnealingLR', eta_min_ratio=0.01, by_epoch=False, begin=30, end=iterations),
]
default_hooks = dict(checkpoint=dict(interval=iterations))
