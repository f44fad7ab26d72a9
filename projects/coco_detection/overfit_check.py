# Can the main recipe learn? pe_spatial_cascade_coco.py with the T variant from random weights, trained on eight photos
# and evaluated on the same eight.
#
#   command   python tools/train.py projects/coco_detection/overfit_check.py --data-root FOLDER_OF_COCO_TINY
#   data      the first eight images of coco_tiny's train2017 without an object below 32 x 32 pixels
#   hardware  two CPU cores
#   cost      12 minutes
#   expected  box AP50 above 0.6 on the images it was trained on; measured here: 0.978 (docs/benchmarks.md)
#
# To overfit eight images in minutes it also drops jitter, drop path, weight decay and layer decay, and uses 512 px and
# fewer samples per image.

_base_ = '../../configs/pe_spatial_cascade_coco.py'

size = (512, 512)
eight = [7, 8, 9, 13, 14, 15, 20, 21]
iterations = 400
pipeline = [
    dict(type='pe_spatial.LoadImageFromFile'),
    dict(type='LoadAnnotations', with_bbox=True, with_mask=True, poly2mask=False),
    dict(type='Resize', scale=size, keep_ratio=True, backend='pillow'),
    dict(
        type='PackDetInputs',
        meta_keys=('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor', 'instances')),
]
dataset = dict(
    indices=eight,
    ann_file='annotations/instances_train2017.json',
    data_prefix=dict(img='train2017/'),
    pipeline=pipeline)

model = dict(
    data_preprocessor=dict(pad_size_divisor=512),
    backbone=dict(variant='pe_spatial_t16_512', drop_path_rate=0.0, init_cfg=None),
    train_cfg=dict(
        rpn_proposal=dict(nms_pre=500, max_per_img=300),
        rcnn=[
            dict(stage, sampler=dict(stage.sampler, **({} if index else dict(num=64))))
            for index, stage in enumerate(_base_.model.train_cfg.rcnn)
        ]))
train_dataloader = dict(batch_size=1, num_workers=0, persistent_workers=False, dataset=dataset)
val_dataloader = dict(num_workers=0, persistent_workers=False, dataset=dataset)
test_dataloader = val_dataloader
val_evaluator = dict(ann_file=None)
test_evaluator = val_evaluator

optim_wrapper = dict(
    optimizer=dict(lr=3e-4, weight_decay=0.0),
    clip_grad=dict(max_norm=5.0),
    paramwise_cfg=dict(layer_decay_rate=1.0))
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=50),
    dict(type='CosineAnnealingLR', eta_min_ratio=0.01, by_epoch=False, begin=50, end=iterations),
]
train_cfg = dict(max_iters=iterations, val_interval=iterations)
default_hooks = dict(logger=dict(interval=50), checkpoint=dict(interval=iterations, max_keep_ckpts=1))
