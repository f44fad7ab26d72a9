"""Evaluate a checkpoint; write or draw its predictions.

pe-spatial test pe_spatial::pe_spatial_cascade_coco.py work_dirs/pe_spatial_cascade_coco/iter_66375.pth
pe-spatial test pe_spatial::pe_spatial_maskrcnn_coco_g14.py hf://facebook/PE-Detection/mask_rcnn_PEspatial_G_coco36ep.pth
pe-spatial test CONFIG CHECKPOINT --out predictions.json --show-dir images
tools/dist_test.sh CONFIG CHECKPOINT 8      # on eight GPUs
"""

import argparse

from pe_spatial.cli.arguments import add_config_arguments, add_data, add_verbose, load_config, quiet_start


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_config_arguments(parser)
    add_data(parser)
    parser.add_argument("checkpoint", help="weights: a file, or a released detector at hf://owner/repo/file")
    parser.add_argument("--out", help="write the predictions to this file: .pkl, or .json in COCO's format")
    parser.add_argument("--show", action="store_true", help="show the predictions in a window")
    parser.add_argument("--show-dir", help="draw the predictions beside the ground truth, into this folder")
    parser.add_argument("--wait-time", type=float, default=2, help="seconds that --show waits for each image")
    parser.add_argument("--limit", type=int, metavar="N", help="test on the first N images only")
    parser.add_argument("--tta", action="store_true", help="test-time augmentation, as the config describes it")
    add_verbose(parser)


def run(args: argparse.Namespace) -> None:
    with quiet_start(args):
        import pe_spatial.detection  # noqa: F401  (registers the evaluators that a limit or a json needs, and drawing)
        from pe_spatial.cli.own_data import use_data
        from pe_spatial.detection.coco import use_checked_annotations
        from pe_spatial.engine.configs import read_config
        from pe_spatial.engine.evaluation import augment_test, draw_predictions, limit_test, test, write_predictions

        cfg = read_config(args.config)
        use_data(args, cfg)
        cfg = load_config(args, cfg)
        use_checked_annotations(cfg)
        cfg.load_from, cfg.resume = args.checkpoint, False
        if args.show or args.show_dir:
            draw_predictions(cfg, folder=args.show_dir, window=args.show, seconds=args.wait_time)
        if args.tta:
            augment_test(cfg)
        if args.limit is not None:
            limit_test(cfg, args.limit)
        if args.out:
            write_predictions(cfg, args.out)
        test(cfg)
