# LVIS v1 on the images of COCO 2017: data_root contains COCO's train2017/ and val2017/ (or links; val has images of
# both) and annotations/lvis_v1_{train,val}.json. Pipelines as on COCO; images of rare classes are repeated.
# Another folder: --data-root FOLDER.

_base_ = './coco_instance_lsj_1024.py'

data_root = 'data/lvis_v1/'

train_dataloader = dict(
    sampler=dict(_delete_=True, type='RepeatFactorSampler', repeat_thr=0.001),
    dataset=dict(
        type='CheckedLVISDataset',
        data_root=data_root,
        ann_file='annotations/lvis_v1_train.json',
        data_prefix=dict(img='')))
val_dataloader = dict(
    dataset=dict(
        type='CheckedLVISDataset',
        data_root=data_root,
        ann_file='annotations/lvis_v1_val.json',
        data_prefix=dict(img='')))
test_dataloader = val_dataloader

val_evaluator = dict(
    type='FastLVISMetric',
    ann_file=data_root + 'annotations/lvis_v1_val.json',
    metric=['bbox', 'segm'],
    max_dets=300)
test_evaluator = val_evaluator
tta_evaluator = dict(
    type='FastLVISMetric',
    ann_file=data_root + 'annotations/lvis_v1_val.json',
    metric='bbox',
    max_dets=300)
