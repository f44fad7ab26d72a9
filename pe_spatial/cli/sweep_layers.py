"""Find the best layer of a frozen encoder for a task: train the config's head on each layer, on cached feature maps.

pe-spatial sweep_layers configs/pe_spatial_linear_ade20k.py --layers all --data-root data/ade/ADEChallengeData2016
pe-spatial sweep_layers configs/pe_spatial_lin1_nyu.py --layers 5,8,11 --epochs 5 --limit 2000 --dtype bfloat16
pe-spatial sweep_layers configs/pe_spatial_linear_ade20k.py --layers all --data DATA --epochs 50    # own masks

Images are read as in testing, without augmentation, so that the encoder runs over them once; scores are therefore lower
than those of the full recipe. A stopped sweep resumes when it is started again. The work dir then holds scores.png,
scores.json, the heads, and the cache, which may be deleted.
"""

import argparse
import time
from functools import partial

from pe_spatial.cli.arguments import add_config_arguments, add_data, layers, load_config, without_prints


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_config_arguments(parser, folder="work_dirs/<name of the config>_layers")
    add_data(parser)
    blocks = "encoder layers (blocks), 0-based"
    parser.add_argument("--layers", type=layers, required=True, metavar="5,8,11|all", help=blocks)
    parser.add_argument("--epochs", type=int, help="passes over the images, instead of the config's schedule")
    limit = "train on N images, evenly spaced in their list; evaluation takes all of the config's"
    parser.add_argument("--limit", type=int, metavar="N", help=limit)
    dtypes = ["float32", "float16", "bfloat16"]
    kept = "type of the cached maps (default: float32, exact)"
    parser.add_argument("--dtype", choices=dtypes, default="float32", help=kept)
    parser.add_argument("--score", help="metric to compare layers by (default: mIoU, rmse, ... as the config has them)")


def run(args: argparse.Namespace) -> None:
    from mmengine.logging import MMLogger
    from tqdm import tqdm

    from pe_spatial.cli.own_data import run_name, use_data
    from pe_spatial.encoder.files import CheckpointError
    from pe_spatial.engine.configs import read_config
    from pe_spatial.engine.training import explain_missing_weights
    from pe_spatial.probing.report import format_table, write_report
    from pe_spatial.probing.sweep import LayerSweep, ProgressBar

    with without_prints():
        cfg = read_config(args.config)
    if args.data:
        args.work_dir = args.work_dir or f"work_dirs/{run_name(args)}_layers"
        use_data(args, cfg)
    cfg = load_config(args, cfg)
    folder = args.work_dir or f"{cfg.work_dir}_layers"
    MMLogger.get_instance("layer_sweep", log_level="WARNING")  # the progress bars are enough
    try:
        blocks = None if args.layers == "all" else args.layers
        sweep = LayerSweep(cfg, layers=blocks, folder=folder, dtype=args.dtype, limit=args.limit, epochs=args.epochs)
    except CheckpointError as error:
        raise explain_missing_weights(cfg, error) from error
    print(
        f"{len(sweep.layers)} layers, {len(sweep.images)} training images as in testing (no augmentation), evaluation "
        f"on all of the config's; {args.dtype} maps take {sweep.cache.bytes_missing / 1e9:.2f} GB more in "
        f"{sweep.cache.folder}"
    )
    start = time.time()
    sweep.fill(partial(tqdm, desc="encoder", unit="image"))
    for layer in sweep.layers:
        if not sweep.train(layer, [ProgressBar(layer)]):
            print(f"layer {layer}: already trained, {sweep.folder}/layer_{layer:02d}.safetensors")
    metrics = sweep.evaluate(partial(tqdm, desc="evaluation", unit="batch"))
    report = write_report(sweep, metrics, score=args.score, config=args.config)
    print(
        f"\n{format_table(report)}\n\nbest by {report['score']}: layer {report['best']}; {time.time() - start:.0f} s; "
        f"see {sweep.folder}/scores.png and scores.json"
    )
