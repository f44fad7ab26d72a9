# COCO 2017 with boxes and masks; large-scale jitter (0.1 to 2.0) and crops of 1024 px in training, 1024 px in testing.
# Another folder: --data-root FOLDER (containing train2017/, val2017/ and annotations/).

data_root = 'data/coco/'
size = (1024, 1024)  # (w, h) in pixels; model.data_preprocessor.pad_size_divisor pads to it

train_pipeline = [
    dict(type='pe_spatial.LoadImageFromFile', skip_broken=True),
    dict(type='LoadAnnotations', with_bbox=True, with_mask=True, poly2mask=False),
    dict(
        type='RandomResize',
        scale=size,
        ratio_range=(0.1, 2.0),
        resize_type='DeferredResize',  # with Pillow, as in Detectron2, and only what the crop keeps
        keep_ratio=True),
    dict(
        type='RandomCrop', crop_type='absolute', crop_size=size, recompute_bbox=True, allow_negative_crop=True),
    # crops without objects stay, as negatives (MMDetection's keep_empty=True would draw another image)
    dict(type='FilterAnnotations', min_gt_bbox_wh=(1e-2, 1e-2), keep_empty=False),
    dict(type='pe_spatial.RandomFlip', prob=0.5),  # MMDetection's, in less time
    dict(type='PackDetInputs'),
]
test_pipeline = [
    dict(type='pe_spatial.LoadImageFromFile'),
    dict(type='Resize', scale=size, keep_ratio=True, backend='pillow'),
    dict(type='LoadAnnotations', with_bbox=True, with_mask=True, poly2mask=False),
    dict(type='PackDetInputs', meta_keys=('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor')),
]
tta_pipeline = [
    dict(type='pe_spatial.LoadImageFromFile'),
    dict(
        type='TestTimeAug',
        transforms=[
            [dict(type='Resize', scale=(side, side), keep_ratio=True, backend='pillow') for side in (1024, 896, 768)],
            [dict(type='RandomFlip', prob=0.0), dict(type='RandomFlip', prob=1.0)],
            [
                dict(
                    type='PackDetInputs',
                    meta_keys=('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor', 'flip',
                               'flip_direction'))
            ],
        ]),
]

train_dataloader = dict(
    batch_size=8,  # a GPU; 8 GPUs make the 64 of the schedule
    num_workers=4,
    persistent_workers=True,
    sampler=dict(type='InfiniteSampler', shuffle=True),
    dataset=dict(
        type='CheckedCocoDataset',
        data_root=data_root,
        ann_file='annotations/instances_train2017.json',
        data_prefix=dict(img='train2017/'),
        filter_cfg=dict(filter_empty_gt=True),
        pipeline=train_pipeline))
val_dataloader = dict(
    batch_size=1,
    num_workers=2,
    persistent_workers=True,
    drop_last=False,
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(
        type='CheckedCocoDataset',
        data_root=data_root,
        ann_file='annotations/instances_val2017.json',
        data_prefix=dict(img='val2017/'),
        test_mode=True,
        pipeline=test_pipeline))
test_dataloader = val_dataloader

val_evaluator = dict(
    type='CheckedCocoMetric', ann_file=data_root + 'annotations/instances_val2017.json', metric=['bbox', 'segm'])
test_evaluator = val_evaluator
tta_evaluator = dict(
    type='CheckedCocoMetric', ann_file=data_root + 'annotations/instances_val2017.json', metric='bbox')
