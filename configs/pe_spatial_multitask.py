# Boxes with masks, metric depth and tracks by heads that train together on one frozen PE-Spatial.
#
#   command   torchrun --nproc_per_node 8 tools/train.py configs/pe_spatial_multitask.py --launcher pytorch
#             python tools/test.py configs/pe_spatial_cascade_coco.py work_dirs/pe_spatial_multitask/detection.pth
#             pe-spatial predict WALK.mp4 --checkpoint work_dirs/pe_spatial_multitask/{detection,depth,tracking}.pth
#   data      data/coco, data/nyu and data/davis, as the configs of the tasks have them
#   hardware  not measured yet
#   cost      not measured yet
#   expected  not measured yet, and not published: PE's authors train one head at a time
#
# A step has a batch of each task from its own dataset and one update; the run ends with a checkpoint for each task.
# Models, data, batch sizes and optimizers are those of the configs below, changed by `options`; `weight` multiplies the
# losses of a task. The schedule is one for all, with factors on their learning rates. Tune the encoder too, by
# `optim_wrapper.encoder`: --cfg-options model.frozen=False. A small version without downloads: projects/multitask

_base_ = '_base_/runtime.py'

default_scope = 'mmengine'
custom_imports = dict(
    imports=['pe_spatial.integrations.openmmlab', 'pe_spatial.engine', 'pe_spatial.multitask.training'],
    allow_failed_imports=False)

variant = 'pe_spatial_b16_512'
tasks = dict(
    detection=dict(
        config='pe_spatial::pe_spatial_cascade_coco.py',
        options={
            'model.backbone.variant': variant,
            'model.backbone.geometry': 'release',
            'model.backbone.drop_path_rate': 0.0
        },
        weight=1.0),
    depth=dict(
        config='pe_spatial::pe_spatial_dpt_nyu.py', options={'model.backbone.variant': variant}, weight=1.0),
    tracking=dict(
        config='pe_spatial::pe_spatial_sam2_davis.py',
        options={
            'model.tracker.variant': variant,
            'model.tracker.grid': 32,
            'train_dataloader.dataset.pipeline.3.size': 512
        },
        weight=1.0))

model = dict(type='MultiTaskModel', tasks=tasks, checkpoint='released', frozen=True)
train_dataloader = dict(
    batch_size=1,
    num_workers=4,
    persistent_workers=True,
    sampler=dict(type='MultiTaskSampler'),
    collate_fn=dict(type='only_item'),
    dataset=dict(type='MultiTaskDataset', tasks=tasks))

iterations = 40000
train_cfg = dict(type='IterBasedTrainLoop', max_iters=iterations, val_interval=iterations + 1)
optim_wrapper = dict(
    constructor='TaskOptimWrapperConstructor',
    encoder=dict(
        optimizer=dict(type='AdamW', lr=1e-4, weight_decay=0.1),
        clip_grad=dict(max_norm=1.0),
        constructor='LayerDecayOptimWrapperConstructor',
        paramwise_cfg=dict(layer_decay_rate='vitdet')))
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=500),
    dict(type='CosineAnnealingLR', eta_min_ratio=0.01, by_epoch=False, begin=500, end=iterations),
]
default_hooks = dict(checkpoint=dict(interval=2000))
custom_hooks = [dict(type='WriteTasks')]
find_unused_parameters = True  # clips prompted by masks do not use all of the decoder
randomness = dict(seed=0)
