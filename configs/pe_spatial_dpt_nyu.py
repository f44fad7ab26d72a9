# DPT on four frozen layers of PE-Spatial on NYUv2, with DINOv2's recipe.
#
#   command   torchrun --nproc_per_node 8 tools/train.py configs/pe_spatial_dpt_nyu.py --launcher pytorch
#             python tools/train.py configs/pe_spatial_dpt_nyu.py --cfg-options train_dataloader.batch_size=16
#             python tools/test.py configs/pe_spatial_dpt_nyu.py work_dirs/pe_spatial_dpt_nyu/iter_38400.pth
#   data      data/nyu (projects/nyu_depth/README.md), or --data-root FOLDER
#   hardware  8 GPUs with 2 images each, or one with 16; memory not measured yet
#   cost      38400 iterations of 16 images, without gradients in the encoder; not measured yet
#   expected  not measured yet, and not published for PE with four layers. RMSE in meters with this recipe, by DINOv2's
#             authors (Tab. 11): DINOv2-S 0.356, B 0.317, L 0.293, g 0.279; OpenCLIP-G 0.414. PE-Spatial-G with DPT on
#             one layer, by Meta: 0.262, see pe_spatial_dpt_single_nyu.py
#
# Another size, other layers ('late', numbers) or another encoder: as in pe_spatial_lin1_nyu.py; widths follow.
# The class token in the readout, as in DINOv2 (PE-Spatial-G has none; use token=mean):
#   --cfg-options model.decode_head.readout=project model.decode_head.token=class
# Bins instead of a regression, as in DINOv3: --cfg-options model.decode_head.bins=256
# Every level has a batch norm, as in DINOv3, because PE-Spatial has no final norm and the scales of its layers differ.
# To train the encoder too, with layer-wise learning rates: --cfg-options model.frozen=False
#   optim_wrapper.constructor=LayerDecayOptimWrapperConstructor optim_wrapper.paramwise_cfg.layer_decay_rate=0.8

_base_ = 'pe_spatial_lin4_nyu.py'

model = dict(
    decode_head=dict(_delete_=True, type='DPTDepthHead', norm='batch', min_depth=1e-3, max_depth=_base_.max_depth))
