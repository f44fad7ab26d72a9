# Before stage 1, to train without SAM 2.1's weights: images as clips of one frame, prompted by clicks and boxes.
#
#   command   tools/dist_train.sh projects/video_tracking/images.py 8
#   data      data/coco, or with data_prefix any set in COCO's format
#   hardware  8 GPUs, 4 images each; memory from tools/plan.py in the README
#   cost      90000 iterations of 32 images; not measured yet
#   expected  not measured yet
#
# Then: projects/video_tracking/stage1_frozen.py --cfg-options load_from=work_dirs/images/iter_90000.pth \
#           model.sam2_weights=None optim_wrapper.optimizer.lr=1e-4

_base_ = '../../configs/pe_spatial_sam2_davis.py'

data_root = 'data/coco/'
model = dict(sam2_weights=None)
train_pipeline = [
    dict(type='LoadClip', num_frames=1, max_objects=16, skip_broken=True),
    dict(type='ClipFlip', prob=0.5),
    dict(type='ClipResize', size=16 * _base_.grid),
    dict(type='PackClip'),
]
train_dataloader = dict(
    batch_size=4,
    dataset=dict(
        data_root=data_root,
        layout='images',
        data_prefix=dict(img_path='train2017', ann_path='annotations/instances_train2017.json'),
        pipeline=train_pipeline))

iterations = 90000
optim_wrapper = dict(optimizer=dict(lr=1e-4), paramwise_cfg=dict(custom_keys=dict(_delete_=True)))
param_scheduler = [
    dict(type='CosineAnnealingLR', eta_min_ratio=0.1, by_epoch=False, begin=0, end=iterations)
]
train_cfg = dict(max_iters=iterations, val_interval=30000)
default_hooks = dict(checkpoint=dict(interval=5000))
