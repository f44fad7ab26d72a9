# Shared by the stages of DETA: model, optimizer, training by epochs, recomputed activations.

_base_ = [
    '../../../configs/_base_/models/deta_pe.py',
    '../../../configs/_base_/schedules/deta.py',
    '../../../configs/_base_/detection_runtime.py',
]

model = dict(grad_checkpointing=True)  # of the deformable encoder; the base sets the backbone's
default_hooks = dict(checkpoint=dict(by_epoch=True, interval=1))
log_processor = dict(by_epoch=True)
