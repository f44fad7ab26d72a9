# DETA on PE-Spatial-G14-448 (patches of 16 px) at 1824 px: evaluates Meta's released detector on COCO.
#
#   command   python tools/test.py configs/pe_spatial_deta_g14.py hf://facebook/PE-Detection/deta_coco_1824pix.pth
#             the same with --tta: eight views of each image, 2000 queries; --limit N: the first N images
#   data      data/coco/{val2017,annotations}, or --data-root FOLDER
#   hardware  one GPU; memory not measured yet
#   cost      not measured yet
#   expected  box AP 65.2, with --tta 66.0: Meta's numbers for their code (README of apps/detection, which says that
#             package versions may make it 65.9); not measured yet with this config
#
# Evaluation only; the four training stages are in projects/coco_detection/deta/. The released evaluation ignores EXIF
# rotation, runs in float32, and antialiases the smaller views with torchvision 0.17 or later; tta_model.antialias=False
# does what it does with older versions.

_base_ = [
    '_base_/models/deta_pe.py',
    '_base_/datasets/coco_instance_lsj_1024.py',
    '_base_/detection_runtime.py',
]

long_side = 1792  # of images, in pixels; the canvas has 1824

model = dict(backbone=dict(init_cfg=None))
test_pipeline = [
    dict(type='LoadImageFromFile', imdecode_backend='pillow', color_type='color_ignore_orientation'),
    dict(type='ShortSideResize', short_sides=[long_side], max_long_side=long_side),
    dict(type='LoadAnnotations', with_bbox=True),
    dict(type='PackDetInputs', meta_keys=('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor')),
]
tta_pipeline = test_pipeline  # views are made from the normalized image
tta_model = dict(
    _delete_=True,
    type='DETATTA',
    canvas=1824,
    num_queries=2000,
    max_per_class=100,  # as many as COCO's metric reads
    class_ids=_base_.model.test_cfg.class_ids)

train_dataloader = None
val_dataloader = None
val_evaluator = None
test_dataloader = dict(dataset=dict(pipeline=test_pipeline))
test_evaluator = dict(metric='bbox')
test_cfg = dict(type='TestLoop')
