# coco_36e.py for 75 COCO epochs, as released (perception_models@3e352cc, mask_rcnn_PEcore_G_coco75ep.py); LVIS too.

_base_ = './coco_36e.py'

max_iters = 138281
param_scheduler = [
    dict(type='LinearLR', start_factor=0.001, by_epoch=False, begin=0, end=187),
    dict(type='MultiStepLR', milestones=[122916, 133159], gamma=0.1, by_epoch=False, begin=0, end=max_iters),
]
train_cfg = dict(max_iters=max_iters)
