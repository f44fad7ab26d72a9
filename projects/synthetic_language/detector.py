# Open-vocabulary Cascade R-CNN on the synthetic world: 30 classes, each a color and a shape, given by text embeddings.
# Trained without boxes of cones and of four pairs of color and shape, which are then found by name.
#
#   command   see README.md
#   hardware  one CPU core, no GPU
#   cost      about 6 minutes of one core
#   expected  see README.md

_base_ = '../../configs/pe_demo_cascade_synthetic.py'

colors = ('red', 'orange', 'yellow', 'green', 'blue', 'purple')
shapes = ('sphere', 'box', 'cylinder', 'cone', 'torus')
classes = tuple(f'{color} {shape}' for color in colors for shape in shapes)
unseen = ('red sphere', 'blue torus', 'green box', 'yellow cylinder')
left_out = [name for name in classes if name in unseen or name.endswith('cone')]

root = 'work_dirs/words/'
words = dict(
    type='TextClassifierHead',
    embeddings=root + 'classes.safetensors',
    embed_dims=64,
    left_out=[i for i, name in enumerate(classes) if name in left_out])
model = dict(
    roi_head=dict(
        bbox_head=[
            dict(
                type='Shared2FCBBoxHead',
                in_channels=64,
                fc_out_channels=128,
                roi_feat_size=7,
                num_classes=len(classes),
                reg_class_agnostic=True,
                cls_predictor_cfg=words,
                reg_predictor_cfg=dict(type='Float32Linear'),
                bbox_coder=dict(
                    type='DeltaXYWHBBoxCoder',
                    target_means=[0.0] * 4,
                    target_stds=[0.1 / k, 0.1 / k, 0.2 / k, 0.2 / k]),
                loss_cls=dict(type='CrossEntropyLoss', loss_weight=1.0),
                loss_bbox=dict(type='L1Loss', loss_weight=1.0)) for k in (1, 2, 3)
        ],
        mask_roi_extractor=None,
        mask_head=None),
    test_cfg=dict(rcnn=dict(score_thr=0.01, max_per_img=100)))

data_root = root + 'world/'
loading = [dict(type='pe_spatial.LoadImageFromFile'), dict(type='LoadAnnotations', with_bbox=True)]
train_dataloader = dict(
    dataset=dict(
        data_root=data_root,
        ann_file='annotations/words_train.json',
        metainfo=dict(classes=classes),
        left_out=left_out,
        pipeline=[*loading, dict(type='RandomFlip', prob=0.5), dict(type='PackDetInputs')]))
val_dataloader = dict(
    dataset=dict(
        data_root=data_root,
        ann_file='annotations/words_val.json',
        metainfo=dict(classes=classes),
        pipeline=[
            loading[0],
            dict(type='Resize', scale=(192, 192), keep_ratio=True),
            loading[1],
            dict(
                type='PackDetInputs', meta_keys=('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor')),
        ]))
test_dataloader = val_dataloader
val_evaluator = dict(ann_file=data_root + 'annotations/words_val.json', metric='bbox')
test_evaluator = val_evaluator

iterations = 250
train_cfg = dict(max_iters=iterations, val_interval=iterations)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=30),
    dict(type='CosineAnnealingLR', eta_min_ratio=0.01, by_epoch=False, begin=30, end=iterations),
]
default_hooks = dict(checkpoint=dict(interval=iterations, save_best=None))
