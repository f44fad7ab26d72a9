"""Swap the backbone of one config of every MMDetection and MMSegmentation family; train a step, predict, tabulate.

python tools/check_swap.py                               # all families; goes on where it was interrupted
python tools/check_swap.py --scope mmdet --family atss detr ssd
python tools/check_swap.py --write docs/swap.md          # the tables, from what is in --results

Every family is first tried with its own backbone, without pretrained weights, on two small random images. If that runs,
it has to run with PE too, or to be refused with a reason. PE is a small one here: what is checked is the feature_specs.
"""

import argparse
import copy
import importlib.util
import json
import multiprocessing
import os
import platform
import signal
import sys
import time
import warnings
from collections import Counter
from importlib.metadata import version
from pathlib import Path

import torch
from mmengine.config import Config, ConfigDict
from mmengine.logging import MessageHub, MMLogger
from mmengine.registry import MODELS, DefaultScope
from mmengine.structures import PixelData

from pe_spatial.errors import ConfigError
from pe_spatial.integrations.swap.policy import plan_swap

SMALL = dict(img_size=64, patch_size=16, embed_dim=64, depth=4, num_heads=2)  # the same windows in miniature
SECONDS = 400  # for one family
TRIES = 2  # configs of a family that are tried until one runs with its own backbone
LIGHT = ("r18", "r50", "swin-t", "_t_", "tiny", "-s_", "_s_", "hr18", "b0", "320")
# deformable convolutions need three cells, at stride 128 too; 900 queries as many cells; a pooling 49 cells
LARGER = {"DDODHead": (384, 416), "DINOHead": (320, 320), "LRASPPHead": (416, 416)}
DETECTION, SEGMENTATION = (128, 160), (128, 192)  # h, w of the images, pixels


def folder(scope):
    """Return the folder of the configs that a framework installs."""
    package = importlib.util.find_spec(scope)
    return Path(package.origin).parent / ".mim" / "configs" if package else None


def said(error):
    """Return what an error says, on one line and without the folder of the installation."""
    text = " ".join(str(error).split()).replace(f"{folder('mmdet')}/", "").replace(f"{folder('mmseg')}/", "")
    return f"{type(error).__name__}: {text[:160]}"


def families(scope):
    root = folder(scope)
    return sorted(path.name for path in root.iterdir() if path.is_dir() and path.name not in ("_base_", "common"))


def configs(scope, family):
    """Return the configs of models in a family, the light ones first."""

    def weight(path):
        pairs = "levir" in path.name  # two images in one, which is no task for an encoder of one
        return pairs, not any(word in path.name for word in LIGHT), len(path.name)

    paths = sorted((folder(scope) / family).glob("*.py"), key=weight)
    out = []
    for path in paths:
        try:
            cfg = Config.fromfile(path, import_custom_modules=False)
        except Exception as error:  # a config that cannot even be read is a finding too
            out.append((path, said(error)))
            continue
        if "model" in cfg:
            out.append((path, cfg))
    return out


def without_weights(node):
    """Leave out every pretrained weight, so that nothing is downloaded and other initialisations still run."""
    if isinstance(node, dict):
        kept = {k: without_weights(v) for k, v in node.items() if k not in ("pretrained", "teacher_ckpt")}
        init = kept.get("init_cfg")
        if isinstance(init, dict) and "checkpoint" in init:
            kept["init_cfg"] = None
        return type(node)(kept)
    return type(node)(map(without_weights, node)) if isinstance(node, list | tuple) else node


def on_one_process(node):
    """SyncBN needs CUDA; on one process BN is the same."""
    if isinstance(node, dict):
        node = type(node)({k: on_one_process(v) for k, v in node.items()})
        return type(node)(node, type="BN") if node.get("type") in ("SyncBN", "MMSyncBN") else node
    return type(node)(map(on_one_process, node)) if isinstance(node, list | tuple) else node


def build(cfg):
    teacher = cfg.model.get("teacher_config")
    if isinstance(teacher, str):  # relative to the sources of MMDetection
        cfg.model.teacher_config = str(folder("mmdet").parent / teacher)
    model = ConfigDict(copy.deepcopy(cfg.model.to_dict()))
    if is_tracker(cfg):  # what it trains is its detector; matching and re-identification come on top
        options = {
            k: v for k, v in model.data_preprocessor.items() if k in ("mean", "std", "bgr_to_rgb", "pad_size_divisor")
        }
        model = ConfigDict(model.detector, data_preprocessor=dict(type="DetDataPreprocessor", **options))
    torch.manual_seed(0)
    built = MODELS.build(on_one_process(without_weights(model)))
    built.init_weights()
    return getattr(built, "student", built)


def is_tracker(cfg):
    return "Track" in cfg.model.get("data_preprocessor", {}).get("type", "") and "detector" in cfg.model


def images(cfg, model):
    """Return two random annotated images, as the model's preprocessor takes them."""
    torch.manual_seed(1)
    if cfg.get("default_scope") == "mmseg":
        return scenes(cfg)
    from mmdet.testing import demo_mm_inputs, demo_mm_proposals

    name = cfg.model.get("bbox_head", {}).get("type", "")
    h, w = LARGER.get(name, DETECTION)
    if "SSD" in name:
        h = w = int(cfg.get("input_size", 300))
    text = type(model).__name__ in ("GLIP", "GroundingDINO")
    data = demo_mm_inputs(
        2, [(3, h, w)] * 2, num_items=[4, 3], num_classes=2, with_semantic=True,
        with_mask="RTMDet" not in name or "Ins" in name,  # it takes masks for its own
        **(dict(texts=["a cat . a dog ."] * 2, custom_entities=True) if text else {}),
    )  # fmt: skip
    for sample in data["data_samples"]:
        # boxes as large as in real images: random ones may have no area, which some assigners cannot take
        k = len(sample.gt_instances)
        corner = torch.rand(k, 2) * torch.tensor([w, h]) * 0.4
        size = torch.tensor([w, h]) * (0.2 + 0.35 * torch.rand(k, 2))
        sample.gt_instances.bboxes = torch.cat((corner, corner + size), dim=1)
        sample.gt_instances.instances_ids = torch.arange(k)
        sample.gt_instances.labels = torch.arange(k) % min([2, *classes(cfg.model.to_dict())])
        if "masks" in sample.gt_instances:
            masks = sample.gt_instances.masks.masks
            masks[:] = 0
            for mask, (x1, y1, x2, y2) in zip(masks, sample.gt_instances.bboxes.int().tolist(), strict=True):
                mask[y1:y2, x1:x2] = 1
        sample.set_metainfo(dict(batch_input_shape=(h, w), ori_shape=(h, w), img_path="image.jpg"))
        if type(model).__name__ == "FastRCNN":
            sample.proposals = demo_mm_proposals([(3, h, w)], 50)[0]
    seen = strides_of_semantics(cfg.model)
    if seen:
        for sample in data["data_samples"]:
            sample.gt_sem_seg = PixelData(sem_seg=torch.randint(0, 3, (1, h // seen, w // seen)))
    return data


def strides_of_semantics(model):
    """Return the stride at which the recipe's pipeline hands over semantic labels; 0 where there are none."""
    if (model.get("roi_head") or {}).get("semantic_head"):
        return 8  # SegRescale, in HTC and SCNet
    return 1 if model.get("semantic_head") or model.get("panoptic_head") else 0


def classes(node):
    """Return every number of classes that a model names."""
    if isinstance(node, dict):
        here = [node["num_classes"]] if isinstance(node.get("num_classes"), int) else []
        return here + [n for value in node.values() for n in classes(value)]
    return [n for value in node for n in classes(value)] if isinstance(node, list | tuple) else []


def scenes(cfg):
    from mmseg.structures import SegDataSample

    head = cfg.model.get("decode_head") or {}
    head = head[0] if isinstance(head, list | tuple) else head
    labels = min([4, *classes(cfg.model.to_dict())])
    h, w = LARGER.get(head.get("type"), SEGMENTATION)
    preprocessor = cfg.model.get("data_preprocessor") or {}
    size = preprocessor.get("size")
    if cfg.model.get("backbone", {}).get("type") in ("BEiT", "MAE"):
        h, w = size or (512, 512)
    samples = []
    for _ in range(2):
        sample = SegDataSample()
        cells = torch.randint(0, labels, (1, h // 16, w // 16))
        sample.gt_sem_seg = PixelData(data=cells.repeat_interleave(16, 1).repeat_interleave(16, 2))
        sample.gt_edge_map = PixelData(data=torch.randint(0, 2, (1, h, w)))
        sample.set_metainfo(dict(img_shape=(h, w), ori_shape=(h, w), pad_shape=(h, w), flip=False))
        samples.append(sample)
    if "size" in preprocessor and preprocessor.get("size") is not None:
        preprocessor["size"] = (h, w)
    return dict(inputs=[torch.randint(0, 256, (3, h, w), dtype=torch.uint8) for _ in range(2)], data_samples=samples)


def shrink_canvas(cfg):
    """Keep the images small: preprocessors that pad or resize to the size of the recipe would not."""
    head = cfg.model.get("decode_head") or {}
    h, w = LARGER.get(head.get("type") if isinstance(head, dict) else None, SEGMENTATION)
    preprocessor = cfg.model.get("data_preprocessor") or {}
    while isinstance(preprocessor.get("data_preprocessor"), dict):
        preprocessor = preprocessor["data_preprocessor"]
    if cfg.get("default_scope") == "mmseg" and preprocessor.get("size") is not None:
        if cfg.model.get("backbone", {}).get("type") not in ("BEiT", "MAE"):
            preprocessor["size"] = (h, w)
    if cfg.get("default_scope") != "mmseg" and preprocessor.get("batch_augments"):
        preprocessor.pop("batch_augments")
    if cfg.get("default_scope") == "mmseg":
        cfg.model["test_cfg"] = dict(mode="whole")
        return
    node = cfg.model.get("detector", cfg.model)
    for key in ("train_cfg", "test_cfg"):
        if node.get(key):
            node[key] = fewer(node[key])


def fewer(node):
    """Keep few proposals and samples: the recipes' thousands would take most of the time."""
    limits = dict(nms_pre=200, max_per_img=50, num=64)
    if isinstance(node, dict):
        return type(node)({k: min(v, limits[k]) if k in limits and v else fewer(v) for k, v in node.items()})
    return type(node)(map(fewer, node)) if isinstance(node, list | tuple) else node


def one_step(cfg):
    """Build, train a step, predict; return (names of parameters without gradient, loss, why it does not predict)."""
    MessageHub.get_current_instance().update_info_dict(dict(iter=0, epoch=0, max_iters=10))  # schedules in heads
    inner = build(cfg)
    data = images(cfg, inner)
    preprocessor = inner.data_preprocessor
    inner.train()
    batch = preprocessor(copy.deepcopy(data), True)
    losses = inner(**batch, mode="loss")
    loss, _ = inner.parse_losses(losses)
    loss.backward()
    silent = {name for name, p in inner.named_parameters() if p.requires_grad and p.grad is None}
    wrong = [name for name, p in inner.named_parameters() if p.grad is not None and not p.grad.isfinite().all()]
    if not loss.isfinite() or wrong:
        raise ArithmeticError(f"loss {loss.item()}, gradients not finite in {wrong[:3]}")
    inner.eval()
    problem = ""
    try:
        with torch.no_grad():
            out = inner(**preprocessor(copy.deepcopy(data), False), mode="predict")
        if len(out) != 2:
            problem = f"2 images but {len(out)} predictions"
    except Exception as error:
        problem = said(error)
    return silent, loss.item(), problem


def same_neck_and_heads(before, after):
    """Return what differs in the model beside the backbone, its weights and the preprocessor."""
    different = []

    def compare(a, b, place):
        for key in sorted({*a, *b} - {"data_preprocessor", "pretrained", "init_cfg", "backbone"}):
            if key == "detector":
                compare(a[key], b[key], f"{place}detector.")
            elif json.dumps(a.get(key), default=str) != json.dumps(b.get(key), default=str):
                different.append(place + key)

    compare(before.model.to_dict(), after.model.to_dict(), "")
    return different


def check(scope, family):
    """Return one row of the table."""
    row = dict(scope=scope, family=family)
    failures = []
    for path, cfg in configs(scope, family)[:TRIES]:
        row["config"] = path.name
        if isinstance(cfg, str):
            failures.append(cfg)
            continue
        start = time.perf_counter()
        with DefaultScope.overwrite_default_scope(scope):
            row["tracker"] = is_tracker(cfg)
            row.update(type=cfg.model.type, refused=None, feature_specs=None)
            plan = None
            try:
                plan = plan_swap(cfg, SMALL, checkpoint=None)
                row.update(feature_specs=plan.feature_specs, unused=plan.unused, notes=plan.notes[1:],
                           different=same_neck_and_heads(cfg, plan.cfg))  # fmt: skip
            except ConfigError as error:
                row["refused"] = str(error)
            original = copy.deepcopy(cfg)
            shrink_canvas(original)
            try:
                silent, loss, problem = one_step(original)
                row.update(original="runs", original_loss=loss, original_predicts=problem or "yes")
            except Exception as error:  # what does not run as it is proves nothing
                row["original"] = said(error)
                failures.append(row["original"])
            if plan is None:
                row["seconds"] = round(time.perf_counter() - start, 1)
                return row
            shrink_canvas(plan.cfg)
            try:
                ours, loss, problem = one_step(plan.cfg)
                row.update(swapped="runs", swapped_loss=loss)
                if problem and row.get("original_predicts", "yes") == "yes":
                    row["swapped"] = problem
            except Exception as error:
                row["swapped"] = said(error)
            if row["original"] == "runs" and row["swapped"] == "runs":
                lost = sorted(name for name in ours if name.startswith("backbone.") or name not in silent)
                if lost:
                    row["swapped"] = f"no gradient in {len(lost)} parameters: {', '.join(lost[:3])}"
        row["seconds"] = round(time.perf_counter() - start, 1)
        if row["original"] == "runs":
            return row
    row.setdefault("original", failures[0] if failures else "no config of a model")
    return row


def in_child(scope, family):
    """Check in a process of its own, so that memory is given back and nothing hangs for good."""
    queue = multiprocessing.get_context("fork").Queue()

    def work():
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        torch.set_num_threads(1)
        warnings.simplefilter("ignore")
        MMLogger.get_current_instance().setLevel("CRITICAL")
        queue.put(json.dumps(check(scope, family)))

    child = multiprocessing.get_context("fork").Process(target=work)
    child.start()
    try:
        deadline = time.monotonic() + SECONDS
        while time.monotonic() < deadline and child.is_alive() and queue.empty():
            time.sleep(0.2)
        if not queue.empty():
            return json.loads(queue.get())
        reason = f"took more than {SECONDS} s" if child.is_alive() else f"the process ended with {child.exitcode}"
        return dict(scope=scope, family=family, config="", original=reason)
    finally:  # at an interruption too
        child.kill()
        child.join()


def verdict(row):
    if row.get("refused"):
        return "refused"
    if row["original"] != "runs":
        return "swapped, runs" if row.get("swapped") == "runs" else "not to be judged here"
    return "runs" if row.get("swapped") == "runs" else "FAILS"


def table(rows):
    """Return docs/swap.md."""
    lines = [
        "# Which families take PE",
        "",
        "Written by `python tools/check_swap.py --write docs/swap.md`. One config of every family, without pretrained",
        f"weights, on two small images of noise ({platform.machine()}, CPU): with its own backbone, then with PE",
        "in miniature. "
        "Both train a step (finite loss and gradients; a gradient in every parameter of PE, and in every other",
        "one that got one before) and predict. Neck and heads are the same config, byte for byte, unless a remark says",
        "'differs'.",
        "",
        ", ".join(f"{name} {version(name)}" for name in
                  ("torch", "onedl-mmengine", "onedl-mmcv", "onedl-mmdetection", "onedl-mmsegmentation")),
    ]  # fmt: skip
    for scope in sorted({row["scope"] for row in rows}):
        mine = sorted((row for row in rows if row["scope"] == scope), key=lambda row: row["family"])
        counts = Counter(map(verdict, mine))
        judged = [row for row in mine if row["original"] == "runs"]
        good = sum(verdict(row) in ("runs", "refused") for row in judged)
        refused = sum(verdict(row) == "refused" for row in mine)
        lines += [
            "",
            f"## {scope}",
            "",
            f"{len(mine)} families; {len(judged)} run with their own backbone on this machine. Of these {good} "
            f"({good / max(len(judged), 1):.0%}) run with PE or are refused with a reason. Refused: {refused} of "
            f"{len(mine)} ({refused / max(len(mine), 1):.1%}). "
            + "; ".join(f"{name}: {count}" for name, count in sorted(counts.items())) + ".",
            "",
            "| family | config | model | maps: channels at stride | own backbone | with PE | remarks |",
            "|---|---|---|---|---|---|---|",
        ]  # fmt: skip
        for row in mine:
            levels = row.get("feature_specs") or []
            unused = row.get("unused") or []
            maps = ", ".join(f"({c}@{s})" if i in unused else f"{c}@{s}" for i, (c, s) in enumerate(levels))
            remarks = [row["refused"]] if row.get("refused") else list(row.get("notes") or [])
            if row.get("tracker"):
                remarks.append("its detector alone was run")
            if row.get("original_predicts", "yes") != "yes":
                remarks.append(f"trains; predicts neither before nor after ({row['original_predicts']})")
            remarks += [f"differs: {', '.join(row['different'])}"] if row.get("different") else []
            swapped = "refused" if row.get("refused") else row.get("swapped", "")
            cells = (row["family"], row.get("config", ""), row.get("type", ""), maps, row["original"], swapped)
            lines.append("| " + " | ".join(str(x).replace("|", "/") for x in (*cells, "; ".join(remarks))) + " |")
    return "\n".join([*lines, "", "Maps in parentheses are read by nobody: PE gives them without any parameter.", ""])


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--scope", choices=["mmdet", "mmseg", "all"], default="all")
    parser.add_argument("--family", nargs="+", help="these alone, and again")
    parser.add_argument(
        "--results", default="work_dirs/check_swap.jsonl", help="one line a family; what is in it is done"
    )
    parser.add_argument("--write", metavar="FILE", help="write the tables from the results, and check nothing")


def run(args: argparse.Namespace) -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("interrupted"))  # so that no child stays behind
    results = Path(args.results)
    results.parent.mkdir(parents=True, exist_ok=True)
    rows = [json.loads(line) for line in results.read_text().splitlines()] if results.is_file() else []
    done = {(row["scope"], row["family"]) for row in rows}
    wanted = [
        (scope, family)
        for scope in (["mmdet", "mmseg"] if args.scope == "all" else [args.scope])
        for family in families(scope)
        if not args.family or family in args.family
    ]
    if args.family:
        unknown = set(args.family) - {family for _, family in wanted}
        if unknown:
            raise ConfigError(f"no family {', '.join(sorted(unknown))} in {args.scope}; see tools/check_swap.py --help")
        done -= set(wanted)
        rows = [row for row in rows if (row["scope"], row["family"]) not in wanted]
        results.write_text("".join(json.dumps(row) + "\n" for row in rows))
    if not (args.write and not args.family):
        for scope, family in wanted:
            if (scope, family) in done:
                continue
            row = in_child(scope, family)
            rows.append(row)
            with results.open("a") as file:
                file.write(json.dumps(row) + "\n")
            print(
                f"{scope:6} {family:22} {verdict(row):22} {row['original']:.50} | {row.get('swapped', '')}", flush=True
            )
    if args.write:
        Path(args.write).write_text(table(rows))
    failed = sum(verdict(row) == "FAILS" for row in rows if (row["scope"], row["family"]) in wanted)
    if failed:
        sys.exit(f"{failed} families fail")
