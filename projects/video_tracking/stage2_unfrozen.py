# Stage 2 of 2: train the encoder too, from the last checkpoint of stage 1, with layer decay.
#
#   command   tools/dist_train.sh projects/video_tracking/stage2_unfrozen.py 8 \
#                 --cfg-options load_from=work_dirs/stage1_frozen/iter_20000.pth
#   data      as stage 1
#   hardware  8 GPUs, one clip of 8 frames each; memory from tools/plan.py in the README
#   cost      10000 iterations of 8 clips; not measured yet
#   expected  not measured yet
#
# Learning rates as in SAM 2's fine-tuning: 5e-6 with layer decay 0.9 in the encoder, also for the neck.
# Large encoders: --cfg-options runner_type=ShardedRunner shards them over the GPUs.

_base_ = 'stage1_frozen.py'

model = dict(
    tracker=dict(frozen=False, encoder_options=dict(grad_checkpointing=True)),
    encoder_weights=None,
    sam2_weights=None,
    recompute=True)
optim_wrapper = dict(paramwise_cfg=dict(custom_keys=dict(_delete_=True)))

iterations = 10000
param_scheduler = [
    dict(type='CosineAnnealingLR', eta_min_ratio=0.1, by_epoch=False, begin=0, end=iterations)
]
train_cfg = dict(max_iters=iterations, val_interval=2500)
