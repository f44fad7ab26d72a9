# coco_deta.py for Objects365 v2: 365 classes, images in train/patchN/ and val/patchN/. The release reads a
# zhiyuan_objv2_train_fixmiss.json without the images that were never published; here `skip_missing` omits and counts
# them. Another folder: --data-root FOLDER.

_base_ = './coco_deta.py'

data_root = 'data/objects365_v2/'

train_dataloader = dict(
    dataset=dict(
        type='CheckedObjects365Dataset',
        data_root=data_root,
        ann_file='annotations/zhiyuan_objv2_train.json',
        data_prefix=dict(img='train/'),
        skip_missing=True))
val_dataloader = dict(
    dataset=dict(
        type='CheckedObjects365Dataset',
        data_root=data_root,
        ann_file='annotations/zhiyuan_objv2_val.json',
        data_prefix=dict(img='val/')))
test_dataloader = val_dataloader

val_evaluator = dict(ann_file=data_root + 'annotations/zhiyuan_objv2_val.json')
test_evaluator = val_evaluator
