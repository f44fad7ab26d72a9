# DPT on one frozen layer of PE-Spatial on NYUv2, the depth evaluation of PE's paper.
#
#   command   as in pe_spatial_dpt_nyu.py, with this config; the best checkpoint is best_rmse_iter_*.pth
#   data      the same
#   hardware  the same; not measured yet
#   cost      20 epochs: 30300 iterations of 16 images, an evaluation after each epoch; not measured yet
#   expected  not measured yet. RMSE in meters by Meta (PE, Tab. 13), best layer / last layer (best layer, 1-based):
#               PE-Spatial-G 0.262 / 0.275 (46 of 50)    PE-Core-G 0.249 / 0.309 (39 of 50)
#               DINOv2-g 0.279 / 0.290 (27 of 40)        DINOv2-L 0.297 / 0.308 (23 of 24)
#             These are the best of 20 epochs, chosen on the 654 test images, and so slightly optimistic. Meta
#             published no results for PE-Spatial L, B, S and T.
#
# Another layer:  --cfg-options "model.backbone.out_indices=[49]"     (0-based: the last of G)
# Another size:   --cfg-options model.backbone.variant=pe_spatial_l14_448 model.backbone.out_indices=last
#
# The authors published no code for this. From their paper: one frozen layer, DPT with a width that follows the model,
# 20 epochs, the best one reported. The rest is from DINOv2 (pe_spatial_dpt_nyu.py): the loss, learning rate, batch and
# sizes, and warm-up over a third of the iterations. All four levels read the same layer.

_base_ = 'pe_spatial_dpt_nyu.py'

model = dict(
    backbone=dict(variant='pe_spatial_g14_448', out_indices=[45]), decode_head=dict(in_index=[0, 0, 0, 0]))

epoch = 1515  # iterations of 16 over 24231 images
iterations, warm_up = 20 * epoch, 20 * epoch // 3
param_scheduler = [  # the product of both
    dict(type='LinearLR', start_factor=1e-3, by_epoch=False, begin=0, end=warm_up),
    dict(type='CosineAnnealingLR', eta_min_ratio=1e-8, by_epoch=False, begin=0, end=iterations),
]
train_cfg = dict(max_iters=iterations, val_interval=epoch)
default_hooks = dict(checkpoint=dict(interval=epoch))
