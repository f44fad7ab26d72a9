# Stage 1 of 2: SAM 2 on the frozen PE-Spatial-B, trained on DAVIS, MOSE and YouTube-VOS together.
#
#   command   tools/dist_train.sh projects/video_tracking/stage1_frozen.py 8
#   data      data/davis, data/mose/train, data/youtube-vos/train in their own layouts (JPEGImages, Annotations)
#   hardware  8 GPUs, one clip of 8 frames each; memory from tools/plan.py in the README
#   cost      20000 iterations of 8 clips; not measured yet
#   expected  not measured yet
#
# Another size: --cfg-options model.tracker.variant=pe_spatial_l14_448. DAVIS is repeated five times, because it has 60
# videos, MOSE 1507 and YouTube-VOS 3471.

_base_ = '../../configs/pe_spatial_sam2_davis.py'

train_pipeline = _base_.train_pipeline
train_dataloader = dict(
    dataset=dict(
        _delete_=True,
        type='ConcatDataset',
        datasets=[
            dict(
                type='RepeatDataset',
                times=5,
                dataset=dict(
                    type='VideoClipDataset', data_root='data/davis/', layout='davis', pipeline=train_pipeline)),
            dict(type='VideoClipDataset', data_root='data/mose/', layout='mose', pipeline=train_pipeline),
            dict(
                type='VideoClipDataset',
                data_root='data/youtube-vos/',
                layout='youtube-vos',
                pipeline=train_pipeline),
        ]))

iterations = 20000
param_scheduler = [
    dict(type='CosineAnnealingLR', eta_min_ratio=0.1, by_epoch=False, begin=0, end=iterations)
]
train_cfg = dict(max_iters=iterations, val_interval=5000)
default_hooks = dict(checkpoint=dict(interval=2500))
