# Mask R-CNN on PE-Core-G14-448 as released (perception_models, apps/detection/detectron2_pe), COCO at 1024 px.
#
#   command   torchrun --nnodes 8 --nproc_per_node 8 --rdzv_backend c10d --rdzv_endpoint HOST:29500 \
#                 tools/train.py configs/pe_core_maskrcnn_coco_g14.py --launcher pytorch
#             python tools/test.py configs/pe_core_maskrcnn_coco_g14.py \
#                 hf://facebook/PE-Detection/mask_rcnn_PEcore_G_coco75ep.pth    (Meta's weights)
#   hardware  64 GPUs of 80 GB, 1 image each (weights, gradients and AdamW take 30 GB on each)
#   cost      138281 iterations of 64 images (75 epochs); not measured here
#   expected  box AP 57.0, mask AP 49.8 on val2017: Meta's numbers for their detectron2 run (README of apps/detection);
#             not measured yet with this config
#
# Differs from the released run as pe_spatial_maskrcnn_coco_g14.py does.

_base_ = [
    '_base_/models/mask_rcnn_pe.py',
    '_base_/datasets/coco_instance_lsj_1024.py',
    '_base_/schedules/coco_75e.py',
    '_base_/detection_runtime.py',
]

model = dict(backbone=dict(variant='pe_core_g14_448', grad_checkpointing=True))
optim_wrapper = dict(optimizer=dict(lr=5e-5))
train_dataloader = dict(batch_size=1)
