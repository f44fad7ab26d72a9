"""Export an encoder or a trained model for ONNX Runtime, OpenVINO, TensorRT or torch without Python.

pe-spatial export pe_spatial_b16_512 --layers 5,8,11 --out exported --format onnx
pe-spatial export work_dirs/coco/iter_66375.pth --out exported --format openvino
pe-spatial export --verify exported              # again, anywhere, with the runtime alone

Writes into --out the graph, manifest.json, and a certificate: the largest difference from PyTorch at every stage.
`pe-spatial predict --checkpoint exported` runs it without torch.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from pe_spatial.cli.arguments import VARIANT_HELP, comma_separated, variant
from pe_spatial.errors import ConfigError
from pe_spatial.runtime.manifest import FORMATS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    source = f"checkpoint, config, or {VARIANT_HELP}"
    parser.add_argument("source", nargs="?", type=variant, metavar="MODEL", help=source)
    parser.add_argument("--out", type=Path, help="new folder to write")
    parser.add_argument("--format", choices=FORMATS, default="onnx", help="what to write")
    group = parser.add_argument_group("encoders")
    weights = "file of weights, or none for random ones (default: the released ones)"
    group.add_argument("--weights", help=weights)
    group.add_argument("--layers", type=comma_separated, default=[-1], metavar="5,8,11", help="blocks to return")
    group.add_argument("--geometry", choices=["release", "timm", "vitdet", "deta"], help="(default: release)")
    inputs = "pixels: uint8 RGB (B, H, W, 3), normalized in the graph; images: normalized float32 (B, 3, H, W)"
    group.add_argument("--input", choices=["pixels", "images"], default="pixels", help=inputs)
    group.add_argument("--whole-windows", action="store_true", help="take only images of complete attention windows")


def run(args: argparse.Namespace) -> None:
    if args.source is None or args.out is None:
        raise ConfigError("name the model and the folder: pe-spatial export MODEL --out FOLDER")
    from pe_spatial.export.graph import export
    from pe_spatial.export.models import build_encoder, is_encoder

    if not is_encoder(args.source):
        raise ConfigError(f"{args.source} is not an encoder; only encoders are exported so far")
    exportable = build_encoder(
        args.source, weights=args.weights, layers=args.layers, geometry=args.geometry or "release", inputs=args.input,
        whole_windows=args.whole_windows or args.format == "torch",
    )  # fmt: skip
    manifest = export(exportable, args.out, form=args.format)
    print(f"{args.out}: {manifest.task}, {args.format}, {', '.join(manifest.outputs)}")
