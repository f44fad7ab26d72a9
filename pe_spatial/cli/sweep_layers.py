"""Find the best layer of a frozen encoder for a task: train the config's head on each, on maps computed once.

python tools/sweep_layers.py configs/pe_spatial_linear_ade20k.py --layers all --data-root data/ade/ADEChallengeData2016
python tools/sweep_layers.py configs/pe_spatial_lin1_nyu.py --layers 5,8,11 --epochs 5 --limit 2000 --dtype bfloat16

Images are read as in testing, without augmentation, so that the encoder runs once over them; scores are therefore
not those of the full recipe. A sweep that was stopped goes on when it is started again. The work dir then holds
scores.png, scores.json, the heads and the cache, which may be deleted.
"""

import argparse
import time
from functools import partial
from pathlib import Path

from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.logging import MMLogger
from mmengine.runner import Runner
from tqdm import tqdm

from pe_spatial.cli.arguments import add_config_arguments, load_config
from pe_spatial.encoder.files import CheckpointError
from pe_spatial.engine.runner import explain_missing_weights
from pe_spatial.probing.sweep import DTYPES, LayerSweep, best_layer, choose_score, draw_scores, write_json


class Progress(Hook):
    """A bar for the training of one layer."""

    def __init__(self, layer: int) -> None:
        self.layer = layer

    def before_train(self, runner: Runner) -> None:
        self.bar = tqdm(total=runner.max_iters, desc=f"layer {self.layer}", unit="step", leave=False)

    def after_train_iter(self, runner: Runner, batch_idx: int, data_batch: dict, outputs: dict) -> None:  # noqa: ARG002
        self.bar.set_postfix(loss=f"{float(outputs['loss']):.4f}", refresh=False)
        self.bar.update()

    def after_train(self, runner: Runner) -> None:  # noqa: ARG002
        self.bar.close()


def layers(text: str) -> list[int] | None:
    return None if text == "all" else [int(number) for number in text.split(",")]


def build(cfg: Config, args: argparse.Namespace) -> LayerSweep:
    options = dict(dtype=args.dtype, limit=args.limit, epochs=args.epochs)
    try:
        return LayerSweep(cfg, layers=args.layers, folder=cfg.work_dir, **options)
    except CheckpointError as error:
        raise explain_missing_weights(cfg, error) from error


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_config_arguments(parser)
    parser.add_argument("--layers", type=layers, required=True, metavar="5,8,11|all", help="blocks, 0-based")
    parser.add_argument("--epochs", type=int, help="passes over the images instead of the config's schedule")
    parser.add_argument("--limit", type=int, metavar="N", help="train on N images, evenly spaced in the list")
    parser.add_argument("--dtype", choices=list(DTYPES), default="float32", help="of the cache (float32: exact)")
    parser.add_argument("--score", help="compare layers by this one of the config's metrics (mIoU, rmse, ...)")


def run(args: argparse.Namespace) -> None:
    cfg = load_config(args)
    cfg.work_dir = args.work_dir or str(Path("work_dirs") / f"{Path(args.config).stem}_layers")
    MMLogger.get_instance("layer_sweep", log_level="WARNING")  # the bars tell what happens
    sweep = build(cfg, args)
    print(
        f"{len(sweep.layers)} layers, {len(sweep.images)} training images as in testing (no augmentation); "
        f"{args.dtype} maps take {sweep.cache.bytes_missing / 1e9:.2f} GB more in {sweep.cache.folder}"
    )
    clock = time.time()
    sweep.fill(partial(tqdm, desc="encoder", unit="image"))
    for layer in sweep.layers:
        if not sweep.train(layer, [Progress(layer)]):
            print(f"layer {layer}: trained before, {sweep.folder}/layer_{layer:02d}.safetensors")
    metrics = sweep.evaluate(partial(tqdm, desc="evaluation", unit="batch"))
    score, higher = choose_score(next(iter(metrics.values())), args.score)
    best, last = best_layer(metrics, score, higher), max(metrics)

    names = list(next(iter(metrics.values())))
    print(f"\n| layer (from 0) | of {sweep.depth} (from 1) | {' | '.join(names)} | |\n{'|---' * (len(names) + 3)}|")
    for layer, values in metrics.items():
        mark = ", ".join(word for word, which in (("best", best), ("last", last)) if layer == which)
        print(f"| {layer} | {layer + 1} | {' | '.join(f'{values[name]:.4g}' for name in names)} | {mark} |")
    write_json(
        sweep.folder / "scores.json",
        dict(
            config=args.config,
            encoder=str(cfg.model.backbone.get("variant")),
            checkpoint=str(cfg.model.backbone.get("init_cfg")),
            depth=sweep.depth,
            training_images=len(sweep.images),
            augmentation=False,
            maps=args.dtype,
            schedule=dict(sweep.cfg.train_cfg),
            score=score,
            higher_is_better=higher,
            best=best,
            last=last,
            metrics=metrics,
        ),
    )
    draw_scores(sweep.folder / "scores.png", metrics, score, best)
    print(f"\nbest by {score}: layer {best}; {time.time() - clock:.0f} s; {sweep.folder}/scores.png and scores.json")
