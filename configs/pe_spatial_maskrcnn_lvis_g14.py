# Mask R-CNN on PE-Spatial-G14-448 as released (perception_models, apps/detection/detectron2_pe), LVIS v1 at 1024 px.
#
#   command   torchrun --nnodes 8 --nproc_per_node 8 --rdzv_backend c10d --rdzv_endpoint HOST:29500 \
#                 tools/train.py configs/pe_spatial_maskrcnn_lvis_g14.py --launcher pytorch
#             python tools/test.py configs/pe_spatial_maskrcnn_lvis_g14.py \
#                 hf://facebook/PE-Detection/mask_rcnn_PEspatial_G_lvis75ep.pth    (Meta's weights)
#   data      data/lvis_v1/{train2017,val2017,annotations}, or --data-root FOLDER; the images are COCO's
#   hardware  64 GPUs of 80 GB, 1 image each (weights, gradients and AdamW take 30 GB on each)
#   cost      138281 iterations of 64 images (75 epochs of COCO's length); not measured here
#   expected  box AP 54.2, mask AP 49.3 on LVIS v1 val: Meta's numbers for their detectron2 run (README of
#             apps/detection); not measured yet with this config
#
# Differs from the released run as pe_spatial_maskrcnn_coco_g14.py does; boxes of less than a pixel are omitted in
# training.

_base_ = [
    '_base_/models/mask_rcnn_pe_lvis.py',
    '_base_/datasets/lvis_v1_instance_lsj_1024.py',
    '_base_/schedules/coco_75e.py',
    '_base_/detection_runtime.py',
]

model = dict(backbone=dict(variant='pe_spatial_g14_448', grad_checkpointing=True))
optim_wrapper = dict(optimizer=dict(lr=5e-5))
train_dataloader = dict(batch_size=1)
train_cfg = dict(val_interval=30000)
custom_hooks = [*_base_.custom_hooks, dict(type='SetClassWeights')]
