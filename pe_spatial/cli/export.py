"""Export an encoder or a trained model for ONNX Runtime, OpenVINO, TensorRT or torch.export.

pe-spatial export pe_spatial_b16_512 --layers 5,8,11 --out exported --format onnx
pe-spatial export work_dirs/coco/iter_66375.pth --out exported --format openvino --images photos/*.jpg
pe-spatial export --verify exported              # again, anywhere, with the runtime alone

Writes into --out the graph, manifest.json, and a certificate: the largest difference from PyTorch at every stage. Where
it is above the limits the command fails. `pe-spatial predict --checkpoint exported` runs it without torch.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from pe_spatial.cli.arguments import VARIANT_HELP, comma_separated, variant, without_prints
from pe_spatial.errors import ConfigError
from pe_spatial.images import read_rgb
from pe_spatial.runtime.manifest import FORMATS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    source = f"checkpoint, config, or {VARIANT_HELP}"
    parser.add_argument("source", nargs="?", type=variant, metavar="MODEL", help=source)
    parser.add_argument("--out", type=Path, help="new folder to write")
    parser.add_argument("--format", choices=FORMATS, default="onnx", help="what to write")
    precisions = ("fp32", "fp16", "bf16", "int8", "int8-static")
    precision = "of the file; int8: weights, int8-static: activations too, with --calibration"
    parser.add_argument("--precision", choices=precisions, default="fp32", help=precision)
    parser.add_argument("--calibration", nargs="+", default=[], metavar="FILE", help="images for int8-static")
    parser.add_argument("--config", help="config of other weights (default: the config inside the checkpoint)")
    parser.add_argument("--images", nargs="+", default=[], metavar="FILE", help="images for the certificate")
    truth = "annotations in COCO's form: the certificate of a detector then has AP, before and after; with --image-root"
    parser.add_argument("--annotations", type=Path, metavar="FILE", help=truth)
    parser.add_argument("--image-root", type=Path, metavar="FOLDER", help="folder of the annotated images")
    parser.add_argument(
        "--verify", type=Path, metavar="FOLDER", help="repeat the certificate of a folder, without torch"
    )
    group = parser.add_argument_group("encoders")
    weights = "file of weights, or none for random ones (default: the released ones)"
    group.add_argument("--weights", help=weights)
    group.add_argument("--layers", type=comma_separated, metavar="5,8,11", help="blocks to return (default: the last)")
    group.add_argument("--geometry", choices=["release", "timm", "vitdet", "deta"], help="(default: release)")
    inputs = "pixels: uint8 RGB (B, H, W, 3), normalized in the graph; images: normalized float32 (B, 3, H, W)"
    group.add_argument("--input", choices=["pixels", "images"], help=f"{inputs} (default: pixels)")
    group.add_argument("--whole-windows", action="store_true", help="take only images of complete attention windows")


def run(args: argparse.Namespace) -> None:
    if args.verify is not None:
        run_verify(args)
        return
    if args.source is None or args.out is None:
        raise ConfigError("name the model and the folder: pe-spatial export MODEL --out FOLDER")
    from pe_spatial.export.certificate import certify
    from pe_spatial.export.graph import export

    if (args.annotations is None) != (args.image_root is None):
        raise ConfigError("--annotations and --image-root belong together; give both, or none")
    images = [read_rgb(path) for path in args.images]
    with without_prints():
        exportable, predictor = build(args)
    if exportable is None:
        run_tracker(args, predictor.model)
        return
    with without_prints():
        name = next(iter(exportable.inputs))
        calibration = [{name: read_rgb(path)[None]} for path in args.calibration]
        manifest = export(exportable, args.out, form=args.format, precision=args.precision, calibration=calibration)
    print(f"{args.out}: {manifest.task}, {args.format}, {', '.join(manifest.outputs)}")
    extra = {}
    if args.format == "tensorrt":
        extra["tensorrt"] = build_engine(args.out, manifest)
    if args.annotations is not None:
        extra["ap"] = accuracy(predictor, args)
    print_differences(certify(exportable, args.out, images=images, predictor=predictor, extra=extra))
    for kind, one in extra.get("ap", {}).items():
        print(f"{kind:14} {one['torch']:.4f} in PyTorch, {one['exported']:.4f} here")


def build(args: argparse.Namespace) -> tuple[Any, Any]:
    """Return the `Exportable`, and the predictor of a detector."""
    from pe_spatial.export.models import build_encoder, is_encoder

    options = ("weights", "layers", "geometry", "input", "whole_windows")
    if args.config is None and is_encoder(args.source):
        return build_encoder(
            args.source, weights=args.weights, layers=args.layers or [-1], geometry=args.geometry or "release",
            inputs=args.input or "pixels", whole_windows=args.whole_windows or args.format == "torch",
        ), None  # fmt: skip
    given = [name for name in options if getattr(args, name)]
    if given:
        raise ConfigError(f"{args.source} is no encoder, and --{given[0].replace('_', '-')} is for encoders; omit it")
    import pe_spatial
    from pe_spatial.export.dense import depth_graph, segmenter_graph
    from pe_spatial.export.detector import detector_graph

    predictor: Any = pe_spatial.load(args.source, config=args.config)
    if predictor.task == "tracking":
        return None, predictor
    graphs = {"detection": detector_graph, "depth": depth_graph, "segmentation": segmenter_graph}
    graph = graphs[predictor.task](predictor, source=str(args.source))
    return graph, predictor if predictor.task == "detection" else None


def run_tracker(args: argparse.Namespace, model: Any) -> None:
    """Export the parts of a tracker, without a certificate."""
    from pe_spatial.export.tracker import export_tracker

    if args.images or args.annotations or args.calibration:
        raise ConfigError("a tracker takes no --images, --annotations and --calibration; omit them")
    with without_prints():
        manifest = export_tracker(model, args.out, form=args.format, precision=args.precision, source=str(args.source))
    print(f"{args.out}: {manifest.task}, {args.format}, {', '.join(manifest.options['parts'])}")


def accuracy(predictor: Any, args: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Return AP of PyTorch and of the exported folder."""
    from pe_spatial.export.accuracy import average_precision
    from pe_spatial.runtime.loading import load_exported

    if predictor is None:
        raise ConfigError("--annotations is for detectors, and this is an encoder; omit it")
    sides = {"torch": predictor, "exported": load_exported(args.out)}
    values = {name: average_precision(side, args.annotations, args.image_root) for name, side in sides.items()}
    return {kind: {name: value[kind] for name, value in values.items()} for kind in values["torch"]}


def build_engine(folder: Path, manifest: Any) -> Any:
    """Build TensorRT's engine, or print how."""
    from pe_spatial.export.tensorrt import build

    result = build(folder, manifest)
    how = "built with" if result["built"] else "TensorRT is not installed; build the engine with"
    print(f"{how}: {result['command']}")
    return result


def run_verify(args: argparse.Namespace) -> None:
    """Repeat a certificate."""
    from pe_spatial.runtime.verify import verify

    if args.source is not None or args.out is not None:
        raise ConfigError("--verify takes a folder and nothing else; omit the model and --out")
    print_differences(verify(args.verify))


def print_differences(result: dict[str, Any]) -> None:
    """Print the differences of a certificate in few lines."""
    for name, one in result["stages"].items():
        print(f"{name:14} differs by {one['largest']:.2g} at most (largest value {one['scale']:.3g})")
    found = result["detections"]
    if found:
        print(
            f"detections     {found['theirs']:.0f} of PyTorch, {found['unmatched']:.0f} without partner; boxes within "
            f"{found['box']:.2g} px, scores within {found['score']:.2g}, masks with IoU {found['iou']:.4f} or more"
        )
