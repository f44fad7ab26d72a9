# Depth on the small world of this folder: DPT on the frozen encoder in the package.
#
#   command   python tools/train.py projects/multitask/depth.py
#   data      as joint.py
#   hardware  one CPU core
#   cost      4 minutes of a busy core
#   expected  RMSE 0.498 m with --deterministic on 200 images of other clips, measured here

_base_ = '../nyu_depth/synthetic_dpt.py'

data_root = 'work_dirs/multitask/world/'
train_dataloader = dict(dataset=dict(data_root=data_root))
val_dataloader = dict(dataset=dict(data_root=data_root))
test_dataloader = val_dataloader

iterations = 300
train_cfg = dict(max_iters=iterations, val_interval=iterations)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.02, by_epoch=False, begin=0, end=30),
    dict(type='CosineAnnealingLR', eta_min_ratio=0.01, by_epoch=False, begin=30, end=iterations),
]
default_hooks = dict(checkpoint=dict(interval=iterations))
