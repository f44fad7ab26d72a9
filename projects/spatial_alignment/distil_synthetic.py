# Distillation of the encoder that align_synthetic.py aligned into one of half its width, from random weights.
#
#   command   python tools/train.py projects/spatial_alignment/distil_synthetic.py --iterations 160
#             python projects/spatial_alignment/pretrain_pooled.py --width 96 --steps 160 --lr 1e-3 --name without
#             (the second one to compare)
#   data      as align_synthetic.py
#   hardware  one or two CPU cores
#   cost      2.5 minutes of one core of a busy CPU
#   expected  mIoU 22.9, RMSE 0.83 m and J&F 62.8, without 16.6, 1.44 m and 55.4, mean of three seeds, measured here
#             (docs/alignment.md)
#
# Both students see 2560 images: 160 steps of 16.

_base_ = 'align_synthetic.py'

model = dict(
    backbone=dict(
        variant=dict(img_size=192, patch_size=8, embed_dim=96, depth=5, num_heads=3),
        drop_path_rate=0.0,
        frozen_stages=-1,
        init_cfg=None,
    ),
    masking=None,
    teachers=dict(
        _delete_=True,
        spatial=dict(
            type='EncoderTeacher',
            layer=-1,
            variant=dict(img_size=192, patch_size=8, embed_dim=192, depth=8, num_heads=3),
            init_cfg=dict(type='Pretrained', checkpoint='work_dirs/align_synthetic/iter_100.pth'),
        ),
    ),
    losses=[
        dict(kind='token_cosine', teacher='spatial', weight=1.0, linear=True),
        dict(kind='pairwise_similarity', teacher='spatial', weight=1.0, sharpness=None),
    ],
)
optim_wrapper = dict(optimizer=dict(lr=1e-3))
