# Mask R-CNN on PE-Spatial-G14-448 as released (perception_models, apps/detection/detectron2_pe), COCO at 1024 px.
#
#   command   python tools/test.py configs/pe_spatial_maskrcnn_coco_g14.py \
#                 hf://facebook/PE-Detection/mask_rcnn_PEspatial_G_coco36ep.pth      (Meta's weights, 7.5 GB)
#             torchrun --nnodes 8 --nproc_per_node 8 --rdzv_backend c10d --rdzv_endpoint HOST:29500 \
#                 tools/train.py configs/pe_spatial_maskrcnn_coco_g14.py --launcher pytorch
#   hardware  64 GPUs of 80 GB, 1 image each (weights, gradients and AdamW take 30 GB on each)
#   cost      66375 iterations of 64 images (36 epochs); not measured here
#   expected  box AP 57.8, mask AP 50.3 on val2017: Meta's numbers for their detectron2 run (README of apps/detection);
#             not measured yet with this config
#
# Training differs from the released run in bfloat16 instead of float16 with compressed gradients.

_base_ = [
    '_base_/models/mask_rcnn_pe.py',
    '_base_/datasets/coco_instance_lsj_1024.py',
    '_base_/schedules/coco_36e.py',
    '_base_/detection_runtime.py',
]

model = dict(backbone=dict(variant='pe_spatial_g14_448', grad_checkpointing=True))
optim_wrapper = dict(optimizer=dict(lr=5e-5))
train_dataloader = dict(batch_size=1)
