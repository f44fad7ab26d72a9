# Training of every DETA stage, as released (perception_models@3e352cc:apps/detection/DETA_pe/main.py): no warm-up, one
# learning rate for encoder and head, a tenth of it for the offsets of deformable attention, weight decay on all
# parameters. Each stage sets its epochs and learning rate.
# No layer decay: the released scripts set 0.9, but their code applies it only to encoders named 'vev01'.

optim_wrapper = dict(
    type='OptimWrapper',
    optimizer=dict(type='AdamW', weight_decay=1e-4),
    clip_grad=dict(max_norm=0.1),
    paramwise_cfg=dict(custom_keys=dict(sampling_offsets=dict(lr_mult=0.1))))
train_cfg = dict(type='EpochBasedTrainLoop', val_interval=1)
val_cfg = dict(type='ValLoop')
test_cfg = dict(type='TestLoop')
