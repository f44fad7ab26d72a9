"""Tables of the names and shapes of every supported checkpoint layout: theirs, ours, shape.

Names on the other side: perception_models@3e352cc, core/vision_encoder/pe.py (encoders),
apps/detection/detectron2_pe with detectron2@02b5c4e (detectors) and apps/detection/DETA_pe (DETA).

In shapes a letter stands for the same size throughout a file: e width of the encoder, n learned positions, p side of a
patch, m hidden width of the MLP, c channels of the pyramid or of the transformer, a anchors of a cell, f width of the
box head or of a feed-forward layer, b outputs of the regression, C classes; x and y attention weights of a token and of
a query in deformable attention. In addition, d counts the blocks, t the class tokens, s the blocks with LayerScale.
"""

import re
from collections.abc import Mapping
from typing import NamedTuple

from pe_spatial.encoder.checkpoint import RELEASED_TO_OURS
from pe_spatial.encoder.variants import VARIANTS, EncoderConfig


class Row(NamedTuple):
    theirs: str  # the other project's name; '' where there is no place for it
    ours: str
    shape: str  # on our side; '?' where only some models have it


_ENCODER_SHAPES = {
    "cls_token": "1 1 e ?", "pos_embed": "1 n e", "patch_embed.proj.weight": "e 3 p p",
    "norm_pre.weight": "e", "norm_pre.bias": "e",
    "blocks.{}.norm1.weight": "e", "blocks.{}.norm1.bias": "e",
    "blocks.{}.attn.qkv.weight": "3e e", "blocks.{}.attn.qkv.bias": "3e",
    "blocks.{}.attn.proj.weight": "e e", "blocks.{}.attn.proj.bias": "e",
    "blocks.{}.gamma_1": "e ?", "blocks.{}.gamma_2": "e ?",
    "blocks.{}.norm2.weight": "e", "blocks.{}.norm2.bias": "e",
    "blocks.{}.mlp.fc1.weight": "m e", "blocks.{}.mlp.fc1.bias": "m",
    "blocks.{}.mlp.fc2.weight": "e m", "blocks.{}.mlp.fc2.bias": "e",
}  # fmt: skip
_ENCODER = [Row(theirs, ours, _ENCODER_SHAPES[ours]) for theirs, ours in RELEASED_TO_OURS.items()]

# detectron2 | ours | shape. '*' is weight and bias; {} a block, {k} 0 to 3, {s} a stage of the cascade, {m} a stage of
# MMDetection's own mask heads
_DETECTRON2 = """
backbone.simfp_2.0.*            | backbone.pyramid.levels.0.0.*      | e e/2 2 2; e/2
backbone.simfp_2.1.*            | backbone.pyramid.levels.0.1.*      | e/2; e/2
backbone.simfp_2.3.*            | backbone.pyramid.levels.0.3.*      | e/2 e/4 2 2; e/4
backbone.simfp_2.4.weight       | backbone.pyramid.levels.0.4.weight | c e/4 1 1
backbone.simfp_2.4.norm.*       | backbone.pyramid.levels.0.5.*      | c; c
backbone.simfp_2.5.weight       | backbone.pyramid.levels.0.6.weight | c c 3 3
backbone.simfp_2.5.norm.*       | backbone.pyramid.levels.0.7.*      | c; c
backbone.simfp_3.0.*            | backbone.pyramid.levels.1.0.*      | e e/2 2 2; e/2
backbone.simfp_3.1.weight       | backbone.pyramid.levels.1.1.weight | c e/2 1 1
backbone.simfp_3.1.norm.*       | backbone.pyramid.levels.1.2.*      | c; c
backbone.simfp_3.2.weight       | backbone.pyramid.levels.1.3.weight | c c 3 3
backbone.simfp_3.2.norm.*       | backbone.pyramid.levels.1.4.*      | c; c
backbone.simfp_4.0.weight       | backbone.pyramid.levels.2.0.weight | c e 1 1
backbone.simfp_4.0.norm.*       | backbone.pyramid.levels.2.1.*      | c; c
backbone.simfp_4.1.weight       | backbone.pyramid.levels.2.2.weight | c c 3 3
backbone.simfp_4.1.norm.*       | backbone.pyramid.levels.2.3.*      | c; c
backbone.simfp_5.1.weight       | backbone.pyramid.levels.3.1.weight | c e 1 1
backbone.simfp_5.1.norm.*       | backbone.pyramid.levels.3.2.*      | c; c
backbone.simfp_5.2.weight       | backbone.pyramid.levels.3.3.weight | c c 3 3
backbone.simfp_5.2.norm.*       | backbone.pyramid.levels.3.4.*      | c; c
proposal_generator.rpn_head.conv.conv0.*        | rpn_head.rpn_conv.0.conv.*                     | c c 3 3; c
proposal_generator.rpn_head.conv.conv1.*        | rpn_head.rpn_conv.1.conv.*                     | c c 3 3; c
proposal_generator.rpn_head.objectness_logits.* | rpn_head.rpn_cls.*                             | a c 1 1; a
proposal_generator.rpn_head.anchor_deltas.*     | rpn_head.rpn_reg.*                             | 4a c 1 1; 4a
roi_heads.box_head{s}.conv{k+1}.weight          | roi_head.bbox_head{s}.shared_convs.{k}.conv.weight | c c 3 3
roi_heads.box_head{s}.conv{k+1}.norm.*          | roi_head.bbox_head{s}.shared_convs.{k}.ln.*    | c; c
roi_heads.box_head{s}.fc1.*                     | roi_head.bbox_head{s}.shared_fcs.0.*           | f 49c; f
roi_heads.box_predictor{s}.cls_score.*          | roi_head.bbox_head{s}.fc_cls.*                 | C+1 f; C+1
roi_heads.box_predictor{s}.bbox_pred.*          | roi_head.bbox_head{s}.fc_reg.*                 | b f; b
roi_heads.box_predictor{s}.fed_loss_cls_weights | roi_head.bbox_head{s}.loss_cls.class_weights   | C ?
roi_heads.mask_head.mask_fcn{k+1}.weight        | roi_head.mask_head{m}.convs.{k}.conv.weight    | c c 3 3
roi_heads.mask_head.mask_fcn{k+1}.norm.*        | roi_head.mask_head{m}.convs.{k}.ln.*           | c; c
roi_heads.mask_head.deconv.*                    | roi_head.mask_head{m}.upsample.*               | c c 2 2; c
roi_heads.mask_head.predictor.*                 | roi_head.mask_head{m}.conv_logits.*            | C c 1 1; C
"""

# DETA_pe | ours | shape. {} a block, {i} a layer of the transformer's encoder, {j} of its decoder, {h} a layer of the
# decoder or, the last, the proposals
_DETA = """
backbone.0.body.fpn1.0.*                              | backbone.pyramid.levels.0.*                 | e e/2 2 2; e/2
input_proj.0.0.*                                      | neck.convs.0.conv.*                         | c e/2 1 1; c
input_proj.0.1.*                                      | neck.convs.0.gn.*                           | c; c
input_proj.1.0.*                                      | neck.convs.1.conv.*                         | c e 1 1; c
input_proj.1.1.*                                      | neck.convs.1.gn.*                           | c; c
input_proj.2.0.*                                      | neck.convs.2.conv.*                         | c e 1 1; c
input_proj.2.1.*                                      | neck.convs.2.gn.*                           | c; c
input_proj.3.0.*                                      | neck.extra_convs.0.conv.*                   | c e 3 3; c
input_proj.3.1.*                                      | neck.extra_convs.0.gn.*                     | c; c
input_proj.4.0.*                                      | neck.extra_convs.1.conv.*                   | c c 3 3; c
input_proj.4.1.*                                      | neck.extra_convs.1.gn.*                     | c; c
transformer.level_embed                               | level_embed                                 | 5 c
transformer.encoder.layers.{i}.self_attn.attention_weights.* | encoder.layers.{i}.self_attn.attention_weights.* | x c; x
transformer.encoder.layers.{i}.self_attn.sampling_offsets.* | encoder.layers.{i}.self_attn.sampling_offsets.* | 2x c; 2x
transformer.encoder.layers.{i}.self_attn.value_proj.* | encoder.layers.{i}.self_attn.value_proj.* | c c; c
transformer.encoder.layers.{i}.self_attn.output_proj.* | encoder.layers.{i}.self_attn.output_proj.* | c c; c
transformer.encoder.layers.{i}.norm1.*                | encoder.layers.{i}.norms.0.*                | c; c
transformer.encoder.layers.{i}.linear1.*              | encoder.layers.{i}.ffn.layers.0.0.*         | f c; f
transformer.encoder.layers.{i}.linear2.*              | encoder.layers.{i}.ffn.layers.1.*           | c f; c
transformer.encoder.layers.{i}.norm2.*                | encoder.layers.{i}.norms.1.*                | c; c
transformer.decoder.layers.{j}.self_attn.in_proj_*    | decoder.layers.{j}.self_attn.attn.in_proj_* | 3c c; 3c
transformer.decoder.layers.{j}.self_attn.out_proj.*   | decoder.layers.{j}.self_attn.attn.out_proj.* | c c; c
transformer.decoder.layers.{j}.norm2.*                | decoder.layers.{j}.norms.0.*                | c; c
transformer.decoder.layers.{j}.cross_attn.attention_weights.* |decoder.layers.{j}.cross_attn.attention_weights.*| y c; y
transformer.decoder.layers.{j}.cross_attn.sampling_offsets.* |decoder.layers.{j}.cross_attn.sampling_offsets.*| 2y c; 2y
transformer.decoder.layers.{j}.cross_attn.value_proj.* | decoder.layers.{j}.cross_attn.value_proj.* | c c; c
transformer.decoder.layers.{j}.cross_attn.output_proj.* | decoder.layers.{j}.cross_attn.output_proj.* | c c; c
transformer.decoder.layers.{j}.norm1.*                | decoder.layers.{j}.norms.1.*                | c; c
transformer.decoder.layers.{j}.linear1.*              | decoder.layers.{j}.ffn.layers.0.0.*         | f c; f
transformer.decoder.layers.{j}.linear2.*              | decoder.layers.{j}.ffn.layers.1.*           | c f; c
transformer.decoder.layers.{j}.norm3.*                | decoder.layers.{j}.norms.2.*                | c; c
transformer.enc_output.*                              | memory_trans_fc.*                           | c c; c
transformer.enc_output_norm.*                         | memory_trans_norm.*                         | c; c
transformer.pos_trans.*                               | pos_trans_fc.*                              | 2c 2c; 2c
transformer.pos_trans_norm.*                          | pos_trans_norm.*                            | 2c; 2c
transformer.pix_trans.*                               | pix_trans_fc.*                              | c c; c
transformer.pix_trans_norm.*                          | pix_trans_norm.*                            | c; c
class_embed.{h}.*                                     | bbox_head.cls_branches.{h}.*                | C c; C
bbox_embed.{h}.layers.0.*                             | bbox_head.reg_branches.{h}.0.*              | c c; c
bbox_embed.{h}.layers.1.*                             | bbox_head.reg_branches.{h}.2.*              | c c; c
bbox_embed.{h}.layers.2.*                             | bbox_head.reg_branches.{h}.4.*              | 4 c; 4
"""


def _detector_rows(encoder: str, table: str) -> list[Row]:
    rows = [
        Row("" if ours == "cls_token" else f"{encoder}{theirs}", f"backbone.encoder.{ours}", shape)
        for theirs, ours, shape in _ENCODER
    ]
    for line in table.strip().splitlines():
        for k in range(4 if "{k}" in line else 1):
            numbered = line.replace("{k}", str(k)).replace("{k+1}", str(k + 1))
            theirs, ours, shapes = (part.strip() for part in numbered.split("|"))
            for tensor, shape in zip(("weight", "bias"), shapes.split("; "), strict=False):
                rows.append(Row(theirs.replace("*", tensor), ours.replace("*", tensor), shape))
    return rows


ENCODERS = {"detectron2": "backbone.net.", "deta": "backbone.0.body."}
"""Layout of a detector -> how the names of its encoder begin."""

ROWS = {
    "encoder": _ENCODER,
    "detector": _detector_rows(ENCODERS["detectron2"], _DETECTRON2),
    "DETA": _detector_rows(ENCODERS["deta"], _DETA),
}
"""Kind of a checkpoint -> its table."""

THEIRS = ("release", "detectron2", "deta")
"""Layouts whose names are the first column; those of the others are the second."""

DETECTOR_MARKS = {
    "backbone.net.transformer.resblocks.0.": ("detector", "detectron2"),
    "backbone.0.body.transformer.resblocks.0.": ("DETA", "deta"),
    "pix_trans_fc.": ("DETA", "mmdet"),
    "backbone.encoder.blocks.0.": ("detector", "mmdet"),
}
"""How a name begins -> (kind, layout); the first match counts."""

ENCODER_MARKS = {"transformer.resblocks.0.": "release", "blocks.0.": "pe_spatial"}
"""How a name begins -> layout, for the encoder of any other file."""

SYNONYMS = {
    ("encoder", "mmdet"): "pe_spatial",
    ("detector", "pe_spatial"): "mmdet",
    ("detector", "release"): "detectron2",
    ("DETA", "pe_spatial"): "mmdet",
    ("DETA", "release"): "deta",
}
"""(kind, target) -> layout."""

NO_PLACE = {
    "cls_token": "the released detectors have no class token",
    "mask_head": "detectron2's cascade has one mask head for all stages; the config that maps is built on "
    "configs/_base_/models/cascade_mask_rcnn_pe.py",
}
"""Part of our name -> why the other side has none."""

ROPE = re.compile(r"backbone\.(net|0\.body)\.(rope_(win|glb)|transformer\.resblocks\.\d+\.attn\.rope)\.freqs_(cos|sin)")
"""Rotary tables in a released detector."""

ALIAS = re.compile(r"transformer\.decoder\.((?:class|bbox)_embed\..+)")
"""Second names of DETA's heads; the group is the first."""

DETA_CLASSES = 91
COCO_CATEGORY_IDS = tuple(i for i in range(1, 91) if i not in (12, 26, 29, 30, 45, 66, 68, 69, 71, 83))
"""The 80 categories of COCO, in MMDetection's order; DETA has a class for every number up to the largest."""


def released_configs(sizes: Mapping[str, int], *, letters: str = "emndts") -> list[EncoderConfig]:
    """Return the released configurations with these shapes, whatever their patch size."""
    alike = []
    for config in VARIANTS.values():
        own = {"e": config.embed_dim, "m": int(config.embed_dim * config.mlp_ratio), "d": config.depth,
               "n": config.grid_size**2 + config.class_token, "t": int(config.class_token),
               "s": 0 if config.init_values is None else config.depth}  # fmt: skip
        if all(sizes[letter] == own[letter] for letter in letters):
            alike.append(config)
    return alike
