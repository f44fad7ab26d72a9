"""Export an encoder or a trained model for ONNX Runtime, OpenVINO, TensorRT or torch.export.

pe-spatial export pe_spatial_b16_512 --layers 5,8,11 --out exported --format onnx
pe-spatial export work_dirs/coco/iter_66375.pth --out exported --format openvino --images photos/*.jpg
pe-spatial export depth.pth --out exported --images rooms/*.jpg --gt depth/        # RMSE of both
pe-spatial export tracker.pth --out exported --images davis/* --gt masks/          # J&F of both
pe-spatial export detector.pth depth.pth tracker.pth --size 512 --out exported     # one graph of their encoder
pe-spatial export --verify exported              # again, anywhere, with the runtime alone

Writes into --out the graph, manifest.json, and a certificate: the largest difference from PyTorch at every stage. Where
it is above the limits the command fails. `pe-spatial predict --checkpoint exported` runs it without torch.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pe_spatial.cli.arguments import VARIANT_HELP, comma_separated, refuse, variant, without_prints
from pe_spatial.errors import ConfigError
from pe_spatial.runtime.manifest import FORMATS

ENCODER_OPTIONS = ("weights", "layers", "geometry", "input", "whole_windows")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    source = f"checkpoint, config, or {VARIANT_HELP}; several checkpoints if they share one frozen encoder"
    parser.add_argument("source", nargs="*", type=variant, metavar="MODEL", help=source)
    parser.add_argument("--out", type=Path, help="new folder to write")
    parser.add_argument("--format", choices=FORMATS, default="onnx", help="what to write")
    precisions = ("fp32", "fp16", "bf16", "int8", "int8-static")
    precision = "of the file; int8: weights, int8-static: activations too, with --calibration"
    parser.add_argument("--precision", choices=precisions, default="fp32", help=precision)
    parser.add_argument("--calibration", nargs="+", default=[], metavar="FILE", help="images for int8-static")
    size = "several checkpoints: side of the square that all get, which the graphs are for"
    parser.add_argument("--size", type=int, metavar="PIXELS", help=size)
    parser.add_argument("--config", help="config of other weights (default: the config inside the checkpoint)")
    parser.add_argument("--images", nargs="+", default=[], metavar="FILE", help="images for the certificate")
    truth = "annotations in COCO's form: the certificate of a detector then has AP, before and after; with --image-root"
    parser.add_argument("--annotations", type=Path, metavar="FILE", help=truth)
    parser.add_argument("--image-root", type=Path, metavar="FOLDER", help="folder of the annotated images")
    truth = "ground truth of --images: depth maps (folder or CSV), or masks of videos (MASKS/VIDEO/FRAME.png)"
    parser.add_argument("--gt", type=Path, metavar="FOLDER|CSV", help=truth)
    parser.add_argument("--gt-scale", type=float, help="units per meter of depth maps in a folder (default: 1000)")
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
    if not args.source or args.out is None:
        raise ConfigError("name the model and the folder: pe-spatial export MODEL --out FOLDER")
    if len(args.source) > 1:
        run_together(args)
        return
    (args.source,) = args.source
    refuse(args, "size", because="one model is exported for any size, without")
    from pe_spatial.export.certificate import certify
    from pe_spatial.export.graph import export

    check_paths(args)
    with without_prints():
        exportable, predictor = build(args)
    check_data(args, getattr(predictor, "task", "encoder"), getattr(predictor, "class_names", ()))
    if exportable is None:
        run_tracker(args, predictor)
        return
    from pe_spatial.images import read_rgb

    images = [read_rgb(path) for path in args.images]
    with without_prints():
        name = next(iter(exportable.inputs))
        calibration = [{name: read_rgb(path)[None]} for path in args.calibration]
        manifest = export(exportable, args.out, form=args.format, precision=args.precision, calibration=calibration)
    extra = {}
    with certified(args.out):
        print(f"{args.out}: {manifest.task}, {args.format}, {', '.join(manifest.outputs)}")
        if args.format == "tensorrt":
            extra["tensorrt"] = build_engine(args.out, manifest)
        if args.annotations is not None:
            extra["ap"] = accuracy(predictor, args)
        if args.gt is not None:
            extra["scores"] = scores(predictor, args)
        found = certify(exportable, args.out, images=images, predictor=predictor, extra=extra)
    print_differences(found)
    print_scores(extra.get("ap") or extra.get("scores") or {})


def check_paths(args: argparse.Namespace) -> None:
    """Raise ConfigError for data that does not belong together or does not exist, before the model is exported."""
    if (args.annotations is None) != (args.image_root is None):
        raise ConfigError("--annotations and --image-root belong together; give both, or none")
    if args.gt is None:
        refuse(args, "gt_scale", because="without --gt there is no use of")
    for name in ("annotations", "image_root", "gt"):
        path = getattr(args, name)
        if path is not None and not path.exists():
            raise ConfigError(f"--{name.replace('_', '-')} is {path}, which does not exist; check the path")


@contextmanager
def certified(folder: Path) -> Iterator[None]:
    """Remove an exported folder if the block ends, by an error or Ctrl-C, before its certificate is written."""
    from pe_spatial.runtime.verify import CERTIFICATE

    try:
        yield
    except BaseException:
        if not (folder / CERTIFICATE).is_file():
            shutil.rmtree(folder)
        raise


def check_data(args: argparse.Namespace, task: str, class_names: Sequence[str]) -> None:
    """Raise ConfigError for data that this kind of model does not take."""
    if args.annotations is not None and task != "detection":
        kind = "an encoder" if task == "encoder" else f"a model for {task}"
        raise ConfigError(f"--annotations is for detectors, and {args.source} is {kind}; omit it")
    if args.annotations is not None:
        from pe_spatial.export.accuracy import read_annotations

        read_annotations(args.annotations, class_names)
    if args.gt is not None and (task not in ("depth", "tracking") or not args.images):
        raise ConfigError("--gt is for the --images of a depth estimator or a tracker; give both, or neither")
    if task == "tracking" and args.calibration:
        raise ConfigError("a tracker takes no --calibration; omit it")
    if task == "tracking" and args.images and args.gt is None:
        raise ConfigError("the --images of a tracker are videos, folders of frames; give --gt MASKS too, or omit them")
    if args.gt is not None:
        from pe_spatial.export.scores import check_truth

        check_truth(task, [Path(image) for image in args.images], args.gt)


def run_tracker(args: argparse.Namespace, predictor: Any) -> None:
    """Export a tracker."""
    from pe_spatial.export.tracker import export_tracker
    from pe_spatial.export.tracker_certificate import certify_tracker

    with without_prints():
        manifest = export_tracker(
            predictor.model, args.out, form=args.format, source=str(args.source), precision=args.precision
        )
    with certified(args.out):
        print(f"{args.out}: {manifest.task}, {args.format}, {', '.join(manifest.options['parts'])}")
        extra = {} if args.gt is None else {"scores": scores(predictor, args)}
        found = certify_tracker(predictor.model, args.out, extra=extra)
    print_differences(found)
    print_scores(extra.get("scores", {}))


def run_together(args: argparse.Namespace) -> None:
    """Export several models on one encoder."""
    import pe_spatial
    from pe_spatial.multitask.export import certify_together, export_together

    others = ("calibration", "config", "images", "annotations", "image_root", "gt", "gt_scale", *ENCODER_OPTIONS)
    refuse(args, *others, because="several models are exported without")
    with without_prints():
        model = pe_spatial.MultiTask(args.source, size=args.size)
        parts, manifest = export_together(model, args.out, form=args.format, precision=args.precision)
    with certified(args.out):
        print(f"{args.out}: {', '.join(manifest.options['tasks'])} on one encoder, {args.format}")
        found = certify_together(model, parts, args.out)
    print_differences(found)


def scores(predictor: Any, args: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Return RMSE or J&F of PyTorch and of the exported folder."""
    from pe_spatial.export.scores import depth_scores, tracking_scores
    from pe_spatial.runtime.loading import load_exported

    sides = {"torch": predictor, "exported": load_exported(args.out)}
    paths = [Path(image) for image in args.images]
    if predictor.task == "depth":
        return depth_scores(sides, paths, args.gt, scale=args.gt_scale)
    return tracking_scores(sides, paths, args.gt)


def print_scores(found: dict[str, dict[str, float]]) -> None:
    """Print the scores of both."""
    for kind, one in found.items():
        print(f"{kind:14} {one['torch']:.4f} in PyTorch, {one['exported']:.4f} here")


def build(args: argparse.Namespace) -> tuple[Any, Any]:
    """Return the `Exportable`, None for a tracker, which has several; and the predictor of a trained model."""
    from pe_spatial.export.models import build_encoder, is_encoder

    if args.config is None and is_encoder(args.source):
        return build_encoder(
            args.source, weights=args.weights, layers=args.layers or [-1], geometry=args.geometry or "release",
            inputs=args.input or "pixels", whole_windows=args.whole_windows or args.format == "torch",
        ), None  # fmt: skip
    refuse(args, *ENCODER_OPTIONS, because=f"{args.source} is no encoder and has no")
    import pe_spatial
    from pe_spatial.export.dense import depth_graph, segmenter_graph
    from pe_spatial.export.detector import detector_graph

    predictor: Any = pe_spatial.load(args.source, config=args.config)
    if predictor.task == "tracking":
        return None, predictor
    graphs = dict(detection=detector_graph, depth=depth_graph, segmentation=segmenter_graph)
    return graphs[predictor.task](predictor, source=str(args.source)), predictor


def accuracy(predictor: Any, args: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Return AP of PyTorch and of the exported folder."""
    from pe_spatial.export.accuracy import average_precision
    from pe_spatial.runtime.loading import load_exported

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

    if args.source or args.out is not None:
        raise ConfigError("--verify takes a folder and nothing else; omit the model and --out")
    others = ("size", "calibration", "config", "images", "annotations", "image_root", "gt", "gt_scale")
    refuse(args, *others, *ENCODER_OPTIONS, because="--verify takes a folder and nothing else, not")
    if (args.format, args.precision) != ("onnx", "fp32"):
        raise ConfigError("--verify takes format and precision from the folder; omit --format and --precision")
    print_differences(verify(args.verify))


def print_differences(result: dict[str, Any]) -> None:
    """Print the differences of a certificate in few lines."""
    for name, one in result["stages"].items():
        print(f"{name:14} differs by {one['largest']:.2g} at most (largest value {one['scale']:.3g})")
    if "stream" in result:
        print(f"a video of {result['stream']['frames']} frames: masks with IoU {result['stream']['iou']:.4f} or more")
    if "agreement" in result:
        print(f"classes of pixels and tracked masks agree in {result['agreement']:.4f} or more")
    found = result["detections"]
    if found:
        print(
            f"detections     {found['theirs']:.0f} of PyTorch, {found['unmatched']:.0f} without partner; boxes within "
            f"{found['box']:.2g} px, scores within {found['score']:.2g}, masks with IoU {found['iou']:.4f} or more"
        )
