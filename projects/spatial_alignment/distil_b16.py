# PE-Spatial-G into a smaller encoder: the released T, S, B and L were made like this.
#
#   command   torchrun --nproc_per_node 8 tools/train.py projects/spatial_alignment/distil_b16.py --launcher pytorch
#                 --data-root IMAGES
#   data      images without labels, of the domain that the encoder is for
#   hardware  8 GPUs of 80 GB, 32 images on each
#   cost      planned: see docs/alignment.md
#   expected  not measured. The authors' PE-Spatial-B (last layer): ADE20k 44.4 mIoU (NeurIPS version, Tab. 37)
#
# Another size:     --cfg-options model.backbone.variant=pe_core_t16_384         (pe_core_s16_384, pe_core_l14_336)
# Another teacher:  --cfg-options model.teachers.spatial.variant=pe_spatial_l14_448
# Adapters only:    --cfg-options "model.backbone.lora=dict(rank=8)"
#
# Stated in the paper (NeurIPS version, appendix E.3): from PE-Core of the size, PE-Spatial-G teaches twice: through
# the similarities of tokens and through their features, mapped by a linear layer; last layers, 1024 tokens, no
# LayerScale. Rate, steps, batch, augmentation and masking are not; chosen here: AdamW, no masking, negative cosine.

_base_ = 'align_g14.py'

image_size = 512  # 32 x 32 patches of 16 pixels
model = dict(
    backbone=dict(variant='pe_core_b16_224', drop_path_rate=0.1, grad_checkpointing=False),
    layer_scale=None,
    masking=None,
    teachers=dict(
        _delete_=True,
        spatial=dict(
            type='EncoderTeacher',
            variant='pe_spatial_g14_448',
            layer=-1,
            dtype='bfloat16',
            init_cfg=dict(type='Pretrained', checkpoint='released'))),
    losses=[
        dict(kind='token_cosine', teacher='spatial', weight=1.0, linear=True),
        dict(kind='pairwise_similarity', teacher='spatial', weight=1.0, sharpness=None),
    ])

train_pipeline = [
    dict(type='LoadUnlabeled'),
    dict(type='AspectJitter', size=image_size, ratio=(0.75, 1.33)),
    dict(type='ColorJitter', brightness=0.32, saturation=0.32),
    dict(type='FlipView'),
    dict(type='PackViews'),
]
train_dataloader = dict(
    batch_size=32,
    num_workers=8,
    dataset=dict(
        _delete_=True,
        type='UnlabeledImages',
        data_root='data/images',
        data_prefix=dict(img=''),
        pipeline=train_pipeline))

max_iters = 40000
optim_wrapper = dict(
    optimizer=dict(_delete_=True, type='AdamW', lr=2e-4, betas=(0.9, 0.95), weight_decay=0.05))
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=1000),
    dict(type='CosineAnnealingLR', by_epoch=False, eta_min=0.0, begin=1000, end=max_iters),
]
train_cfg = dict(max_iters=max_iters)
auto_scale_lr = dict(base_batch_size=256)
runner_type = 'Runner'
