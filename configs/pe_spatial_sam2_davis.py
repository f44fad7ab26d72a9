# SAM 2 on PE-Spatial, trained on DAVIS 2017: a frozen encoder, a new neck, everything else from SAM 2.1.
#
#   command   tools/dist_train.sh configs/pe_spatial_sam2_davis.py 8
#             python tools/test.py configs/pe_spatial_sam2_davis.py work_dirs/pe_spatial_sam2_davis/iter_4000.pth
#             python tools/track.py VIDEO --config CONFIG --checkpoint CKPT --box 1:10,20,200,300 --out tracked.mp4
#   data      data/davis/{JPEGImages,Annotations}/480p and ImageSets/2017/{train,val}.txt, or --data-root FOLDER
#   hardware  8 GPUs, one clip each; memory and time from tools/plan.py in projects/video_tracking/README.md
#   cost      4000 iterations of 8 clips of 8 frames; not measured yet
#   expected  not measured yet. SAM 2 on PE is unpublished. J&F of others on DAVIS 2017 val, from their authors:
#             SAM 2.1-L 90.7; SAM 3 (with an unpublished PE) 92.2; PE-Spatial-B without training 58.9
#
# Another size:    --cfg-options model.tracker.variant=pe_spatial_l14_448         (t16_512, s16_512, b16_512, g14_448)
# Smaller images:  --cfg-options model.tracker.grid=32 train_dataloader.dataset.pipeline.3.size=512        (16 x grid)
# From clicks:     tools/test.py ... --cfg-options model.prompt=click model.corrections=2       (or model.prompt=box)
# Masks as files:  tools/test.py ... --cfg-options test_evaluator.save_dir=masks
# One GPU:         --cfg-options optim_wrapper.accumulative_counts=8 train_cfg.max_iters=32000
# Averaged:        custom_hooks = [*_base_.custom_hooks, dict(type='EMAHook', momentum=1e-3)] in a config on top
# Without SAM 2.1: --cfg-options model.sam2_weights=None optim_wrapper.optimizer.lr=1e-4
#
# Procedure, losses and augmentation are SAM 2's (tests/tracking/sam2/test_training.py). The learning rates are those of
# its fine-tuning on MOSE: 5e-6 for SAM 2.1's weights, ten times as much for the randomly initialized neck. The second
# stage, which also trains the encoder, is projects/video_tracking/stage2_unfrozen.py.

_base_ = '_base_/runtime.py'

data_root = 'data/davis/'
grid = 64

model = dict(
    type='PESAM2',
    tracker=dict(variant='pe_spatial_b16_512', grid=grid, frozen=True),
    encoder_weights='released',
    sam2_weights='hf://facebook/sam2.1-hiera-base-plus/sam2.1_hiera_base_plus.pt')

train_pipeline = [
    dict(type='LoadClip', num_frames=8, max_objects=3, skip_broken=True),
    dict(type='ClipFlip', prob=0.5),
    dict(type='ClipAffine', degrees=25, shear=20),
    dict(type='ClipResize', size=16 * grid),
    dict(type='ClipColorJitter', brightness=0.1, contrast=0.03, saturation=0.03),
    dict(type='ClipGrayscale', prob=0.05),
    dict(type='ClipColorJitter', brightness=0.1, contrast=0.05, saturation=0.05, per_frame=True),
    dict(type='PackClip'),
]
train_dataloader = dict(
    batch_size=1,
    num_workers=4,
    persistent_workers=True,
    sampler=dict(type='InfiniteSampler', shuffle=True),
    dataset=dict(type='VideoClipDataset', data_root=data_root, layout='davis', pipeline=train_pipeline))
val_dataloader = dict(
    batch_size=1,
    num_workers=0,  # the model reads the frames
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(type='VideoDataset', data_root=data_root))
test_dataloader = val_dataloader
val_evaluator = dict(type='JandFMetric', ann_dir=data_root)
test_evaluator = val_evaluator

iterations = 4000
optim_wrapper = dict(
    type='BFloat16OptimWrapper',
    optimizer=dict(type='AdamW', lr=5e-6, betas=(0.9, 0.999), weight_decay=0.1),
    clip_grad=dict(max_norm=0.1),
    constructor='LayerDecayOptimWrapperConstructor',
    paramwise_cfg=dict(
        layer_decay_rate=0.9,
        decay_norm_bias=False,
        custom_keys={'image_encoder.neck': dict(lr_mult=10)}))
param_scheduler = [
    dict(type='CosineAnnealingLR', eta_min_ratio=0.1, by_epoch=False, begin=0, end=iterations)
]
train_cfg = dict(type='IterBasedTrainLoop', max_iters=iterations, val_interval=1000)
val_cfg = dict(type='ValLoop')
test_cfg = dict(type='TestLoop')
find_unused_parameters = True  # clips prompted by masks do not use all of the decoder

default_scope = 'mmengine'
custom_imports = dict(
    imports=[
        'pe_spatial.tracking.sam2.tracker', 'pe_spatial.tracking.sam2.datasets',
        'pe_spatial.tracking.sam2.transforms',
        'pe_spatial.tracking.vos.datasets', 'pe_spatial.tracking.vos.metric'
    ],
    allow_failed_imports=False)
default_hooks = dict(logger=dict(interval=20), checkpoint=dict(interval=500))
log_processor = dict(window_size=20)
