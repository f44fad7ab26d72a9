"""Explain results in one HTML file that needs no network; two results are compared, with an interval.

Detection: AP, costs of errors, confusion, calibration, worst images. Results are checkpoints, or detections as
`pe-spatial test --out FILE.json` or `pe-spatial predict` writes them.
    pe-spatial analyze CONFIG CHECKPOINT --out report.html
    pe-spatial analyze instances_val2017.json A.json B.json --images data/coco/val2017
Depth: errors by range, worst maps. Results are checkpoints, or folders that `pe-spatial infer_depth` wrote.
    pe-spatial analyze CONFIG CHECKPOINT --out depth.html
    pe-spatial analyze pairs.csv depth_a depth_b --out depth.html
Video masks: J&F of each sequence and over time. Results are checkpoints, or folders as in `pe-spatial eval_vos`.
    pe-spatial analyze CONFIG CHECKPOINT --out davis.html
    pe-spatial analyze DAVIS results_a results_b --out davis.html
"""

from __future__ import annotations

import argparse
import csv
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from pe_spatial.cli.arguments import add_cfg_options, import_quietly, quiet_start, refuse, without_prints
from pe_spatial.cli.main import run_command
from pe_spatial.errors import ConfigError

if TYPE_CHECKING:
    from mmengine.config import Config

Report = tuple[str, list[str]]
OF_CONFIGS = ("data_root", "cfg_options", "verbose")
OPTIONS = {"detection": ("images", "masks", *OF_CONFIGS), "video": ("sequences",)}
"""The options that only one kind of results has."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    truth = "config, COCO annotations (.json), pairs of images and depth (.csv), or a folder of true depth or masks"
    parser.add_argument("truth", metavar="TRUTH", help=truth)
    parser.add_argument("results", nargs="+", metavar="RESULT", help="one or two results, see above")
    parser.add_argument("--out", type=Path, default=Path("analysis.html"), metavar="FILE.html", help="file to write")
    parser.add_argument("--worst", type=int, default=12, metavar="N", help="images or sequences to draw; 0: none")
    samples = "resamples of the images or sequences for the interval of a difference; 0: no interval"
    parser.add_argument("--bootstrap", type=int, default=300, metavar="N", help=samples)
    sequences = "sequences of video masks, or a .txt file of names (default: those of all results)"
    parser.add_argument("--sequences", nargs="+", metavar="NAME", help=sequences)
    group = parser.add_argument_group("detection")
    group.add_argument("--images", help="folder of the images (default: that of the config, or beside the annotations)")
    group.add_argument("--masks", action="store_true", help="analyze masks instead of boxes")
    group.add_argument("--data-root", help="folder of the data; replaces data_root of the config")
    add_cfg_options(parser)
    group.add_argument("--verbose", action="store_true", help="show everything that goes to the log file")


def run(args: argparse.Namespace) -> None:
    from pe_spatial.atomic import write_file

    if len(args.results) > 2 or args.worst < 0 or args.bootstrap < 0:
        raise ConfigError("give one or two results, and 0 or more as --worst and --bootstrap")
    if args.out.suffix.lower() != ".html":
        raise ConfigError(f"--out is {args.out}; end its name in .html")
    kind = kind_of(args)
    for other, names in OPTIONS.items():
        if other != kind:
            allowed = OF_CONFIGS if args.truth.endswith(".py") else ()
            refuse(args, *(name for name in names if name not in allowed), because=f"results of {kind} have no")
    html, lines = {"detection": of_detection, "depth": of_depth, "video": of_video}[kind](args)
    write_file(args.out, html)
    print(*lines, f"wrote {args.out}", sep="\n")


def kind_of(args: argparse.Namespace) -> str:
    """Return what is analyzed, 'detection', 'depth' or 'video', by the truth and the first result."""
    if args.truth.endswith(".py"):
        from pe_spatial.engine.configs import read_config

        cfg = read_config(args.truth)
        if (cfg.get("model") or {}).get("type") == "PEDepthEstimator":
            return "depth"
        return "video" if "ann_dir" in (cfg.get("test_evaluator") or {}) else "detection"
    if args.truth.endswith(".json"):
        return "detection"
    if args.truth.endswith(".csv") or Path(args.results[0], "metadata.json").is_file():
        return "depth"
    if Path(args.truth).is_dir():
        return "video"
    raise ConfigError(f"{args.truth} is no config (.py), no .json, no .csv and no folder; give one of these")


def of_detection(args: argparse.Namespace) -> Report:
    import_quietly("mmdet.datasets")
    from pe_spatial.analysis.detection import write_page
    from pe_spatial.analysis.results import find_images, read_results, read_truth

    names = unique_names(args.results)
    with tempfile.TemporaryDirectory() as folder:
        annotations, images, files = located(args, Path(folder))
        truth = read_truth(annotations, masks=args.masks)
        results = {name: read_results(file, truth, masks=args.masks) for name, file in zip(names, files, strict=True)}
    drawn = args.images or images or find_images(annotations, truth)
    return write_page(truth, results, masks=args.masks, images=drawn, worst=args.worst, samples=args.bootstrap)


def of_depth(args: argparse.Namespace) -> Report:
    import_quietly("mmseg.datasets")
    from pe_spatial.analysis.depth import DepthResult, write_page
    from pe_spatial.depth.batch import GroundTruth

    with tempfile.TemporaryDirectory() as folder:
        table, paths = predicted(args, Path(folder)) if args.truth.endswith(".py") else (args.truth, args.results)
        truth = GroundTruth(table, scale=None)
        results = [DepthResult(path, truth) for path in paths]
        named = dict(zip(unique_names(args.results), results, strict=True))
        return write_page(named, worst=args.worst, samples=args.bootstrap)


def predicted(args: argparse.Namespace, folder: Path) -> tuple[str | Path, list[str]]:
    """Predict the test images of a config for depth with each checkpoint; return the table of pairs and the results."""
    from mmengine.registry import DATASETS

    import pe_spatial.depth  # noqa: F401  (registers)
    from pe_spatial.predict.models import test_dataset

    with without_prints():
        dataset = test_dataset(read(args))
        pairs = DATASETS.build({**dataset, "pipeline": [], "serialize_data": False}).data_list
    root = os.path.commonpath([Path(pair["img_path"]).absolute().parent for pair in pairs])
    table, images = folder / "pairs.csv", folder / "images"
    with table.open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(("rgb", "depth", "units_per_meter"))
        for pair in pairs:  # links, because the folder of the images may hold other files
            image = Path(pair["img_path"]).absolute()
            link = images / image.relative_to(root)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(image)
            rows.writerow((image.resolve(), Path(pair["depth_path"]).absolute(), pair["depth_scale"]))
    results = [str(folder / str(i)) for i in range(len(args.results))]
    for checkpoint, result in zip(args.results, results, strict=True):
        options = ["--checkpoint", checkpoint, "--config", args.truth, "--size", "full", "--out", result]
        with without_prints():
            run_command("infer_depth", [str(images), *options], cfg_options=args.cfg_options)
    return table, results


def of_video(args: argparse.Namespace) -> Report:
    from pe_spatial.analysis.vos import write_page
    from pe_spatial.tracking.vos.evaluation import divide_sequences, evaluate, read_sequences

    with tempfile.TemporaryDirectory() as folder:
        truth, paths = tracked(args, Path(folder)) if args.truth.endswith(".py") else (args.truth, args.results)
        if args.sequences:
            sequences = read_sequences(args.sequences)
        else:
            parts = [divide_sequences(truth, path, protocol="davis")[0] for path in paths]
            sequences = [name for name in parts[0] if name in parts[-1]]
        if not sequences:
            raise ConfigError(f"{args.results[0]} and {args.results[-1]} have no sequence in common; give others")
        workers = os.cpu_count() or 1
        evaluations = [evaluate(truth, path, sequences=sequences, workers=workers) for path in paths]
        named = dict(zip(unique_names(args.results), evaluations, strict=True))
        return write_page(named, worst=args.worst, samples=args.bootstrap)


def tracked(args: argparse.Namespace, folder: Path) -> tuple[str, list[str]]:
    """Track the test videos of a config with each checkpoint; return the folder of their masks, and the results."""
    results = [str(folder / str(i)) for i in range(len(args.results))]
    for checkpoint, result in zip(args.results, results, strict=True):
        with quiet_start(args):
            from pe_spatial.engine.evaluation import test

            cfg = read(args, f"{result}_log")
            cfg.load_from, cfg.resume = checkpoint, False
            cfg.test_evaluator.save_dir = result
            test(cfg)
    return cfg.test_evaluator.ann_dir, results


def located(args: argparse.Namespace, folder: Path) -> tuple[str, str | None, list[Path]]:
    """Return the annotations, the folder of the images if it is known, and the detections, testing checkpoints."""
    if args.truth.endswith(".json"):
        refuse(args, *OF_CONFIGS, because="annotations (.json) as TRUTH have no")
        models = [result for result in args.results if not result.endswith(".json")]
        if models:
            raise ConfigError(f"{models[0]} is not a .json of detections; a checkpoint needs its config as TRUTH")
        return args.truth, None, [Path(result) for result in args.results]
    cfg = read(args)
    metrics = cfg.test_evaluator if isinstance(cfg.test_evaluator, list | tuple) else [cfg.test_evaluator]
    annotations = next((metric.ann_file for metric in metrics if "ann_file" in metric), None)
    if annotations is None:
        raise ConfigError(f"{args.truth} has no evaluator with COCO annotations; give annotations (.json) instead")
    dataset = cfg.test_dataloader.dataset
    images = Path(dataset.get("data_root") or "", (dataset.get("data_prefix") or {}).get("img", ""))
    files = []
    for i, result in enumerate(args.results):
        files.append(Path(result) if result.endswith(".json") else tested(args, result, folder / f"{i}.json"))
    return annotations, str(images), files


def read(args: argparse.Namespace, work_dir: str | None = None) -> Config:
    from pe_spatial.cli.arguments import load_config
    from pe_spatial.detection.coco import use_checked_annotations

    args.config, args.work_dir, args.launcher, args.local_rank = args.truth, work_dir, "none", 0
    cfg = load_config(args)
    use_checked_annotations(cfg)
    return cfg


def tested(args: argparse.Namespace, checkpoint: str, file: Path) -> Path:
    """Test a checkpoint, and return the file with its detections."""
    with quiet_start(args):
        import pe_spatial.detection  # noqa: F401  (registers)
        from pe_spatial.engine.evaluation import test, write_predictions

        cfg = read(args, str(file.with_suffix("")))  # what a test logs goes with the temporary file
        cfg.load_from, cfg.resume = checkpoint, False
        write_predictions(cfg, str(file))
        test(cfg)
    return file


def unique_names(results: list[str]) -> list[str]:
    """Return short names of the results: their last part, with parents where these are equal."""
    parts = [Path(result).with_suffix("").parts for result in results]
    for count in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-count:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    raise ConfigError(f"{results[0]} is given twice; give two results")
