"""Find which geometry, image size and layer of an encoder suit your images, what they cost, and write a config.

pe-spatial geometry DATA --variant pe_spatial_b16_512                    # a few labeled images, or images alone
pe-spatial geometry CONFIG.py --variant pe_spatial_l14_448 --task depth
pe-spatial geometry DAVIS --variant pe_spatial_s16_512 --sizes 384,512,768 --geometries release,vitdet
pe-spatial geometry coco.json --variant pe_spatial_b16_512 --base pe_spatial::pe_spatial_cascade_coco.py

DATA is a folder, JSON or YAML of objects in the form of COCO, YOLO, Pascal VOC or LabelMe, a table (.csv) of images and
depth maps, videos in DAVIS' layout, the synthetic world, or a folder of images without labels. Features are frozen;
linear maps by least squares, label propagation, or without labels matches between images and their warps score them.
--out gets scores.json, frontier.png and recommended.py.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path

from pe_spatial.cli.arguments import VARIANT_HELP, add_device, choose_device, comma_separated, layers, variant
from pe_spatial.errors import ConfigError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("data", metavar="CONFIG|DATA", help="what to measure on")
    parser.add_argument("--variant", type=variant, required=True, help=VARIANT_HELP)
    weights = "weights: 'released', 'none' (random), or a file (default: released)"
    parser.add_argument("--checkpoint", default="released", help=weights)
    sizes = "image sizes in pixels (default: 0.75, 1, 1.5 and 2 times that of the pretraining)"
    parser.add_argument("--sizes", type=comma_separated, metavar="384,512", help=sizes)
    presets = "presets to compare (default: release,timm,vitdet)"
    parser.add_argument("--geometries", default="release,timm,vitdet", metavar="release,vitdet", help=presets)
    parser.add_argument("--layers", type=layers, default="all", metavar="all|5,8,11", help="encoder layers, 0-based")
    task = "what decides: segmentation, depth, tracking or correspondence (default: the first that the data allows)"
    parser.add_argument("--task", help=task)
    parser.add_argument("--images", type=int, default=50, metavar="N", help="images of each part at most")
    parser.add_argument("--clips", type=int, default=10, metavar="N", help="videos at most")
    parser.add_argument("--frames", type=int, default=20, metavar="N", help="first frames of each video")
    near = "recommend the cheapest that loses at most this part of the best score (default: 0.01)"
    parser.add_argument("--tolerance", type=float, default=0.01, help=near)
    parser.add_argument("--base", metavar="CONFIG", help="config to change (default: CONFIG, or one for the task)")
    parser.add_argument("--out", type=Path, default=Path("work_dirs/geometry"), help="folder of the results")
    add_device(parser)


def run(args: argparse.Namespace) -> None:
    from pe_spatial.cli.arguments import without_prints

    if args.sizes is not None and min(args.sizes) < 1:
        raise ConfigError(f"--sizes has {min(args.sizes)}; give pixels")
    if min(args.images, args.clips) < 1 or args.frames < 3:
        raise ConfigError("--images and --clips must be at least 1, --frames at least 3")
    with without_prints():
        from pe_spatial.alignment import doctor
        from pe_spatial.alignment.material import open_material
        from pe_spatial.alignment.measure import check_tasks
        from pe_spatial.alignment.recommended import TEMPLATES, read_base, write_recommended

        doctor.check_tolerance(args.tolerance)
        metric = doctor.metric_of(args.task) if args.task else ""
        material = open_material(args.data).at_most(args.images, args.clips, args.frames)
        task = args.task or material.tasks[0]
        metric = metric or doctor.metric_of(task)
        check_tasks(material, [task])
        base = args.base or (args.data if args.data.endswith(".py") else TEMPLATES[task])
        read_base(base)
    print(
        f"{len(material.train)} images for the probes, {len(material.val)} to score, {len(material.clips)} videos; "
        f"{task} decides"
    )
    args.out.mkdir(parents=True, exist_ok=True)  # fails now and not after the measurements
    choices = doctor.examine(
        args.variant,
        args.checkpoint,
        material,
        sizes=args.sizes,
        geometries=args.geometries.split(","),
        layers=args.layers,
        tasks=[task],
        device=choose_device(args),
        report=print,
    )
    chosen = doctor.recommend(choices, metric, args.tolerance)
    print(f"\n{doctor.format_table(choices, metric, chosen)}\n")
    _write(args, choices, chosen, metric)
    notes = [
        f"pe-spatial geometry {args.data}: {chosen.name}, {metric} {chosen.scores[metric]:.4g}, by cheap probes",
        f"{chosen.gflops:.3g} GFLOP for an image",
    ]
    about = dict(base=base, variant=args.variant, checkpoint=args.checkpoint, notes=notes)
    with without_prints():
        write_recommended(args.out / "recommended.py", chosen, **about)
    best = doctor.recommend(choices, metric, 0.0)
    print(
        f"recommended: {chosen.name} ({metric} {chosen.scores[metric]:.4g}, {chosen.gflops:.3g} GFLOP); the best is "
        f"{best.name} ({best.scores[metric]:.4g}, {best.gflops:.3g} GFLOP)\n"
        f"{args.out}/recommended.py is {base} with this choice; see also frontier.png and scores.json there"
    )


def _write(args: argparse.Namespace, choices: list, chosen: object, metric: str) -> None:
    from pe_spatial.alignment.doctor import draw_frontier
    from pe_spatial.atomic import write_json

    write_json(args.out / "scores.json", dict(choices=[asdict(choice) for choice in choices]))
    draw_frontier(args.out / "frontier.png", choices, metric, chosen)  # type: ignore[arg-type]
