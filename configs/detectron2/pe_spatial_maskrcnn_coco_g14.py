# Mask R-CNN on PE-Spatial-G14-448 as released (perception_models@3e352cc, apps/detection/detectron2_pe), on COCO at
# 1024 px: a LazyConfig for Detectron2's own tools/lazyconfig_train_net.py. Another variant is one option,
# model.backbone.variant=pe_spatial_b16_512: windows, drop path and layer decay follow it.
#
#   command   python tools/lazyconfig_train_net.py --config-file pe_spatial_maskrcnn_coco_g14.py --num-gpus 8 \
#                 --num-machines 8 --machine-rank RANK --dist-url tcp://HOST:29500
#             python tools/lazyconfig_train_net.py --config-file pe_spatial_maskrcnn_coco_g14.py --eval-only \
#                 model.backbone.weights=null train.init_checkpoint=mask_rcnn_PEspatial_G_coco36ep.pth  (Meta's weights)
#   hardware  64 GPUs of 80 GB, 1 image each (weights, gradients and AdamW take 30 GB on each)
#   cost      66375 iterations of 64 images (36 epochs); not measured here
#   expected  box AP 57.8, mask AP 50.3 on val2017: Meta's numbers for their run (README of apps/detection);
#             not measured yet with this config

from detectron2 import model_zoo
from detectron2.config import LazyCall as L
from detectron2.data import transforms as T
from detectron2.solver import WarmupParamScheduler
from fvcore.common.param_scheduler import MultiStepParamScheduler

from pe_spatial.encoder.variants import DETECTOR_PIXELS
from pe_spatial.integrations.detectron2 import PerceptionEncoderPyramid, layer_decay_params

side = 1024  # of the square to which images are scaled, cropped and padded, in pixels

model = model_zoo.get_config("common/models/mask_rcnn_vitdet.py").model
model.pixel_mean = model.pixel_std = [DETECTOR_PIXELS] * 3
model.input_format = "RGB"
model.backbone = L(PerceptionEncoderPyramid)(
    variant="pe_spatial_g14_448",
    geometry="vitdet",
    drop_path_rate="vitdet",
    pyramid=dict(strides=[4, 8, 16, 32, 64], out_channels=256),
    weights="released",
    square_size=side,
    grad_checkpointing=True,
)

dataloader = model_zoo.get_config("common/data/coco.py").dataloader
dataloader.train.mapper.image_format = "RGB"
dataloader.train.mapper.recompute_boxes = True  # after the crop
dataloader.train.mapper.augmentations = [
    L(T.RandomFlip)(horizontal=True),
    L(T.ResizeScale)(min_scale=0.1, max_scale=2.0, target_height=side, target_width=side),
    L(T.FixedSizeCrop)(crop_size=(side, side), pad=False),
]
dataloader.train.total_batch_size = 64
dataloader.test.mapper.augmentations = [L(T.ResizeShortestEdge)(short_edge_length=side, max_size=side)]

optimizer = model_zoo.get_config("common/optim.py").AdamW
optimizer.lr = 5e-5
optimizer.weight_decay = 0.1  # of norms and biases too
optimizer.params = L(layer_decay_params)(base_lr="${..lr}", layer_decay_rate="vitdet")

train = model_zoo.get_config("common/train.py").train
train.amp.enabled = True
train.ddp.fp16_compression = True
train.max_iter = 66375
lr_multiplier = L(WarmupParamScheduler)(
    scheduler=L(MultiStepParamScheduler)(
        values=[1.0, 0.1, 0.01], milestones=[59000, 63916], num_updates=train.max_iter
    ),
    warmup_length=250 / 184375,  # a part of the run: 90 iterations, because the release cut down a run of 100 epochs
    warmup_factor=0.001,
)
