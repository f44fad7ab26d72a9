# Cascade Mask R-CNN on PE-Spatial-S16-512, fine-tuned on COCO at 1024 px.
#
#   command   torchrun --nproc_per_node 8 tools/train.py configs/pe_spatial_cascade_coco_s16.py --launcher pytorch
#   hardware  8 GPUs of 40 GB, 8 images each
#   cost      66375 iterations of 64 images; not measured yet
#   expected  not measured yet

_base_ = 'pe_spatial_cascade_coco.py'

model = dict(backbone=dict(variant='pe_spatial_s16_512'))
