# Which layer is best for detection: Mask R-CNN on one layer of a frozen PE-Spatial-B16-512, as in PE's paper (Fig. 8,
# Tab. 36). The pyramid reads one layer; encoder without global blocks, in windows of its pretraining grid.
#
#   command   python tools/sweep_layers.py configs/pe_spatial_layers_detection.py --layers all --data-root DATA/coco
#             --cache-dtype float16 halves the maps on disk: 6.3 MB an image and layer (B16 at 1024 px)
#   data      data/coco/{train2017,val2017,annotations}, or --data-root FOLDER, or --data DATA
#   hardware  one GPU (memory not measured yet); the encoder runs once over the images, the heads train on its maps
#   cost      15 epochs of the heads for each layer; not measured yet
#   expected  not measured yet for B. The authors' box AP of PE-Spatial-G, of blocks counted from 1: 46.1 (40 and 42),
#             46.0 (41), 45.6 (46), 44.5 (50, the last); of PE-Core-G 43.2 (38) and 35.0 (50)
#
# From the paper: 15 epochs, step decay, no drop path, encoder frozen, patches of 16, 1024 px. The rest is that of the
# released detectors: AdamW at 1e-4, 64 images a step, decay at 8/9 and 26/27. The authors augment as there; a sweep
# reads images as in testing, because maps are cached. Training one layer alone with augmentation:
#   python tools/train.py configs/pe_spatial_layers_detection.py --cfg-options "model.backbone.out_indices=[9]" \
#       model.backbone.frozen_stages=10

_base_ = [
    '_base_/models/mask_rcnn_pe.py',
    '_base_/datasets/coco_instance_lsj_1024.py',
    '_base_/schedules/coco_36e.py',
    '_base_/detection_runtime.py',
]

max_iters = 27484
model = dict(backbone=dict(drop_path_rate=0.0, frozen_stages=12, global_attn_indexes=[]))
param_scheduler = [
    dict(type='LinearLR', start_factor=0.001, by_epoch=False, begin=0, end=90),
    dict(type='MultiStepLR', milestones=[24430, 26466], gamma=0.1, by_epoch=False, begin=0, end=max_iters),
]
train_cfg = dict(max_iters=max_iters)
