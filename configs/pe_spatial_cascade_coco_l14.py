# Cascade Mask R-CNN on PE-Spatial-L14-448 (patches resized to 16 px), fine-tuned on COCO at 1024 px.
#
#   command   torchrun --nnodes 2 --nproc_per_node 8 --rdzv_backend c10d --rdzv_endpoint HOST:29500 \
#                 tools/train.py configs/pe_spatial_cascade_coco_l14.py --launcher pytorch
#   hardware  16 GPUs of 80 GB, 4 images each
#   cost      66375 iterations of 64 images; not measured yet
#   expected  not measured yet

_base_ = 'pe_spatial_cascade_coco.py'

model = dict(backbone=dict(variant='pe_spatial_l14_448', grad_checkpointing=True))
train_dataloader = dict(batch_size=4)
