# DETA on the distilled PE-Spatial-B16-512 at 1024 px, COCO from the released encoder: for 8 GPUs of 24 GB.
#
#   command   projects/coco_detection/deta/dist_train.sh deta_distilled_8x24g 8
#             S16 or L14: --cfg-options model.backbone.variant=pe_spatial_s16_512 (pe_spatial_l14_448)
#   data      data/coco/{train2017,val2017,annotations}, or --data-root FOLDER
#   hardware  8 GPUs of 24 GB, 2 images each, 4 steps accumulated: 64 images. Memory: README.md
#   cost      12 epochs of 118 thousand images; not measured yet
#   expected  not measured yet; nobody has published DETA on the distilled encoders
#
# Chosen here: canvas, batch, learning rate, and training on COCO alone. As released: model, images, optimizer, the drop
# path for the depth of the encoder (0.1 for S and B, 0.4 for L), and the epochs of stage 3.

_base_ = ['common.py', '../../../configs/_base_/datasets/coco_deta.py']

canvas = 1024
side = canvas - 32  # of images, at most

model = dict(
    data_preprocessor=dict(pad_size_divisor=canvas), backbone=dict(variant='pe_spatial_b16_512'))
train_pipeline = [*_base_.load, dict(type='DETAJitter', canvas=canvas), dict(type='PackDetInputs')]
resize = dict(type='ShortSideResize', short_sides=[side], max_long_side=side)
test_pipeline = [_base_.load[0], resize, *_base_.pack_test]
train_dataloader = dict(batch_size=2, dataset=dict(pipeline=train_pipeline))
val_dataloader = dict(dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader

optim_wrapper = dict(type='BFloat16OptimWrapper', accumulative_counts=4, optimizer=dict(lr=1e-4))
param_scheduler = [dict(type='MultiStepLR', milestones=[10], gamma=0.1, by_epoch=True)]
train_cfg = dict(max_epochs=12)
auto_scale_lr = dict(enable=False, base_batch_size=64)
