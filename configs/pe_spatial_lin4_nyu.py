# Linear depth probe of four frozen layers of PE-Spatial on NYUv2, with DINOv2's protocol (lin4_dinov2).
#
#   command   as in pe_spatial_lin1_nyu.py, with this config
#   data      the same
#   hardware  the same; not measured yet
#   cost      the same; not measured yet
#   expected  not measured yet, and not published for PE. RMSE in meters with this protocol, by DINOv2's authors
#             (Tab. 11): DINOv2-S 0.417, B 0.362, L 0.333, g 0.298; iBOT-L 0.387; OpenCLIP-G 0.510
#
# The recipe is that of pe_spatial_lin1_dinov2_nyu.py (see there for PE-Spatial-G, without class token). 'even' reads
# blocks [2, 5, 8, 11] of 12, [5, 11, 17, 23] of 24 (DINOv2-L reads [4, 11, 17, 23]) and [12, 24, 37, 49] of 50; 'late'
# reads [7, 8, 10, 11], [14, 17, 20, 23] and [31, 37, 43, 49]; numbers are allowed too.

_base_ = 'pe_spatial_lin1_dinov2_nyu.py'

model = dict(backbone=dict(out_indices='even'))
