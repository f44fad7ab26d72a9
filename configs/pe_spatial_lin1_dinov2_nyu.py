# Linear depth probe of one frozen layer of PE-Spatial on NYUv2, with DINOv2's protocol: the class token concatenated to
# every patch, logits upsampled by four. Not comparable to pe_spatial_lin1_nyu.py: DINOv2-g has 0.344 here, 0.372 there.
#
#   command   as in pe_spatial_lin1_nyu.py, with this config
#   data      the same
#   hardware  the same; not measured yet
#   cost      the same; not measured yet
#   expected  not measured yet, and not published for PE. RMSE in meters with this protocol, by DINOv2's authors
#             (Tab. 11): DINOv2-S 0.449, B 0.399, L 0.384, g 0.344; iBOT-L 0.417; OpenCLIP-G 0.541
#
# Another size, layer or encoder: as there. PE-Spatial-G has no class token; use the mean of the patches instead:
#   --cfg-options model.backbone.variant=pe_spatial_g14_448 model.decode_head.token=mean
#
# DINOv2's recipe, recovered from copies of its configs: 256 even bins from 1 mm to 10 m, weights relu + 0.1; SigLoss
# and 0.5 times a gradient loss (theirs compared images and was 0 for two images per GPU; ours is spatial); AdamW 1e-4
# (5e-3 in one copy), weight decay 0.01, gradients clipped at 35; linear warm-up over 12800 of 38400 iterations times a
# cosine. Their one-cycle momentum is omitted. Their features pass the encoder's final norm; PE-Spatial has none, and a
# layer norm in the head replaces it (without it: model.decode_head.norm=None).

_base_ = 'pe_spatial_lin1_nyu.py'

model = dict(
    decode_head=dict(token='class', upsample=4, norm='layer'),
    losses=[dict(type='SigLoss', loss_weight=1.0), dict(type='GradientLoss', loss_weight=0.5)])
optim_wrapper = dict(optimizer=dict(lr=1e-4, betas=(0.9, 0.999), weight_decay=0.01))
param_scheduler = [  # the product of both
    dict(type='LinearLR', start_factor=1e-3, by_epoch=False, begin=0, end=_base_.warm_up),
    dict(type='CosineAnnealingLR', eta_min_ratio=1e-8, by_epoch=False, begin=0, end=_base_.iterations),
]
