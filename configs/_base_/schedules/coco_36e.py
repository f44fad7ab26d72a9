# 36 COCO epochs of 64 images as released (perception_models@3e352cc, mask_rcnn_PEspatial_G_coco36ep.py): AdamW, step
# decay at 8/9 and 26/27, 90 iterations of warm-up, layer decay, weight decay on all parameters (also norms and biases).
# bfloat16 replaces the released float16: it needs no loss scale and runs on CPUs.

max_iters = 66375
optim_wrapper = dict(
    type='BFloat16OptimWrapper',
    optimizer=dict(type='AdamW', lr=1e-4, betas=(0.9, 0.999), weight_decay=0.1),
    constructor='LayerDecayOptimWrapperConstructor',
    paramwise_cfg=dict(layer_decay_rate='vitdet', decay_norm_bias=True))
param_scheduler = [
    dict(type='LinearLR', start_factor=0.001, by_epoch=False, begin=0, end=90),
    dict(type='MultiStepLR', milestones=[59000, 63916], gamma=0.1, by_epoch=False, begin=0, end=max_iters),
]
train_cfg = dict(type='IterBasedTrainLoop', max_iters=max_iters, val_interval=5000)
val_cfg = dict(type='ValLoop')
test_cfg = dict(type='TestLoop')
auto_scale_lr = dict(enable=False, base_batch_size=64)
