# Tracks on the small world of this folder: SAM 2's tracker on the frozen encoder in the package, prompted by masks.
#
#   command   python tools/train.py projects/multitask/tracking.py
#   data      as joint.py
#   hardware  one CPU core
#   cost      9 minutes of a busy core
#   expected  J&F 77.1 with --deterministic on 25 other clips, measured here

_base_ = '../video_tracking/synthetic.py'

data_root = 'work_dirs/multitask/world/'
grid = 16
model = dict(
    tracker=dict(grid=grid, true_stride=True, layers=1),
    prompting=dict(clicks=0.0, prompted_frames=1, corrected_frames=1))
train_dataloader = dict(
    batch_size=2,
    num_workers=0,
    persistent_workers=False,
    dataset=dict(
        data_root=data_root,
        pipeline=[
            dict(type='LoadClip', num_frames=3, max_objects=3),
            dict(type='ClipFlip', prob=0.5),
            dict(type='ClipResize', size=128),
            dict(type='PackClip'),
        ]))
val_dataloader = dict(dataset=dict(data_root=data_root))
test_dataloader = val_dataloader
val_evaluator = dict(ann_dir=data_root + 'instances/val')
test_evaluator = val_evaluator

iterations = 300
train_cfg = dict(max_iters=iterations, val_interval=iterations)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.02, by_epoch=False, begin=0, end=30),
    dict(type='CosineAnnealingLR', eta_min_ratio=0.01, by_epoch=False, begin=30, end=iterations),
]
default_hooks = dict(logger=dict(interval=25), checkpoint=dict(interval=iterations))
