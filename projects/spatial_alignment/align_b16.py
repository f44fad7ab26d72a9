# PE-Core-B to a spatial encoder of your own images, on one GPU.
#
#   command   python tools/train.py projects/spatial_alignment/align_b16.py --data-root IMAGES
#   data      any folder of images, searched recursively; 50,000 are enough for 10 passes
#   hardware  one GPU of 24 GB, or less with train_dataloader.batch_size and optim_wrapper.accumulative_counts
#   cost      planned: see docs/alignment.md
#   expected  not measured: there were neither released weights nor a GPU. The released PE-Spatial-B was not made by
#             alignment of its own layer, but by distillation from PE-Spatial-G: see distil_b16.py
#
# COCO's images:    --cfg-options train_dataloader.dataset.ann_file=annotations/instances_train2017.json
#                   train_dataloader.dataset.data_prefix.img=train2017
# Tar shards:       --cfg-options train_dataloader.dataset.type=TarShards
# Another layer:    --cfg-options model.teachers.core.layer=7       (find it first: tools/geometry.py)
# Adapters only:    --cfg-options "model.backbone.lora=dict(rank=8)" model.layer_scale=None
#
# Changes from the paper: layer 9 of 12 (as deep, in proportion, as 41 of 50), SAM 2.1 tiny, batch 256, drop path .1, a
# lower rate of AdamW instead of LAMB, which is for large batches, and a short warm-up.

_base_ = 'align_g14.py'

image_size = 448
model = dict(
    backbone=dict(variant='pe_core_b16_224', drop_path_rate=0.1, grad_checkpointing=False),
    teachers=dict(core=dict(layer=8, dtype='float32'), sam=dict(size='tiny')))

train_dataloader = dict(
    batch_size=32,
    num_workers=8,
    dataset=dict(
        _delete_=True,
        type='UnlabeledImages',
        data_root='data/images',
        data_prefix=dict(img=''),
        pipeline=_base_.train_pipeline))

max_iters = 16000  # of 32 images: 10 passes over 50,000
optim_wrapper = dict(
    accumulative_counts=8,
    optimizer=dict(_delete_=True, type='AdamW', lr=1e-4, betas=(0.9, 0.95), weight_decay=0.05))
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=800),
    dict(type='CosineAnnealingLR', by_epoch=False, eta_min=0.0, begin=800, end=max_iters),
]
train_cfg = dict(max_iters=max_iters)
auto_scale_lr = dict(base_batch_size=256)
runner_type = 'Runner'
