# Linear depth probe of four frozen layers of PE-Spatial on NYUv2, by DINOv2's protocol (lin4_dinov2).
#
#   command   as pe_spatial_lin1_nyu.py, with this config
#   data      as there
#   hardware  as there; not measured yet
#   cost      as there; not measured yet
#   expected  not measured yet, and never published for PE. RMSE in metres under this protocol, DINOv2's authors
#             (Tab. 11): DINOv2-S 0.417, B 0.362, L 0.333, g 0.298; iBOT-L 0.387; OpenCLIP-G 0.510
#
# The recipe is that of pe_spatial_lin1_dinov2_nyu.py, with which it shares what it says about PE-Spatial-G's missing
# class token. 'even' reads blocks [2, 5, 8, 11] of 12, [5, 11, 17, 23] of 24 (DINOv2's own L reads [4, 11, 17, 23]) and
# [12, 24, 37, 49] of 50; 'late' [7, 8, 10, 11], [14, 17, 20, 23] and [31, 37, 43, 49]; or give numbers.

_base_ = 'pe_spatial_lin1_dinov2_nyu.py'

model = dict(backbone=dict(out_indices='even'))
