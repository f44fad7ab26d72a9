# Does DETA learn? A small one on the built-in synthetic dataset, from the small encoder that ships with the package.
#
#   command   python tools/render_synthetic.py data/synthetic_192 --train 400 --val 60 --size 192 192 --workers 2
#             python tools/train.py projects/coco_detection/deta/synthetic.py
#   hardware  two CPU cores, no GPU, about 2 GB of memory
#   cost      27 minutes on one core of a busy machine
#   expected  box AP 0.49, AP50 0.67 on 120 images of unseen scenes (measured here, one run, docs/benchmarks.md)
#
# Reduced: images of 192 px, patches of 8 px (levels have strides 4 to 64), 64 channels, 2 + 3 layers, 2 points and 4
# heads in deformable attention, 100 queries, 4 images per step. Chosen here: learning rate, cosine, warm-up, clipping.

_base_ = [
    '../../../configs/_base_/models/deta_pe.py',
    '../../../configs/_base_/pixels.py',
    '../../../configs/_base_/detection_runtime.py',
]

classes = ('sphere', 'box', 'cylinder', 'cone', 'torus')
size = 192
width = 64
iterations = 800
attention = dict(embed_dims=width, num_heads=4)
deformable = dict(attention, num_points=2)
ffn = dict(embed_dims=width, feedforward_channels=256)

model = dict(
    num_queries=100,
    data_preprocessor=dict(**_base_.encoder_pixels, pad_size_divisor=size),
    backbone=dict(
        variant='pe_synthetic_xs8_192',
        geometry='release',
        drop_path_rate=0.05,
        grad_checkpointing=False),
    neck=dict(out_channels=width),
    positional_encoding=dict(num_feats=width // 2),
    encoder=dict(num_layers=2, layer_cfg=dict(self_attn_cfg=deformable, ffn_cfg=ffn)),
    decoder=dict(num_layers=3, layer_cfg=dict(self_attn_cfg=attention, cross_attn_cfg=deformable, ffn_cfg=ffn)),
    bbox_head=dict(num_classes=len(classes), embed_dims=width),
    test_cfg=dict(class_ids=None))

data_root = 'data/synthetic_192/'
dataset = dict(type='CheckedCocoDataset', data_root=data_root, metainfo=dict(classes=classes))
load = [dict(type='pe_spatial.LoadImageFromFile'), dict(type='LoadAnnotations', with_bbox=True)]
train_dataloader = dict(
    batch_size=4,
    num_workers=0,
    sampler=dict(type='InfiniteSampler', shuffle=True),
    dataset=dict(
        **dataset,
        ann_file='annotations/instances_train.json',
        data_prefix=dict(img='train/'),
        pipeline=[
            *load,
            dict(type='RandomFlip', prob=0.5),
            dict(type='PhotoMetricDistortion'),
            dict(type='PackDetInputs'),
        ]))
val_dataloader = dict(
    batch_size=8,
    num_workers=0,
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(
        **dataset,
        ann_file='annotations/instances_val.json',
        data_prefix=dict(img='val/'),
        test_mode=True,
        pipeline=[
            *load,
            dict(type='PackDetInputs', meta_keys=('img_id', 'img_path', 'ori_shape', 'img_shape')),
        ]))
test_dataloader = val_dataloader
val_evaluator = dict(type='CheckedCocoMetric', ann_file=data_root + 'annotations/instances_val.json', metric='bbox')
test_evaluator = val_evaluator

train_cfg = dict(type='IterBasedTrainLoop', max_iters=iterations, val_interval=iterations // 4)
val_cfg = dict(type='ValLoop')
test_cfg = dict(type='TestLoop')
optim_wrapper = dict(
    type='BFloat16OptimWrapper',
    optimizer=dict(type='AdamW', lr=5e-4, weight_decay=1e-4),
    clip_grad=dict(max_norm=1.0),
    paramwise_cfg=dict(custom_keys=dict(sampling_offsets=dict(lr_mult=0.1), backbone=dict(lr_mult=0.2))))
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=30),
    dict(type='CosineAnnealingLR', eta_min_ratio=0.01, by_epoch=False, begin=30, end=iterations),
]
default_hooks = dict(logger=dict(interval=20), checkpoint=dict(interval=iterations, max_keep_ckpts=1))
log_processor = dict(window_size=20)
randomness = dict(seed=0)
