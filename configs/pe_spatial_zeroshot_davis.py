# Zero-shot tracking on DAVIS 2017: PE-Spatial's features propagate the first masks, without training.
#
#   command   python tools/test.py configs/pe_spatial_zeroshot_davis.py released        (or a file of the encoder)
#             torchrun --nproc_per_node 8 tools/test.py configs/pe_spatial_zeroshot_davis.py released --launcher pytorch
#   data      data/davis/{JPEGImages,Annotations}/480p and data/davis/ImageSets/2017/val.txt, or --data-root FOLDER
#   hardware  one GPU; memory not measured yet
#   cost      not measured yet
#   expected  not measured yet. The authors' J&F on the 30 sequences of val (PE, NeurIPS 2025, Tab. 6 and 37): best
#             layer / last layer, with the best layer (1-based) in parentheses:
#               G14-448  61.5 / 61.5 (50 of 50)    L14-448  60.6 / 60.1 (23 of 24)    B16-512  58.9 / 58.4 (11 of 12)
#               S16-512  57.5 / 57.5 (12 of 12)    T16-512  55.0 / 54.6 (11 of 12)
#
# Another size:     --cfg-options model.backbone.variant=pe_spatial_g14_448       (t16_512, s16_512, b16_512, l14_448)
# Another layer:    --cfg-options "model.backbone.out_indices=[10]"               (0-based: the authors' layer 11)
# Another encoder:  --cfg-options model.backbone.variant=timm:vit_base_patch14_dinov2.lvd142m
# Aligned patches:  --cfg-options model.protocol=aligned model.size=420          (DINOv3's short side for patches of 14)
# All layers:       tools/track_zero_shot.py --layers all
#
# The authors used DINO's script (perception_models#46); protocol='dino' is that script with its settings. Their paper
# confirms its 7 context frames, but does not state the frame size (here the script's short side of 480 px) or the
# normalization (here the encoder's own; model.normalization=dino selects the script's).

data_root = 'data/davis/'

model = dict(
    type='ZeroShotTracker',
    backbone=dict(
        type='PerceptionEncoder',
        variant='pe_spatial_b16_512',
        out_indices=[-1],
        init_cfg=dict(type='Pretrained', checkpoint='released')),
    protocol='dino',
    size=480,
    normalization='encoder',
    propagation=dict(context=7, radius=12, shape='square', topk=5, temperature=0.1))

test_dataloader = dict(
    batch_size=1,
    num_workers=0,  # the model reads the frames
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(type='VideoDataset', data_root=data_root, sequences=data_root + 'ImageSets/2017/val.txt'))
test_evaluator = dict(type='JandFMetric', ann_dir=data_root)
test_cfg = dict(type='TestLoop')

default_scope = 'mmengine'
custom_imports = dict(
    imports=[
        'pe_spatial.tracking.zero_shot', 'pe_spatial.tracking.vos.datasets', 'pe_spatial.tracking.vos.metric'
    ],
    allow_failed_imports=False)
default_hooks = dict(logger=dict(type='LoggerHook', interval=1))
log_level = 'INFO'
