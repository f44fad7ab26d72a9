# NYUv2 in the split of BTS (24231 pairs of 640 x 480 for training, the 654 of the Eigen split for testing), with the
# augmentation of BTS, BinsFormer, DINOv2 and DINOv3. Depth is in 16-bit millimeters, 0 where it is missing.
# Another folder: --data-root FOLDER (tools/prepare_nyu.py checks it; its --help tells where to get the files).

data_root = 'data/nyu/'
max_depth = 10.0  # meters
crop_size = (416, 544)  # (h, w) in pixels

train_pipeline = [
    dict(type='pe_spatial.LoadImageFromFile', skip_broken=True),
    dict(type='LoadDepth', skip_empty=True),
    dict(type='DepthCrop', box=(43, 45, 608, 472)),  # remove the white border: 427 x 565
    dict(type='DepthRandomRotate', degrees=2.5, prob=0.5),
    dict(type='DepthRandomFlip', prob=0.5),
    dict(type='DepthRandomCrop', size=crop_size),
    dict(type='DepthColorAug', gamma=(0.9, 1.1), brightness=(0.75, 1.25), color=(0.9, 1.1), prob=0.5),
    dict(type='PackDepthInputs'),
]
test_pipeline = [dict(type='pe_spatial.LoadImageFromFile'), dict(type='LoadDepth'), dict(type='PackDepthInputs')]

dataset = dict(
    type='DepthPairDataset',
    data_root=data_root,
    scale=1000,
    max_depth=max_depth,
    intrinsics=(518.8579, 519.4696, 325.5824, 253.7362))
train_dataloader = dict(
    batch_size=2,  # per GPU; the schedule is for 8 GPUs
    num_workers=4,
    persistent_workers=True,
    sampler=dict(type='InfiniteSampler', shuffle=True),
    dataset=dict(**dataset, ann_file='nyu_train.txt', expected=24231, pipeline=train_pipeline))
val_dataloader = dict(
    batch_size=1,
    num_workers=4,
    persistent_workers=True,
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(**dataset, ann_file='nyu_test.txt', expected=654, test_mode=True, pipeline=test_pipeline))
test_dataloader = val_dataloader

val_evaluator = dict(type='CheckedDepthMetric', crop='eigen', min_depth=1e-3, max_depth=max_depth)
test_evaluator = val_evaluator
