"""Evaluate a checkpoint, and write or show its predictions.

pe-spatial test configs/pe_spatial_cascade_coco.py work_dirs/pe_spatial_cascade_coco/iter_66375.pth
pe-spatial test configs/pe_spatial_maskrcnn_coco_g14.py \
    hf://facebook/PE-Detection/mask_rcnn_PEspatial_G_coco36ep.pth
pe-spatial test CONFIG CHECKPOINT --out predictions.pkl --show-dir images
"""

import argparse
from pathlib import Path

from mmengine.config import Config, ConfigDict

from pe_spatial.cli.arguments import add_config_arguments, load_config
from pe_spatial.detection.limit import limit_test
from pe_spatial.engine.runner import build_runner, load_weights_of_any_layout
from pe_spatial.errors import ConfigError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_config_arguments(parser)
    parser.add_argument("checkpoint", help="file that tools/train.py wrote, or a released detector: a file or hf://owner/repo/file")
    parser.add_argument("--out", help="write the predictions to this .pkl file")
    parser.add_argument("--show", action="store_true", help="show predictions in a window")
    parser.add_argument("--show-dir", help="draw predictions, beside the ground truth, into this folder")
    parser.add_argument("--wait-time", type=float, default=2, help="seconds that --show waits (default 2)")
    parser.add_argument("--limit", type=int, metavar="N", help="test on the first N images alone")
    parser.add_argument("--tta", action="store_true", help="test-time augmentation, as the config describes it")


def draw(cfg: Config, args: argparse.Namespace) -> None:
    hook = cfg.get("default_hooks", {}).get("visualization")
    if hook is None:
        raise ConfigError(f"{args.config} has no default_hooks.visualization to draw with")
    hook.draw = True
    if args.show:
        hook.show, hook.wait_time = True, args.wait_time
    if args.show_dir and cfg.default_scope == "mmseg":  # its hook leaves the folder to the visualizer
        cfg.visualizer.save_dir, hook.interval = str(Path(args.show_dir).resolve()), 1
    elif args.show_dir:
        hook.test_out_dir = str(Path(args.show_dir).resolve())


def augment(cfg: Config, args: argparse.Namespace) -> None:
    absent = [name for name in ("tta_model", "tta_pipeline") if name not in cfg]
    if absent:
        raise ConfigError(f"{args.config} has no {' and no '.join(absent)}, so it cannot be tested with --tta")
    cfg.model = ConfigDict(**cfg.tta_model, module=cfg.model)
    cfg.test_dataloader.dataset.pipeline = cfg.tta_pipeline
    if "tta_evaluator" in cfg:
        cfg.test_evaluator = cfg.tta_evaluator
        print(f"--tta: evaluates {cfg.tta_evaluator.get('metric')} only")


def run(args: argparse.Namespace) -> None:
    if args.out and not args.out.endswith((".pkl", ".pickle")):
        raise ConfigError(f"--out {args.out} must end in .pkl")
    cfg = load_config(args)
    cfg.load_from = args.checkpoint
    if args.show or args.show_dir:
        draw(cfg, args)
    if args.tta:
        augment(cfg, args)
    if args.limit is not None:
        limit_test(cfg, args.limit)
    if args.out:
        dump = dict(type="DumpDetResults" if cfg.default_scope == "mmdet" else "DumpResults", out_file_path=args.out)
        metrics = cfg.test_evaluator if isinstance(cfg.test_evaluator, list) else [cfg.test_evaluator]
        cfg.test_evaluator = [*metrics, dump]
    runner = build_runner(cfg)
    load_weights_of_any_layout(runner)
    runner.test()
