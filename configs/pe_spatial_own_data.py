# Cascade Mask R-CNN on PE-Spatial for own data: pe_spatial_cascade_coco.py with a schedule for few images.
#
#   command   python tools/train.py configs/pe_spatial_own_data.py --data DATA
#             --epochs N for another length; --cfg-options model.backbone.variant=pe_spatial_t16_512 for another size
#   data      whatever --data reads (docs/own_data.md); without masks it trains boxes alone
#   hardware  one GPU, 4 images (--batch auto: as many of them at once as fit)
#   cost      2000 iterations; not measured yet
#   expected  not measured yet with PE's released weights. The schedule was tried on 8 images with the small encoder
#             of this package (projects/coco_detection/own_data_check.py, docs/benchmarks.md)
#
# The new heads learn at a rate of 4e-4, the last block of the encoder at 0.7 of it, and each block before at 0.7 of the
# next one.

_base_ = [
    '_base_/models/cascade_mask_rcnn_pe.py',
    '_base_/datasets/coco_instance_lsj_1024.py',
    '_base_/schedules/own_data.py',
    '_base_/detection_runtime.py',
]

train_dataloader = dict(batch_size=4)
default_hooks = dict(checkpoint=dict(interval=100))
