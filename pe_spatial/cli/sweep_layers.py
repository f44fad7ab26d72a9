"""Find the best layer of a frozen encoder for a task: train a config's heads on each layer, on cached feature maps.

pe-spatial sweep_layers configs/pe_spatial_linear_ade20k.py --layers all --data-root data/ade/ADEChallengeData2016
pe-spatial sweep_layers configs/pe_spatial_layers_detection.py --layers 5,8,11 --cache-dtype float16
pe-spatial sweep_layers configs/pe_spatial_lin1_nyu.py --layers 5,8,11 --epochs 5 --limit 2000
pe-spatial sweep_layers configs/pe_spatial_layers_detection.py --layers all --data DATA --epochs 15    # own data
pe-spatial sweep_layers DETECTION.py SEGMENTATION.py DEPTH.py configs/pe_spatial_zeroshot_davis.py --layers all

A config is for detection, segmentation, depth, or tracking without training; of several, a table of the best layer for
each follows. Images are read as in testing, without augmentation, so that the encoder runs over them once; scores are
therefore lower than those of the full recipe. A stopped sweep resumes when it is started again. The work dir then
holds scores.png, scores.json, the heads, and the cache, which may be deleted.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pe_spatial.cli import arguments

if TYPE_CHECKING:
    from mmengine.config import Config

Best = tuple[int, int, str, float, float]  # see `format_best`


def add_arguments(parser: argparse.ArgumentParser) -> None:
    arguments.add_config_arguments(parser, folder="work_dirs/<name of the config>_layers", several=True)
    arguments.add_data(parser)
    blocks = "encoder layers (blocks), 0-based"
    parser.add_argument("--layers", type=arguments.layers, required=True, metavar="5,8,11|all", help=blocks)
    parser.add_argument("--epochs", type=int, help="passes over the images, instead of the config's schedule")
    limit = "train on N images, evenly spaced in their list; evaluation takes all of the config's"
    parser.add_argument("--limit", type=int, metavar="N", help=limit)
    arguments.add_cache(parser)
    kept = "metric to compare layers by (default: bbox_mAP, mIoU, rmse, J&F, ... as the config has them)"
    parser.add_argument("--score", help=kept)


def run(args: argparse.Namespace) -> None:
    best: dict[str, Best] = {}
    for config in args.configs:
        one = copy.copy(args)
        one.config = config
        if len(args.configs) > 1:
            name = Path(config.rpartition("::")[2]).stem
            print(f"\n{config}")
            one.work_dir = args.work_dir and str(Path(args.work_dir, name))
            one.cache_features = args.cache_features and str(Path(args.cache_features, name))
        task, found = sweep(one)
        best[f"{task}, {Path(config.rpartition('::')[2]).stem}"] = found
    if len(best) > 1:
        from pe_spatial.probing.report import format_best

        print(f"\n{format_best(best)}")


def sweep(args: argparse.Namespace) -> tuple[str, Best]:
    """Sweep the layers of one config; return its task and the best layer."""
    from mmengine.logging import MMLogger

    from pe_spatial.cli.own_data import run_name, use_data
    from pe_spatial.engine.configs import read_config
    from pe_spatial.probing.report import check_score

    with arguments.without_prints():
        cfg = read_config(args.config)
    kind = str((cfg.get("model") or {}).get("type"))
    tracks, takes_data = kind == "ZeroShotTracker", kind not in ("ZeroShotTracker", "PEDepthEstimator")
    if args.data and takes_data:
        args.work_dir = args.work_dir or f"work_dirs/{run_name(args)}_layers"
        MMLogger.get_instance(f"data of {args.config}")
        use_data(args, cfg)
    elif args.data:
        print(f"{args.config} keeps its own dataset: boxes and masks of --data teach neither depth nor tracking")
    MMLogger.get_instance(f"layers of {args.config}", log_level="WARNING")  # the progress bars are enough
    cfg = arguments.load_config(args, cfg)
    cfg.work_dir = args.work_dir or f"{cfg.work_dir}_layers"
    if tracks:
        return "tracking", sweep_tracking(args, cfg)
    task = "depth" if not takes_data else "detection" if cfg.get("default_scope") == "mmdet" else "segmentation"
    check_score(args.score, task)
    return task, sweep_heads(args, cfg)


def sweep_heads(args: argparse.Namespace, cfg: Config) -> Best:
    from tqdm import tqdm

    from pe_spatial.encoder.files import CheckpointError
    from pe_spatial.engine.cached_training import CacheOptions
    from pe_spatial.engine.training import explain_missing_weights
    from pe_spatial.probing.report import format_table, write_report
    from pe_spatial.probing.sweep import LayerSweep, ProgressBar

    folder = cfg.work_dir
    place, kind = args.cache_features or Path(folder, "cache"), args.cache_dtype or "float32"
    cache = CacheOptions(folder=place, dtype=kind, views=args.cache_views or 1)
    try:
        blocks = None if args.layers == "all" else args.layers
        with arguments.without_prints():
            layers = LayerSweep(cfg, layers=blocks, folder=folder, cache=cache, limit=args.limit, epochs=args.epochs)
    except CheckpointError as error:
        raise explain_missing_weights(cfg, error) from error
    missing = layers.features.cache.bytes_missing / 1e9
    print(f"{layers.features.describe()}; {missing:.2f} GB are still to be computed; evaluation is the config's own")
    start = time.time()
    layers.fill(partial(tqdm, desc="encoder", unit="batch"))
    for layer in layers.layers:
        if not layers.train(layer, [ProgressBar(layer)]):
            print(f"layer {layer}: already trained, {folder}/layer_{layer:02d}.safetensors")
    metrics = layers.evaluate(partial(tqdm, desc="evaluation", unit="batch"))
    report = write_report(layers, metrics, score=args.score, config=args.config)
    score, best = report["score"], report["best"]
    print(
        f"\n{format_table(report)}\n\nbest by {score}: layer {best}; {time.time() - start:.0f} s; "
        f"see {folder}/scores.png and scores.json"
    )
    return best, report["depth"], score, metrics[best][score], metrics[report["last"]][score]


def sweep_tracking(args: argparse.Namespace, cfg: Config) -> Best:
    """Track with all layers in one pass, without training."""
    import torch
    from mmengine.registry import DATASETS, MODELS
    from tqdm import tqdm

    from pe_spatial.errors import ConfigError
    from pe_spatial.tracking.zero_shot_run import ZeroShotRun

    if len(args.configs) == 1:
        options = ("epochs", "limit", "score", "cache_features", "cache_dtype", "cache_views")
        arguments.refuse(args, *options, because="tracking trains no heads, is scored by J&F, and has no")
    depth = _depth(cfg.model.backbone)
    blocks = list(range(depth)) if args.layers == "all" else [layer % depth for layer in args.layers]
    cfg.model.backbone.out_indices = blocks
    torch.manual_seed(0)  # a run with random weights continues with the same ones
    tracker = MODELS.build(cfg.model)
    tracker.backbone.init_weights()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    data = cfg.test_dataloader.dataset
    clips = DATASETS.build(data).clips
    settings = json.loads(json.dumps(dict(model=cfg.model, dataset=data), default=str))
    run = ZeroShotRun(tracker.to(device), Path(cfg.work_dir), settings, by_layer=True)
    pending = run.pending(clips)
    with tqdm(total=sum(map(len, pending)), unit="frame", desc="tracking") as progress:
        for clip in pending:
            run.track(clip, progress.update)
    evaluator = cfg.test_evaluator
    evaluations = run.score(Path(evaluator.ann_dir), clips)
    if not evaluations:
        raise ConfigError(f"no sequence of {data.data_root} has masks of all frames, which scores need")
    best, last = run.report(evaluations)
    scores = {layer: 100 * one.global_results["J&F-Mean"] for layer, one in evaluations.items()}
    for layer, value in scores.items():
        print(f"layer {layer:2d}  J&F {value:.1f}")
    print(f"best layer {best}: {scores[best]:.1f}, deepest {last}: {scores[last]:.1f}; see {cfg.work_dir}/layers.png")
    return best, depth, "J&F", scores[best], scores[last]


def _depth(backbone: Any) -> int:
    import torch

    from pe_spatial.integrations.openmmlab import build_encoder

    with torch.device("meta"):
        return int(build_encoder(backbone.variant).config.depth)
