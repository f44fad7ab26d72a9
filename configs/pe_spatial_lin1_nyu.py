# Linear depth probe of one frozen layer of PE-Spatial on NYUv2, with DINOv3's protocol: batch norm, one linear map.
#
#   command   torchrun --nproc_per_node 8 tools/train.py configs/pe_spatial_lin1_nyu.py --launcher pytorch
#             python tools/train.py configs/pe_spatial_lin1_nyu.py --cfg-options train_dataloader.batch_size=16
#             python tools/test.py configs/pe_spatial_lin1_nyu.py work_dirs/pe_spatial_lin1_nyu/iter_38400.pth
#   data      data/nyu (projects/nyu_depth/README.md), or --data-root FOLDER
#   hardware  8 GPUs with 2 images each, or one with 16; memory not measured yet
#   cost      38400 iterations of 16 images, without gradients in the encoder; not measured yet
#   expected  not measured yet. RMSE in meters on the 654 test images with this protocol and the last layer, by DINOv3's
#             authors (Tab. 3, 14): PE-Spatial-G 0.362; PE-Core-G 0.590, L 0.650, B 0.641; DINOv3-L 0.352, B 0.373,
#             S 0.403; DINOv2-g 0.372. Results for PE-Spatial L, B, S and T are not published.
#             Meta's 0.262 for PE-Spatial-G is with another protocol, pe_spatial_dpt_single_nyu.py.
#
# Another size:     --cfg-options model.backbone.variant=pe_spatial_g14_448       (t16_512, s16_512, b16_512, l14_448)
# Other layers:     --cfg-options "model.backbone.out_indices=[45]"   (0-based), or 'last', 'even' (four), 'late' (four)
# Another encoder:  --cfg-options model.backbone.variant=timm:vit_base_patch14_dinov2.lvd142m, with its normalization:
#                   "model.data_preprocessor.mean=[123.675,116.28,103.53]"
#                   "model.data_preprocessor.std=[58.395,57.12,57.375]"
#
# DINOv3's recipe (dinov3@6876159:dinov3/eval/depth/configs/config-nyu.yaml): last layer, no class token, no upsampling;
# 256 even bins from 1 mm to 10 m, weights relu + 0.1; SigLoss alone; AdamW 3e-4, weight decay 1e-4, gradients clipped
# at 35; 12800 iterations of linear warm-up times a cosine over all 38400; evaluation in the Eigen crop, averaged with
# the flipped image. Theirs puts the encoder's final norm before the batch norm; PE-Spatial has none. Their beta1 is 0
# during warm-up, by mistake, and 0.85 to 0.95 after it; here it is 0.85 to 0.95.
# SigLoss takes its statistics over the images of one GPU, as in the released code, so 8 x 2 and 1 x 16 images are
# different trainings. model.losses.0.across_ranks=True takes them over all GPUs.

_base_ = ['_base_/pixels.py', '_base_/datasets/nyu_depth.py', '_base_/detection_runtime.py']

model = dict(
    type='PEDepthEstimator',
    data_preprocessor=dict(type='DepthPreprocessor', **_base_.encoder_pixels),
    backbone=dict(
        type='PerceptionEncoder',
        variant='pe_spatial_b16_512',
        out_indices='last',
        init_cfg=dict(type='Pretrained', checkpoint='released')),
    decode_head=dict(type='BinsDepthHead', norm='batch', min_depth=1e-3, max_depth=_base_.max_depth),
    losses=[dict(type='SigLoss', loss_weight=1.0)],
    test_cfg=dict(mode='whole', flip=True))
sync_bn = 'torch'  # statistics over all GPUs

iterations, warm_up = 38400, 12800
optim_wrapper = dict(
    type='OptimWrapper',
    optimizer=dict(type='AdamW', lr=3e-4, betas=(0.85, 0.99), weight_decay=1e-4),
    clip_grad=dict(max_norm=35.0))
param_scheduler = [  # the product of the first two
    dict(type='LinearLR', start_factor=1e-3, by_epoch=False, begin=0, end=warm_up),
    dict(type='CosineAnnealingLR', eta_min_ratio=4e-5, by_epoch=False, begin=0, end=iterations),
    dict(type='CosineAnnealingMomentum', eta_min=0.95, by_epoch=False, begin=warm_up, end=iterations),
]
train_cfg = dict(type='IterBasedTrainLoop', max_iters=iterations, val_interval=1600)
val_cfg = dict(type='ValLoop')
test_cfg = dict(type='TestLoop')
auto_scale_lr = dict(enable=False, base_batch_size=16)

default_scope = 'mmseg'
custom_imports = dict(imports=['pe_spatial.depth'], allow_failed_imports=False)
default_hooks = dict(
    _delete_=True,
    timer=dict(type='IterTimerHook'),
    logger=dict(type='LoggerHook', interval=50),
    param_scheduler=dict(type='ParamSchedulerHook'),
    checkpoint=dict(
        type='CheckpointHook', by_epoch=False, interval=1600, max_keep_ckpts=2, save_best='rmse', rule='less'),
    sampler_seed=dict(type='DistSamplerSeedHook'))
visualizer = dict(type='Visualizer')
