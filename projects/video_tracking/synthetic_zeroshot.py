# Label propagation with the encoder of synthetic.py on the same clips, without training: a baseline for training.
#
#   command   python tools/test.py projects/video_tracking/synthetic_zeroshot.py released
#   data      as synthetic.py
#   hardware  one CPU core
#   cost      half a minute
#   expected  J&F 84.8, measured here

_base_ = '../../configs/pe_spatial_zeroshot_davis.py'

data_root = 'work_dirs/video_world/'
model = dict(
    backbone=dict(variant='pe_synthetic_xs8_192'),
    protocol='aligned',
    size=192)
test_dataloader = dict(
    dataset=dict(
        data_root=data_root,
        sequences=None,
        data_prefix=dict(img_path='val', ann_path='instances/val')))
test_evaluator = dict(ann_dir=data_root + 'instances/val')
