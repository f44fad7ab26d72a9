"""What the commands do with --data, and with the options that change a recipe."""

from __future__ import annotations

import argparse
import math
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pe_spatial.errors import ConfigError

if TYPE_CHECKING:
    from mmengine.config import Config

    from pe_spatial.data.dataset import OwnDataset


def use_data(args: argparse.Namespace, cfg: Config) -> OwnDataset | None:
    """Put the dataset of --data into `cfg`, and say what follows; its annotations are written into the work dir."""
    if args.data is None:
        return None
    from pe_spatial.data.dataset import open_dataset, write_splits

    if getattr(args, "data_root", None) is not None:
        raise ConfigError("--data names images and annotations; omit --data-root")
    scope = cfg.get("default_scope", "mmdet")
    if scope not in ("mmdet", "mmseg"):
        raise ConfigError(f"{args.config} is for {scope}; --data takes configs for detection or semantic segmentation")
    dataset = open_dataset(args.data)
    cfg.work_dir = args.work_dir or str(Path("work_dirs") / run_name(args))
    folder = Path(cfg.work_dir, "annotations").resolve()
    import pe_spatial.detection  # noqa: F401  (registers)

    if scope == "mmseg":
        from pe_spatial.segmentation.own_data import apply_dataset

        files = _write_cleaned(dataset, folder)
    else:
        from pe_spatial.detection.own_data import apply_dataset

        files = write_splits(dataset, folder)
    notes = [*dataset.notes, *apply_dataset(cfg, dataset, files)]
    _say(f"{args.data}: {dataset.summary()}", notes)
    return dataset


def images_of(data: str) -> list[str]:
    """Return the paths of the test images of a dataset, or of its validation images if it has no test part."""
    from pe_spatial.data.dataset import open_dataset

    dataset = open_dataset(data)
    split = dataset.test or dataset.val
    return [str(split.root / image["file_name"]) for image in split.content["images"]]


def _write_cleaned(dataset: OwnDataset, folder: Path) -> dict[str, Path]:
    """Write the splits as detectors read them, with the boxes and masks that can be used; return their paths."""
    from pe_spatial.atomic import write_json
    from pe_spatial.data.dataset import write_splits
    from pe_spatial.detection.annotations import read_coco

    with tempfile.TemporaryDirectory() as raw:
        files = write_splits(dataset, raw)
        for path in files.values():
            write_json(folder / path.name, read_coco(str(path), annotated=False, masks=True)[0])
    return {name: folder / path.name for name, path in files.items()}


def change_recipe(args: argparse.Namespace, cfg: Config, dataset: OwnDataset | None) -> list[str]:
    """Put the options of training into `cfg`, and say what follows; return it as sentences."""
    from mmengine.dist import get_world_size

    from pe_spatial.engine import image_size, recipe
    from pe_spatial.engine.runner import start_processes
    from pe_spatial.engine.schedule import counts_epochs, set_length

    notes: list[str | None] = []
    if args.amp:
        recipe.use_bfloat16(cfg)
    if args.seed is not None:
        cfg.randomness = dict(cfg.get("randomness") or {}, seed=args.seed)
    if args.freeze is not None:
        recipe.freeze(cfg, args.freeze)
    if args.image_size is not None:
        notes.append(image_size.set_image_size(cfg, args.image_size))
    if args.rectangular:
        image_size.batch_rectangles(cfg)
    updates, steps = 1, None  # batches of an update, and of an epoch
    if args.batch == "auto":
        updates, note = _fit_batch(args, cfg)
        notes.append(note)
    elif args.batch is not None:
        recipe.set_batch(cfg, args.batch)
    if args.epochs or args.iterations or args.ema or dataset:
        start_processes(cfg)
        images = recipe.count_images(cfg, dataset.train.content if dataset else None)
        if images is not None:
            steps = max(1, math.ceil(images / (cfg.train_dataloader.batch_size * get_world_size())))
    if args.epochs is not None or args.iterations is not None:
        iterations = args.iterations and updates * args.iterations
        set_length(cfg, epochs=args.epochs, iterations=iterations, steps=steps)
    elif updates > 1 and not counts_epochs(cfg):
        set_length(cfg, iterations=updates * cfg.train_cfg.max_iters, steps=steps)
    elif dataset and steps and not counts_epochs(cfg):
        passes = cfg.train_cfg.max_iters / steps
        length = f"{cfg.train_cfg.max_iters} iterations, {passes:.0f} passes over the images"
        notes.append(f"the schedule is the config's: {length}; --epochs N sets another")
    if dataset and steps == 1 and args.batch is None:
        size = cfg.train_dataloader.batch_size
        notes.append(f"an epoch is one step: a batch has {size} images, no fewer than the set; --batch N takes fewer")
    if dataset:
        recipe.fit_to_small_sets(cfg)
        recipe.keep_best(cfg)
        recipe.report(cfg)
    if dataset or args.batch is not None:
        notes.append(recipe.scale_rate(cfg))
    if args.balance is not None:
        recipe.balance(cfg, args.balance)
    if args.ema:
        recipe.average_weights(cfg, recipe.count_iterations(cfg, steps))
    if args.patience is not None:
        recipe.stop_early(cfg, args.patience)
    if args.no_augmentation:
        recipe.read_as_in_testing(cfg)
    if args.cache_features is not None:
        recipe.cache_features(cfg, args.cache_features, dtype=args.cache_dtype, views=args.cache_views)
    elif args.cache_dtype or args.cache_views:
        raise ConfigError("--cache-dtype and --cache-views belong to --cache-features DIR, which is missing")
    said = [note for note in notes if note]
    _say("Recipe", said)
    return said


def _fit_batch(args: argparse.Namespace, cfg: Config) -> tuple[int, str]:
    from pe_spatial.engine.batch import fit_batch

    if args.launcher != "none":
        raise ConfigError("--batch auto tries on one GPU; with --launcher give a number")
    return fit_batch(cfg)


def write(args: argparse.Namespace, cfg: Config, notes: Sequence[str]) -> None:
    """Write the config of this run into its work dir, as a short file that inherits the original."""
    from mmengine.dist import master_only

    from pe_spatial.engine.written import write_config

    path = Path(cfg.work_dir, f"{run_name(args)}.py")
    master_only(write_config)(path, cfg, base=args.config, notes=notes)
    _say(f"{path} is the config of this run; it inherits {args.config}. Again: pe-spatial train {path}", [])


def run_name(args: argparse.Namespace) -> str:
    """Return the name of a run on own data: that of its config, and that of its dataset."""
    return f"{Path(args.config.rpartition('::')[2]).stem}_{Path(args.data).resolve().stem}"


def _say(title: str, lines: Sequence[str]) -> None:
    from mmengine.logging import MMLogger

    if lines or title != "Recipe":
        MMLogger.get_current_instance().info("\n".join([title, *(f"  {line}" for line in lines)]))
