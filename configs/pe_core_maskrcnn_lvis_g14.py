# Mask R-CNN on PE-Core-G14-448 as released (perception_models, apps/detection/detectron2_pe), LVIS v1 at 1024 px.
#
#   command   torchrun --nnodes 8 --nproc_per_node 8 --rdzv_backend c10d --rdzv_endpoint HOST:29500 \
#                 tools/train.py configs/pe_core_maskrcnn_lvis_g14.py --launcher pytorch
#             python tools/test.py configs/pe_core_maskrcnn_lvis_g14.py \
#                 hf://facebook/PE-Detection/mask_rcnn_PEcore_G_lvis75ep.pth    (Meta's weights)
#   data      data/lvis_v1/{train2017,val2017,annotations}, or --data-root FOLDER; the images are COCO's
#   hardware  64 GPUs of 80 GB, 1 image each (weights, gradients and AdamW take 30 GB on each)
#   cost      138281 iterations of 64 images (75 epochs of COCO's length); not measured here
#   expected  box AP 51.9, mask AP 47.9 on LVIS v1 val: Meta's numbers for their detectron2 run (README of
#             apps/detection); not measured yet with this config

_base_ = 'pe_spatial_maskrcnn_lvis_g14.py'

model = dict(backbone=dict(variant='pe_core_g14_448'))
