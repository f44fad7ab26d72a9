"""Say what training a config takes, before anything is trained: memory of each GPU, arithmetic, time.

python tools/plan.py projects/coco_detection/deta/stage4_coco_1824.py --gpus 64 --gpu-memory 80
python tools/plan.py configs/pe_spatial_cascade_coco.py --gpus 8 --variants t16,s16,b16,l14,g14 --json plan.json

Everything runs on the meta device: no weights are made and no GPU is needed. The table is Markdown.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from mmengine.config import Config
from mmengine.logging import MMLogger

from pe_spatial.atomic import atomic_write
from pe_spatial.cli.arguments import add_cfg_options
from pe_spatial.encoder.variants import VARIANTS
from pe_spatial.engine.configs import read_config
from pe_spatial.errors import ConfigError
from pe_spatial.planning.planner import Step, build_on_meta, measure_step, measure_weights, set_checkpointing

GB, TERA = 1e9, 1e12
COLUMNS = (
    "variant", "weights", "recomputed", "parameters", "gradients", "optimizer", "extra", "activations", "total", "fits",
    "largest batch", "TFLOP forward", "TFLOP step", "hours/epoch",
)  # fmt: skip


def configs(args: argparse.Namespace) -> dict[str, Config]:
    """Return one config for each variant that was asked for, by the variant's name."""
    result = {}
    for key in args.variants.split(",") if args.variants else [None]:
        cfg = read_config(args.config)
        cfg.merge_from_dict(args.cfg_options)
        if key is not None:
            names = [name for name in VARIANTS if name == key or name.startswith(f"pe_spatial_{key}_")]
            if len(names) != 1:
                raise ConfigError(f"--variants has {key!r}; give names such as t16, s16, b16, l14, g14 or {names}")
            cfg.merge_from_dict({f"model.{'tracker' if 'tracker' in cfg.model else 'backbone'}.variant": names[0]})
        encoder = cfg.model.get("tracker") or cfg.model.backbone
        variant = encoder.get("variant", encoder.get("type"))
        result[variant if isinstance(variant, str) else "own"] = cfg
    return result


def pipeline(cfg: Config) -> Sequence[Mapping[str, Any]]:
    """Return the steps that the first of the sets of training goes through."""
    dataset = cfg.train_dataloader.dataset
    while "pipeline" not in dataset:
        dataset = dataset.get("dataset") or next(iter(dataset.get("datasets", ())), dict(pipeline=()))
    return dataset["pipeline"]


def image_size(cfg: Config) -> tuple[int, int]:
    """Return (h, w) of the images when they reach the model, in pixels."""
    preprocessor = cfg.model.get("data_preprocessor") or {}
    side = preprocessor.get("pad_size_divisor", 1)
    size = preprocessor.get("size") or (side, side)
    if min(size) >= 128:  # a canvas, no divisor
        return tuple(size)
    for step in reversed(pipeline(cfg)):
        if step.type == "DepthRandomCrop":
            return tuple(step["size"])
        if step.type == "ClipResize":
            return (step["size"], step["size"])
        if step.type == "Resize" and not step.get("keep_ratio"):
            return tuple(step.scale[::-1])
    raise ConfigError(f"{cfg.filename} does not say how large images are; give --size HEIGHT WIDTH")


def annotated(cfg: Config) -> dict[str, int]:
    """Return the frames and objects of a clip, if the config trains on clips."""
    for step in pipeline(cfg):
        if step.type == "LoadClip":
            return dict(frames=step.num_frames, objects=step.max_objects)
    return {}


def rows(variant: str, cfg: Config, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Plan one config: a row for each of whole or sharded weights, activations kept or recomputed; in bytes."""
    for name in ("optim_wrapper", "train_dataloader"):
        if not cfg.get(name):
            raise ConfigError(f"{cfg.filename} has no {name}, so it trains nothing that could be planned")
    batch = args.batch_size or cfg.train_dataloader.batch_size
    size = tuple(args.size) if args.size else image_size(cfg)
    bfloat16 = cfg.optim_wrapper.get("type") in ("BFloat16OptimWrapper", "AmpOptimWrapper")
    clip = annotated(cfg)
    try:
        model, optimizer = build_on_meta(cfg)
    except ValueError as error:
        raise ConfigError(f"{cfg.filename} cannot be built: {' '.join(str(error).split())}") from error
    buckets = args.gpus > 1 and not (cfg.get("model_wrapper_cfg") or {}).get("gradient_as_bucket_view", False)
    ways = {"DDP": measure_weights(model, optimizer, shards=None, buckets=buckets)}
    if args.gpus > 1:
        ways["FSDP"] = measure_weights(model, optimizer, shards=args.gpus, bfloat16=bfloat16)
    result = []
    for recomputed in (False, True):
        set_checkpointing(model, recomputed)
        try:
            step, more = (measure_step(model, b, size, bfloat16=bfloat16, **clip) for b in (batch, batch + 1))
        except (RuntimeError, TypeError) as error:
            raise ConfigError(
                f"{cfg.filename} cannot be planned: {type(model).__name__} or its losses need numbers to run on "
                f"({' '.join(str(error).split())[:200]})"
            ) from error
        for way, weights in ways.items():
            activations, next_one = (
                x.activations_without_copies if way == "FSDP" and bfloat16 else x.activations for x in (step, more)
            )
            room = (args.gpu_memory - args.reserve) * GB - weights.kept
            fitting = batch + (room - activations) // (next_one - activations)
            result.append(
                dict(
                    variant=variant, size=size, batch=batch, bfloat16=bfloat16, counted=step.counted, **clip,
                    number=sum(p.numel() for p in model.parameters()), weights=way, recomputed=recomputed,
                    parameters=weights.parameters, gradients=weights.gradients, optimizer=weights.states,
                    extra=weights.extra, update=weights.update, saved=step.saved, activations=activations,
                    total=weights.kept + max(activations, weights.update),
                    largest_batch=max(int(fitting), 0) if room >= weights.update else 0,
                    forward_flops=sum(step.forward_flops.values()) / batch,
                    step_flops=sum(step.step_flops.values()) / batch,
                    hours=args.images / args.gpus * seconds(step, args) / batch / 3600,
                )
            )  # fmt: skip
    return result


def seconds(step: Step, args: argparse.Namespace) -> float:
    """Time of a step, by its arithmetic alone."""
    rates = {torch.float32: args.float32_rate, torch.bfloat16: args.bfloat16_rate}
    return sum(n / (rates[dtype] * TERA * args.efficiency) for dtype, n in step.step_flops.items())


def table(plan: list[dict[str, Any]], args: argparse.Namespace) -> str:
    """Return the plan in Markdown."""
    memory = ("parameters", "gradients", "optimizer", "extra", "activations", "total")
    lines = ["| " + " | ".join(COLUMNS) + " |", "|" + " --- |" * len(COLUMNS)]
    for row in plan:
        fits = row["total"] <= (args.gpu_memory - args.reserve) * GB
        cells = [
            f"{row['variant']} ({row['number'] / 1e6:.1f} M)", row["weights"], "yes" if row["recomputed"] else "no",
            *(f"{row[key] / GB:.2f}" for key in memory),
            "yes" if fits else "no", str(row["largest_batch"]),
            f"{row['forward_flops'] / TERA:.2f}", f"{row['step_flops'] / TERA:.2f}", f"{row['hours']:.2f}",
        ]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def assumptions(row: Mapping[str, Any], args: argparse.Namespace) -> str:
    """Return what the numbers mean and stand on."""
    (h, w), batch = row["size"], row["batch"]
    precision = "bfloat16 under autocast" if row["bfloat16"] else "float32"
    images = f"clips of {row['frames']} frames" if "frames" in row else "images"
    return f"""\
{args.config}: {h} x {w} px, {batch} {images} on each of {args.gpus} GPUs of {args.gpu_memory:g} GB, {precision}.
Counted: {row["counted"]}.

- Memory in GB (1e9 bytes) of one GPU. weights: whole on each GPU (DDP) or cut over all (FSDP, one unit for each block).
  extra: DDP's buckets; of FSDP what is gathered at a time. activations: the highest number alive, recomputed blocks
  included. total: the sum, or with what the optimizer makes in passing if that is more than the activations.
- fits: total leaves {args.reserve:g} GB for the CUDA context, libraries' buffers and fragments.
- TFLOP for one of the {images}: products, convolutions and attention, each multiplication and addition one
  operation; step: forward, backward and what is recomputed.
- hours for {args.images} {images} at {args.efficiency:.0%} of {args.bfloat16_rate:g} TFLOP/s in bfloat16 and of \
{args.float32_rate:g} TFLOP/s in float32; without data loading,
  communication and validation.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", help="configuration file")
    parser.add_argument("--gpus", type=int, default=8, metavar="N", help="in all nodes together (default 8)")
    parser.add_argument("--gpu-memory", type=float, default=80, metavar="GB", help="of one GPU (default 80)")
    parser.add_argument("--reserve", type=float, default=4, metavar="GB", help="of it to leave free (default 4)")
    parser.add_argument("--batch-size", type=int, metavar="B", help="images or clips on one GPU, if not the config's")
    parser.add_argument("--size", type=int, nargs=2, metavar=("H", "W"), help="of images, where no canvas says it")
    parser.add_argument("--variants", metavar="T16,S16", help="one plan for each: t16, s16, b16, l14, g14")
    parser.add_argument(
        "--images", type=int, default=117266, help="of an epoch (default 117266: COCO train2017's with objects)"
    )
    parser.add_argument("--efficiency", type=float, default=0.4, help="share of the peak rates reached (default 0.4)")
    parser.add_argument(
        "--bfloat16-rate", type=float, default=989, metavar="TFLOPS", help="peak (default 989: H100 SXM, dense)"
    )
    parser.add_argument(
        "--float32-rate", type=float, default=67, metavar="TFLOPS", help="peak (default 67: H100 SXM without TF32)"
    )
    parser.add_argument("--json", metavar="OUT", help="write the rows here too, in bytes and operations")
    add_cfg_options(parser)


def run(args: argparse.Namespace) -> None:
    MMLogger.get_current_instance().setLevel("ERROR")  # mmengine tells of each parameter with its own rate or none
    for name in ("gpus", "batch_size", "images"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise ConfigError(f"--{name.replace('_', '-')} is {getattr(args, name)}; it must be at least 1")
    plan = [row for variant, cfg in configs(args).items() for row in rows(variant, cfg, args)]
    print(assumptions(plan[0], args))
    print(table(plan, args))
    if args.json:
        with atomic_write(args.json) as unfinished:
            unfinished.write_text(json.dumps(plan, indent=1) + "\n")
