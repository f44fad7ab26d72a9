"""Convert the checkpoint of an encoder or a detector into another layout, without running code that it may contain.

pe-spatial convert_checkpoint PE-Spatial-G14-448.pt pe_spatial_g14_16px.pth --to detectron2
pe-spatial convert_checkpoint hf://facebook/PE-Detection/mask_rcnn_PEspatial_G_coco36ep.pth g14.pth --to mmdet
pe-spatial convert_checkpoint hf://facebook/PE-Detection/deta_coco_1824pix.pth deta.pth --to mmdet
pe-spatial convert_checkpoint work_dirs/coco/iter_66375.pth for_detectron2.pth --to detectron2
pe-spatial convert_checkpoint work_dirs/any/iter_90000.pth weights.pth --to same

The layout of IN is detected. OUT ends in .pt, .pth or .safetensors. Some layouts coincide:

- detector: pe_spatial is mmdet, because our detectors are MMDetection's; release is detectron2, because Meta published
  them that way (DETA: in a layout of its own). timm has no detectors, and detectron2 has no DETA: an error.
- detectors that convert: Mask R-CNN and Cascade Mask R-CNN with Detectron2's heads (configs/_base_/models/*_rcnn_pe.py)
  and DETA. Heads of MMDetection, such as those of the demo config and of swapped configs, stay in MMDetection.
- same: the names of any checkpoint stay, and only weights, class names and config are kept: no optimizer.
- encoder: mmdet is pe_spatial; a config loads it with model.backbone.init_cfg.checkpoint=OUT.
"""

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("input", metavar="IN", help="a .pt, .pth or .safetensors file, or hf://owner/repo/file")
    parser.add_argument("output", metavar="OUT", help="file to write")
    layouts = ["pe_spatial", "mmdet", "detectron2", "timm", "release", "same"]
    parser.add_argument("--to", required=True, choices=layouts, help="layout of OUT")
    kept = "keep DETA's 91 classes, one per category id, instead of COCO's 80"
    parser.add_argument("--all-classes", action="store_true", help=kept)


def run(args: argparse.Namespace) -> None:
    from pe_spatial.convert.class_names import name_classes
    from pe_spatial.convert.converter import check_destination, convert, write_checkpoint
    from pe_spatial.convert.report import report
    from pe_spatial.encoder.files import locate, read_checkpoint, split_entry

    source = locate(args.input)
    check_destination(args.output, split_entry(source)[0])
    conversion = name_classes(convert(read_checkpoint(source), args.to, all_classes=args.all_classes))
    size = write_checkpoint(args.output, conversion)
    print(report(conversion))
    print(
        f"{source} ({conversion.kind}, {conversion.layout_in}) -> {args.output} ({conversion.layout_out}): "
        f"{len(conversion.state)} tensors, {size:,} bytes"
    )
