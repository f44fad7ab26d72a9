# Spatial alignment of a small encoder on the built-in synthetic world, in minutes.
#
#   command   python projects/spatial_alignment/pretrain_pooled.py       (the encoder that is aligned: core.pt)
#             python tools/train.py projects/spatial_alignment/align_synthetic.py
#   data      3000 images of 1500 scenes, which pretrain_pooled.py renders; measured on 50 other scenes
#   hardware  one or two CPU cores
#   cost      3 minutes of one core of a busy CPU for each run, and 6 for pretrain_pooled.py
#   expected  last layer: mIoU 34.8 (33.0 before, 35.4 at layer 4), RMSE 0.67 m (0.89, 0.70), J&F 65.4 (37.2, 68.1),
#             measured here; the shape of the paper's table but for locality alone, see docs/alignment.md
#
# One loss alone:   --cfg-options "model.losses=[dict(kind='token_cosine',teacher='core')]"
#                   --cfg-options "model.losses=[dict(kind='pairwise_similarity',teacher='masks')]"
#
# The encoder is the one that ships, which has good maps, with three blocks behind it that were trained to give up
# places. Images are 96 px, a grid of 12 x 12. In place of SAM's logits: true masks of objects, as a stated stand-in.
# Changes from the paper: 100 steps of 16 images, AdamW, blocks 0 to 3 frozen (so few steps harm them more than they
# help), drop path .1, masking .25, no LayerScale.

_base_ = 'align_g14.py'

root = 'work_dirs/spatial_alignment/'
model = dict(
    backbone=dict(
        variant=dict(_delete_=True, img_size=192, patch_size=8, embed_dim=192, depth=8, num_heads=3),
        drop_path_rate=0.1,
        frozen_stages=4,
        grad_checkpointing=False,
        init_cfg=dict(checkpoint=root + 'core.pt'),
    ),
    layer_scale=None,
    masking=dict(ratio=0.25),
    teachers=dict(_delete_=True, core=dict(type='EncoderTeacher', layer=4), masks=dict(type='ObjectMaskTeacher')),
    losses=[
        dict(kind='token_cosine', teacher='core', weight=1.0),
        dict(kind='pairwise_similarity', teacher='masks', weight=1.0, sharpness=20.0),
    ],
)

image_size = 96
train_pipeline = [
    dict(type='LoadUnlabeled'),
    dict(type='AspectJitter', size=image_size, ratio=(0.75, 1.33)),
    dict(type='ColorJitter', brightness=0.32, saturation=0.32),
    dict(type='FlipView'),
    dict(type='PackViews'),
]
train_dataloader = dict(
    batch_size=16,
    num_workers=0,
    persistent_workers=False,
    dataset=dict(
        _delete_=True,
        type='UnlabeledImages',
        data_root=root + 'world',
        data_prefix=dict(img='pretrain', instances='instances/pretrain'),
        pipeline=train_pipeline,
    ),
)

max_iters = 100
optim_wrapper = dict(optimizer=dict(_delete_=True, type='AdamW', lr=5e-4, betas=(0.9, 0.95), weight_decay=0.05))
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=10),
    dict(type='CosineAnnealingLR', by_epoch=False, eta_min=0.0, begin=10, end=max_iters),
]
train_cfg = dict(max_iters=max_iters)
auto_scale_lr = dict(base_batch_size=16)
default_hooks = dict(logger=dict(interval=25), checkpoint=dict(interval=max_iters))
custom_hooks = [
    dict(type='ResumeWithoutPretrained'),
    dict(type='AlignmentProgressHook', data=[root + 'world', root + 'clips'], interval=50, size=96),
]
log_processor = dict(window_size=25)
randomness = dict(seed=0)
runner_type = 'Runner'
