# DETA on PE-Spatial-G14-448, stage 1 of 4: Objects365 at 1024 px, from the released encoder.
#
#   command   NNODES=16 MASTER_ADDR=NODE projects/coco_detection/deta/dist_train.sh stage1_objects365_1024 8
#   data      data/objects365_v2/{train,val,annotations}, or --data-root FOLDER; see README.md
#   hardware  16 nodes of 8 GPUs, 2 images each, as released; fewer accumulate. Memory: README.md
#   cost      12 epochs of 1.74 million images; not measured yet
#   expected  the authors published no number for this stage; not measured yet
#
# Paper and released script agree. It trains in float32, as the script does; with --amp the encoder runs in bfloat16.
# The head of the script has an unused class 0, because the ids in the file start at 1; here it has the 365 classes.

_base_ = ['common.py', '../../../configs/_base_/datasets/objects365_deta.py']

canvas = 1024
epochs = 12
side = canvas - 32  # of images, at most

model = dict(
    data_preprocessor=dict(pad_size_divisor=canvas),
    backbone=dict(drop_path_rate=0.5),
    bbox_head=dict(num_classes=365),
    test_cfg=dict(class_ids=None))
train_pipeline = [*_base_.load, dict(type='DETAJitter', canvas=canvas), dict(type='PackDetInputs')]
resize = dict(type='ShortSideResize', short_sides=[side], max_long_side=side)
test_pipeline = [_base_.load[0], resize, *_base_.pack_test]
train_dataloader = dict(batch_size=2, dataset=dict(pipeline=train_pipeline))
val_dataloader = dict(dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader

optim_wrapper = dict(optimizer=dict(lr=2e-4))
param_scheduler = [dict(type='MultiStepLR', milestones=[10], gamma=0.1, by_epoch=True)]
train_cfg = dict(max_epochs=epochs, val_interval=2)
auto_scale_lr = dict(enable=False, base_batch_size=256)
