# Linear probe of one frozen layer of PE-Spatial on ADE20k: BatchNorm and one linear map to 150 classes.
#
#   command   torchrun --nproc_per_node 8 tools/train.py configs/pe_spatial_linear_ade20k.py --launcher pytorch
#             python tools/train.py configs/pe_spatial_linear_ade20k.py --cfg-options train_dataloader.batch_size=16
#             python tools/test.py configs/pe_spatial_linear_ade20k.py work_dirs/pe_spatial_linear_ade20k/iter_40000.pth
#   data      data/ade/ADEChallengeData2016/{images,annotations}/{training,validation}, or --data-root FOLDER
#   hardware  8 GPUs with 2 images each, or one with 16; memory not measured yet
#   cost      40000 iterations of 16 images, without gradients in the encoder; not measured yet
#   expected  not measured yet. The authors' mIoU on the validation set (PE, NeurIPS 2025, Tab. 6 and 37): best layer /
#             last layer (best layer, 1-based, of all):
#               G14-448  49.3 / 48.9 (49 of 50)    L14-448  48.1 / 48.1 (24 of 24)    B16-512  44.4 / 44.4 (12 of 12)
#               S16-512  37.5 / 37.5 (12 of 12)    T16-512  27.6 / 27.6 (12 of 12)
#
# Another size:     --cfg-options model.backbone.variant=pe_spatial_g14_448       (t16_512, s16_512, b16_512, l14_448)
# Another layer:    --cfg-options "model.backbone.out_indices=[48]"               (0-based: layer 49 of the paper)
# Another encoder:  --cfg-options model.backbone.variant=timm:vit_base_patch14_dinov2.lvd142m, with its normalization:
#                   "model.data_preprocessor.mean=[123.675,116.28,103.53]"
#                   "model.data_preprocessor.std=[58.395,57.12,57.375]"
#
# The authors published no code for this. From their paper: the encoder is frozen, one layer is read; BatchNorm and a
# linear layer follow, as in DINOv2; features are resized to 518 x 518 (here the logits, which is the same in
# evaluation); AdamW at 1e-3. As in their transform, pixels in [0, 255] are mapped to [-1, 1].
# The rest is from DINOv2: crops of 512 px from images with a short side of 512 px times 0.5 to 2.0 and the aspect ratio
# kept (PE's own transform resizes to a square), flips, photometric distortion; zero padding from 512 px to 518 px for
# patches of 14; cross-entropy without dropout; batches of 16, weight decay 1e-4, 40000 iterations, linear warm-up over
# 1500, polynomial decay of power 1, float32; windows of 512 px with a stride of 341 px in testing.

_base_ = ['_base_/pixels.py', '_base_/datasets/ade20k_512.py', '_base_/detection_runtime.py']

model = dict(
    type='LinearProbe',
    data_preprocessor=dict(
        type='SegDataPreProcessor',
        **_base_.encoder_pixels,
        size=_base_.crop_size,
        pad_val=0,
        seg_pad_val=255),
    backbone=dict(
        type='PerceptionEncoder',
        variant='pe_spatial_b16_512',
        out_indices=[-1],
        init_cfg=dict(type='Pretrained', checkpoint='released')),
    decode_head=dict(
        type='LinearProbeHead',
        num_classes=150,
        map_size=(518, 518),
        align_corners=False,
        # as in DINOv2: the mean is over all pixels, with and without a label
        loss_decode=dict(type='CrossEntropyLoss', use_sigmoid=False, loss_weight=1.0, avg_non_ignore=False)),
    test_cfg=dict(mode='slide', crop_size=_base_.crop_size, stride=(341, 341)))
sync_bn = 'torch'  # statistics over all GPUs

max_iters = 40000
optim_wrapper = dict(
    type='OptimWrapper', optimizer=dict(type='AdamW', lr=1e-3, betas=(0.9, 0.999), weight_decay=1e-4))
param_scheduler = [  # the product of both
    dict(type='LinearLR', start_factor=1e-6, by_epoch=False, begin=0, end=1500),
    dict(type='PolyLR', power=1.0, eta_min=0.0, by_epoch=False, begin=0, end=max_iters),
]
train_cfg = dict(type='IterBasedTrainLoop', max_iters=max_iters, val_interval=max_iters)
val_cfg = dict(type='ValLoop')
test_cfg = dict(type='TestLoop')
auto_scale_lr = dict(enable=False, base_batch_size=16)

default_scope = 'mmseg'
custom_imports = dict(imports=['pe_spatial.segmentation'], allow_failed_imports=False)
default_hooks = dict(visualization=dict(type='SegVisualizationHook'))
visualizer = dict(type='SegLocalVisualizer')
