# Cascade Mask R-CNN on PE-Spatial-G14-448 (patches resized to 16 px), fine-tuned on COCO at 1024 px.
#
#   command   torchrun --nnodes 8 --nproc_per_node 8 --rdzv_backend c10d --rdzv_endpoint HOST:29500 \
#                 tools/train.py configs/pe_spatial_cascade_coco_g14.py --launcher pytorch
#   hardware  64 GPUs of 80 GB, 1 image each (weights, gradients and AdamW take 30 GB on each)
#   cost      66375 iterations of 64 images; not measured yet
#   expected  not measured yet; the nearest published result is the Mask R-CNN of pe_spatial_maskrcnn_coco_g14.py

_base_ = 'pe_spatial_cascade_coco.py'

model = dict(backbone=dict(variant='pe_spatial_g14_448', grad_checkpointing=True))
optim_wrapper = dict(optimizer=dict(lr=5e-5))
train_dataloader = dict(batch_size=1)
