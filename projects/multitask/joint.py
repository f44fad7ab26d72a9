# Boxes, depth and tracks by heads that train together on the frozen encoder in the package: a small version of
# pe_spatial_multitask.py. The tasks alone are detection.py, depth.py and tracking.py beside it.
#
#   command   python tools/render_synthetic.py work_dirs/multitask/world --train 200 --val 25 --test 40 --frames 8 \
#                 --duration 2 --size 128 128
#             python tools/train.py projects/multitask/joint.py --deterministic
#             python tools/test.py projects/multitask/depth.py work_dirs/joint/depth.pth      (and the other two)
#   data      1600 images of 200 clips of 128 px; evaluated on 25 other clips
#   hardware  one CPU core
#   cost      1 minute for rendering, 16 minutes of a busy core for 300 steps
#   expected  box AP 25.5, RMSE 0.498 m, J&F 77.1, and the weights of the tasks alone, measured here (docs/multitask.md)

_base_ = '../../configs/pe_spatial_multitask.py'

variant = 'pe_synthetic_xs8_192'
tasks = dict(
    _delete_=True,
    detection=dict(config='projects/multitask/detection.py'),
    depth=dict(config='projects/multitask/depth.py'),
    tracking=dict(config='projects/multitask/tracking.py'))
model = dict(tasks=tasks)
train_dataloader = dict(num_workers=0, persistent_workers=False, dataset=dict(tasks=tasks))

iterations = 300
train_cfg = dict(max_iters=iterations, val_interval=iterations + 1)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.02, by_epoch=False, begin=0, end=30),
    dict(type='CosineAnnealingLR', eta_min_ratio=0.01, by_epoch=False, begin=30, end=iterations),
]
default_hooks = dict(logger=dict(interval=25), checkpoint=dict(interval=iterations))
