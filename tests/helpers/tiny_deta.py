"""A DETA of four blocks on images of 64 px, for what must be small: two processes, measured memory."""

from helpers.repository import CONFIGS
from mmengine.config import Config

import pe_spatial.detection  # noqa: F401  (registers)

CONFIG = CONFIGS / "_base_" / "models" / "deta_pe.py"
SIDE, WIDTH = 64, 32


def tiny_deta():
    """Return the config, whose `model` it is."""
    cfg = Config.fromfile(CONFIG)
    part = dict(embed_dims=WIDTH)
    layer = dict(self_attn_cfg=dict(part, num_heads=2), ffn_cfg=dict(part, feedforward_channels=48))
    deformable = dict(part, num_heads=2, num_points=2)
    variant = dict(_delete_=True, img_size=64, patch_size=16, embed_dim=WIDTH, depth=4, num_heads=2, init_values=0.1)
    cfg.merge_from_dict(
        dict(
            default_scope="mmdet",
            model=dict(
                num_queries=20,
                data_preprocessor=dict(pad_size_divisor=SIDE),
                backbone=dict(
                    variant=variant,
                    geometry="release",
                    drop_path_rate=0.0,
                    grad_checkpointing=False,
                    init_cfg=None,
                ),
                neck=dict(out_channels=WIDTH, norm_cfg=dict(num_groups=4)),
                positional_encoding=dict(num_feats=WIDTH // 2),
                encoder=dict(num_layers=2, layer_cfg=dict(layer, self_attn_cfg=deformable)),
                decoder=dict(num_layers=2, layer_cfg=dict(layer, cross_attn_cfg=deformable)),
                bbox_head=dict(num_classes=3, embed_dims=WIDTH),
                test_cfg=dict(class_ids=None),
            ),
        )
    )
    return cfg
