# Distillation of the encoder that align_synthetic.py aligned into one of half its width, from random weights.
#
#   command   python tools/train.py projects/spatial_alignment/distil_synthetic.py
#             python projects/spatial_alignment/pretrain_pooled.py --width 96 --steps 150 --name without
#             (the second one to compare)
#   data      as align_synthetic.py
#   hardware  one or two CPU cores
#   cost      3 minutes of one core of a busy CPU for 80 steps (--iterations 80)
#   expected  after 80 steps RMSE 1.05 m and mIoU 19.8, without 1.43 m and 14.1, measured here (docs/alignment.md)
#
# Both students see 4800 images: 150 steps of 32.

_base_ = 'align_synthetic.py'

model = dict(
    backbone=dict(
        variant=dict(img_size=192, patch_size=8, embed_dim=96, depth=5, num_heads=3), drop_path_rate=0.0, init_cfg=None
    ),
    masking=None,
    teachers=dict(
        _delete_=True,
        spatial=dict(
            type='EncoderTeacher',
            layer=-1,
            variant=dict(img_size=192, patch_size=8, embed_dim=192, depth=8, num_heads=3),
            init_cfg=dict(type='Pretrained', checkpoint='work_dirs/align_synthetic/iter_150.pth'),
        ),
    ),
    losses=[
        dict(kind='token_cosine', teacher='spatial', weight=1.0, linear=True),
        dict(kind='pairwise_similarity', teacher='spatial', weight=1.0, sharpness=None),
    ],
)
train_dataloader = dict(batch_size=32)
optim_wrapper = dict(optimizer=dict(lr=1e-3))
