# DPT on the frozen encoder in the package, on the built-in synthetic dataset: a small version of pe_spatial_dpt_nyu.py
# without any download.
#
#   command   python tools/render_synthetic.py work_dirs/depth_world --train 400 --val 60 --size 192 192 --workers 2
#             python tools/train.py projects/nyu_depth/synthetic_dpt.py
#             python projects/nyu_depth/mean_depth.py projects/nyu_depth/synthetic_dpt.py     (the baseline)
#   data      800 images of 400 scenes, evaluated on 120 images of 60 others; depth is exact
#   hardware  two CPU cores
#   cost      60 s of CPU time for rendering, then 205 s for 200 iterations and the evaluation
#   expected  RMSE 0.471 m, measured here. Predicting the mean depth (3.025 m) gives 1.506 m, synthetic_lin1.py
#             0.577 m
#
# Small are: the encoder (projects/synthetic_pretraining; pretrained on depth too, on other scenes of this world), the
# fusion of 32 channels, 200 iterations of 4 images in bfloat16, 20 iterations of SigLoss's warm-up.

_base_ = '../../configs/pe_spatial_dpt_nyu.py'

data_root = 'work_dirs/depth_world/'
dataset = dict(_delete_=True, type='DepthPairDataset', data_root=data_root, names=('{}.jpg', '{}.png'), scale=1000)
train_dataloader = dict(
    batch_size=4,
    num_workers=0,
    persistent_workers=False,
    dataset=dict(
        **dataset,
        data_prefix=dict(img_path='train', depth_path='depth/train'),
        pipeline=[
            dict(type='pe_spatial.LoadImageFromFile'),
            dict(type='LoadDepth'),
            dict(type='DepthRandomFlip', prob=0.5),
            dict(type='PackDepthInputs'),
        ]))
val_dataloader = dict(
    batch_size=8,
    num_workers=0,
    persistent_workers=False,
    dataset=dict(
        **dataset,
        data_prefix=dict(img_path='val', depth_path='depth/val'),
        test_mode=True,
        pipeline=_base_.test_pipeline))
test_dataloader = val_dataloader
val_evaluator = dict(crop='none')
test_evaluator = val_evaluator

model = dict(
    backbone=dict(variant='pe_synthetic_xs8_192'),
    decode_head=dict(channels=32),
    losses=[dict(type='SigLoss', warm_up=20), dict(type='GradientLoss', loss_weight=0.5)])

iterations = 200
optim_wrapper = dict(type='BFloat16OptimWrapper', optimizer=dict(lr=1e-3))
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=20),
    dict(type='CosineAnnealingLR', eta_min_ratio=0.01, by_epoch=False, begin=0, end=iterations),
]
train_cfg = dict(max_iters=iterations, val_interval=iterations)
default_hooks = dict(logger=dict(interval=25), checkpoint=dict(interval=iterations))
log_processor = dict(window_size=25)
randomness = dict(seed=0)
