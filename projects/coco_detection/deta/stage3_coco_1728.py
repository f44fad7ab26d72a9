# DETA on PE-Spatial-G14-448, stage 3 of 4: COCO at 1728 px, from stage 2.
#
#   command   NNODES=8 MASTER_ADDR=NODE projects/coco_detection/deta/dist_train.sh stage3_coco_1728 8
#   data      data/coco/{train2017,val2017,annotations}, or --data-root FOLDER
#   hardware  8 nodes of 8 GPUs, 1 image each, as released; fewer accumulate. Memory: README.md
#   cost      12 epochs of 118 thousand images; not measured yet
#   expected  the authors published no number for this stage; not measured yet
#
# The rate drops after epoch 10, as in the released script; the paper says 8: --cfg-options
# param_scheduler.0.milestones=[8].
# All class heads start from scratch, including the objectness of the proposals, as in the script: COCO has other
# classes than Objects365. The encoder runs in bfloat16.

_base_ = ['common.py', '../../../configs/_base_/datasets/coco_deta.py']

canvas = 1728
epochs = 12
side = canvas - 32  # of images, at most
load_from = 'work_dirs/stage2_objects365_1536/epoch_6.pth'
custom_hooks = [*_base_.custom_hooks, dict(type='LoadPreviousStage', skip=['bbox_head.cls_branches'])]

model = dict(
    data_preprocessor=dict(pad_size_divisor=canvas), backbone=dict(drop_path_rate=0.4, init_cfg=None))
train_pipeline = [*_base_.load, dict(type='DETAJitter', canvas=canvas), dict(type='PackDetInputs')]
resize = dict(type='ShortSideResize', short_sides=[side], max_long_side=side)
test_pipeline = [_base_.load[0], resize, *_base_.pack_test]
train_dataloader = dict(dataset=dict(pipeline=train_pipeline))
val_dataloader = dict(dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader

optim_wrapper = dict(type='BFloat16OptimWrapper', optimizer=dict(lr=5e-5))
param_scheduler = [dict(type='MultiStepLR', milestones=[10], gamma=0.1, by_epoch=True)]
train_cfg = dict(max_epochs=epochs)
auto_scale_lr = dict(enable=False, base_batch_size=64)
