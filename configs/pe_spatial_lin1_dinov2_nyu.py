# Linear depth probe of one frozen layer of PE-Spatial on NYUv2, by DINOv2's protocol: the class token beside every
# patch, logits at four times the grid. Nothing like pe_spatial_lin1_nyu.py: DINOv2-g has 0.344 here, there 0.372.
#
#   command   as pe_spatial_lin1_nyu.py, with this config
#   data      as there
#   hardware  as there; not measured yet
#   cost      as there; not measured yet
#   expected  not measured yet, and never published for PE. RMSE in metres under this protocol, DINOv2's authors
#             (Tab. 11): DINOv2-S 0.449, B 0.399, L 0.384, g 0.344; iBOT-L 0.417; OpenCLIP-G 0.541
#
# Another size, layer or encoder as there. PE-Spatial-G has no class token, so it takes the mean of the patches instead:
#   --cfg-options model.backbone.variant=pe_spatial_g14_448 model.decode_head.token=mean
#
# DINOv2's recipe, recovered from copies of its configs: 256 even bins from 1 mm to 10 m, weights relu + 0.1; SigLoss
# and 0.5 times a gradient loss (theirs was 0 for two images a GPU: it compared images; ours is spatial); AdamW 1e-4
# (5e-3 in one copy), weight decay 0.01, gradients clipped at 35; linear warm-up over 12800 of 38400 iterations times a
# cosine. Their one-cycle momentum is left out. Their features come through the encoder's last norm; PE-Spatial has
# none, so a layer norm of the head stands in for it. model.decode_head.norm=None is the head without it.

_base_ = 'pe_spatial_lin1_nyu.py'

model = dict(
    decode_head=dict(token='class', upsample=4, norm='layer'),
    losses=[dict(type='SigLoss', loss_weight=1.0), dict(type='GradientLoss', loss_weight=0.5)])
optim_wrapper = dict(optimizer=dict(lr=1e-4, betas=(0.9, 0.999), weight_decay=0.01))
param_scheduler = [  # the product of both
    dict(type='LinearLR', start_factor=1e-3, by_epoch=False, begin=0, end=_base_.warm_up),
    dict(type='CosineAnnealingLR', eta_min_ratio=1e-8, by_epoch=False, begin=0, end=_base_.iterations),
]
