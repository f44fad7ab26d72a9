# A linear probe of the frozen encoder in the package, on the built-in synthetic dataset: a small version of
# pe_spatial_lin1_nyu.py.
#
#   command   as in synthetic_dpt.py, with this config
#   data      the same
#   hardware  two CPU cores
#   cost      80 s of CPU time
#   expected  RMSE 0.577 m, measured here. Predicting the mean depth gives 1.506 m, DPT 0.471 m

_base_ = 'synthetic_dpt.py'

model = dict(
    backbone=dict(out_indices='last'),
    decode_head=dict(_delete_=True, type='BinsDepthHead', norm='batch', max_depth=_base_.max_depth),
    losses=[dict(type='SigLoss', warm_up=20)])
