# PE in place of a ResNet-50, for configs that are written by hand (tools/swap_backbone.py writes them for you):
#
#   _base_ = ['mmdet::mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py', 'pe_spatial::_base_/backbones/pe_vitdet.py']
#   model = dict(backbone=_base_.pe_backbone, data_preprocessor=_base_.pe_preprocessor)
#   optim_wrapper = _base_.pe_optim_wrapper
#
# If the neck ignores maps (start_level=1), list them: model = dict(backbone=dict(pyramid=dict(unused=[0])), ...) in a
# config that inherits that one. Outside this project's tools, import pe_spatial.integrations.openmmlab before
# the config is read: it makes 'pe_spatial::' known to mmengine.

_base_ = '../pixels.py'

pe_backbone = dict(
    _delete_=True,
    type='PerceptionEncoderPyramid',
    variant='pe_spatial_b16_512',
    geometry='vitdet',
    drop_path_rate='vitdet',
    any_size=True,
    pyramid=dict(strides=[4, 8, 16, 32], out_channels=[256, 512, 1024, 2048], hidden_channels=256),
    init_cfg=dict(type='Pretrained', checkpoint='released'))
pe_preprocessor = dict(**_base_.detector_pixels)
pe_optim_wrapper = dict(
    optimizer=dict(_delete_=True, type='AdamW', lr=1e-4, betas=(0.9, 0.999), weight_decay=0.1),
    constructor='LayerDecayOptimWrapperConstructor',
    paramwise_cfg=dict(layer_decay_rate='vitdet'))
custom_imports = dict(imports=['pe_spatial.integrations.openmmlab'], allow_failed_imports=False)
