"""Check that every family of MMDetection and MMSegmentation trains and predicts with PE: the sweep behind docs/swap.md.

One config of a family runs with its own backbone, without pretrained weights, on two small images of noise. If that
works, it has to work with PE too, or be refused with a reason. A small PE suffices to check the feature specs.
"""

import copy
import importlib.util
import json
import multiprocessing
import os
import platform
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config, ConfigDict
from mmengine.logging import MessageHub, MMLogger
from mmengine.registry import MODELS, DefaultScope
from mmengine.structures import PixelData
from torch import nn

from pe_spatial.errors import ConfigError
from pe_spatial.integrations.swap.policy import plan_swap

Row = dict[str, Any]

SMALL = dict(img_size=64, patch_size=16, embed_dim=64, depth=4, num_heads=2)
TIMEOUT = 400  # seconds for one family
TRIES = 2  # configs of a family to try until one runs with its own backbone
LIGHT = ("r18", "r50", "swin-t", "_t_", "tiny", "-s_", "_s_", "hr18", "b0", "320")
# deformable convolutions need 3 cells, at stride 128 too; 900 queries need as many cells, and a pooling 49
LARGER = {"DDODHead": (384, 416), "DINOHead": (320, 320), "LRASPPHead": (416, 416)}
DETECTION, SEGMENTATION = (128, 160), (128, 192)  # (h, w) of the images, in pixels
_FIXED_SIZE = ("BEiT", "MAE")  # backbones whose images have the size of the recipe
_LIMITS = dict(nms_pre=200, max_per_img=50, num=64)  # proposals; with the thousands of the recipes it takes too long


def families(scope: str) -> list[str]:
    """Return the families of a framework (mmdet, mmseg): the folders of its configs."""
    return sorted(p.name for p in _config_dir(scope).iterdir() if p.is_dir() and p.name not in ("_base_", "common"))


def _config_dir(scope: str) -> Path:
    spec = importlib.util.find_spec(scope)
    if spec is None or spec.origin is None:
        raise ConfigError(f"{scope} is not installed")
    return Path(spec.origin).parent / ".mim" / "configs"


def _configs(scope: str, family: str) -> Iterator[tuple[str, Config | str]]:
    """Yield (name, config) of the models in a family, light ones first; an error for configs that cannot be read."""

    def weight(path: Path) -> tuple[bool, bool, int]:
        pairs = "levir" in path.name  # two images in one, which an encoder of RGB images cannot read
        return pairs, not any(word in path.name for word in LIGHT), len(path.name)

    for path in sorted((_config_dir(scope) / family).glob("*.py"), key=weight):
        try:
            cfg = Config.fromfile(path, import_custom_modules=False)
        except Exception as error:  # reported as a result
            yield path.name, _message(error)
            continue
        if "model" in cfg:
            yield path.name, cfg


def _message(error: Exception) -> str:
    """Return an error on one line, without the folder of the installation."""
    text = " ".join(str(error).split())
    for scope in ("mmdet", "mmseg"):
        if importlib.util.find_spec(scope):
            text = text.replace(f"{_config_dir(scope)}/", "")
    return f"{type(error).__name__}: {text[:160]}"


def _for_each_dict(node: Any, change: Callable[[dict[str, Any]], object]) -> None:
    """Call `change` on every dict in a config."""
    if isinstance(node, dict):
        change(node)
    for child in node.values() if isinstance(node, dict) else node if isinstance(node, list | tuple) else ():
        _for_each_dict(child, change)


def _simplify(node: dict[str, Any]) -> None:
    """Remove pretrained weights, so that nothing is downloaded, and replace SyncBN, which needs CUDA, by BN."""
    for key in ("pretrained", "teacher_ckpt"):
        node.pop(key, None)
    if "checkpoint" in (node.get("init_cfg") or {}):
        node["init_cfg"] = None
    if node.get("type") in ("SyncBN", "MMSyncBN"):
        node["type"] = "BN"


def _build(cfg: Config) -> nn.Module:
    teacher = cfg.model.get("teacher_config")
    if isinstance(teacher, str):  # relative to the sources of MMDetection
        cfg.model.teacher_config = str(_config_dir("mmdet").parent / teacher)
    model = ConfigDict(copy.deepcopy(cfg.model.to_dict()))
    if _is_tracker(cfg):  # it trains its detector; matching and re-identification come on top
        allowed = ("mean", "std", "bgr_to_rgb", "pad_size_divisor")
        options = {k: v for k, v in model.data_preprocessor.items() if k in allowed}
        model = ConfigDict(model.detector, data_preprocessor=dict(type="DetDataPreprocessor", **options))
    torch.manual_seed(0)
    _for_each_dict(model, _simplify)
    built = MODELS.build(model)
    built.init_weights()
    return getattr(built, "student", built)


def _is_tracker(cfg: Config) -> bool:
    return "Track" in cfg.model.get("data_preprocessor", {}).get("type", "") and "detector" in cfg.model


def _detection_inputs(cfg: Config, model: nn.Module) -> dict[str, Any]:
    """Return two random annotated images for the model's preprocessor."""
    from mmdet.testing import demo_mm_inputs, demo_mm_proposals

    name = cfg.model.get("bbox_head", {}).get("type", "")
    h, w = LARGER.get(name, DETECTION)
    if "SSD" in name:
        h = w = int(cfg.get("input_size", 300))
    text = type(model).__name__ in ("GLIP", "GroundingDINO")
    data = demo_mm_inputs(
        2, [(3, h, w)] * 2, num_items=[4, 3], num_classes=2, with_semantic=True,
        with_mask="RTMDet" not in name or "Ins" in name,  # RTMDet would use them
        **(dict(texts=["a cat . a dog ."] * 2, custom_entities=True) if text else {}),
    )  # fmt: skip
    labels = min([2, *_class_counts(cfg)])
    stride = 1 if cfg.model.get("semantic_head") or cfg.model.get("panoptic_head") else 0  # of the semantic labels
    if (cfg.model.get("roi_head") or {}).get("semantic_head"):
        stride = 8  # SegRescale, in HTC and SCNet
    for sample in data["data_samples"]:
        # boxes as large as in real images: random ones may have no area, and then some assigners fail
        k = len(sample.gt_instances)
        corner = torch.rand(k, 2) * torch.tensor([w, h]) * 0.4
        size = torch.tensor([w, h]) * (0.2 + 0.35 * torch.rand(k, 2))
        sample.gt_instances.bboxes = torch.cat((corner, corner + size), dim=1)
        sample.gt_instances.instances_ids = torch.arange(k)
        sample.gt_instances.labels = torch.arange(k) % labels
        if "masks" in sample.gt_instances:
            masks = sample.gt_instances.masks.masks
            masks[:] = 0
            for mask, (x1, y1, x2, y2) in zip(masks, sample.gt_instances.bboxes.int().tolist(), strict=True):
                mask[y1:y2, x1:x2] = 1
        sample.set_metainfo(dict(batch_input_shape=(h, w), ori_shape=(h, w), img_path="image.jpg"))
        if type(model).__name__ == "FastRCNN":
            sample.proposals = demo_mm_proposals([(3, h, w)], 50)[0]
    for sample in data["data_samples"]:
        if stride:
            sample.gt_sem_seg = PixelData(sem_seg=torch.randint(0, 3, (1, h // stride, w // stride)))
    return data


def _class_counts(cfg: Config) -> list[int]:
    """Return every `num_classes` in the model."""
    counts: list[Any] = []
    _for_each_dict(cfg.model, lambda node: counts.append(node.get("num_classes")))
    return [count for count in counts if isinstance(count, int)]


def _segmentation_size(cfg: Config) -> tuple[int, int]:
    head = cfg.model.get("decode_head") or {}
    head = head[0] if isinstance(head, list | tuple) else head
    return LARGER.get(head.get("type", ""), SEGMENTATION)


def _segmentation_inputs(cfg: Config) -> dict[str, Any]:
    from mmseg.structures import SegDataSample

    labels = min([4, *_class_counts(cfg)])
    h, w = _segmentation_size(cfg)
    preprocessor = cfg.model.get("data_preprocessor") or {}
    if cfg.model.get("backbone", {}).get("type") in _FIXED_SIZE:
        h, w = preprocessor.get("size") or (512, 512)
    samples = []
    for _ in range(2):
        sample = SegDataSample()
        cells = torch.randint(0, labels, (1, h // 16, w // 16))
        sample.gt_sem_seg = PixelData(data=cells.repeat_interleave(16, 1).repeat_interleave(16, 2))
        sample.gt_edge_map = PixelData(data=torch.randint(0, 2, (1, h, w)))
        sample.set_metainfo(dict(img_shape=(h, w), ori_shape=(h, w), pad_shape=(h, w), flip=False))
        samples.append(sample)
    if preprocessor.get("size") is not None:
        preprocessor["size"] = (h, w)
    return dict(inputs=[torch.randint(0, 256, (3, h, w), dtype=torch.uint8) for _ in range(2)], data_samples=samples)


def _shrink(cfg: Config) -> None:
    """Keep images and numbers of proposals small, whatever the recipe's preprocessor and limits say."""
    preprocessor = cfg.model.get("data_preprocessor") or {}
    while isinstance(preprocessor.get("data_preprocessor"), dict):
        preprocessor = preprocessor["data_preprocessor"]
    if cfg.get("default_scope") == "mmseg":
        fixed = cfg.model.get("backbone", {}).get("type") in _FIXED_SIZE
        if preprocessor.get("size") is not None and not fixed:
            preprocessor["size"] = _segmentation_size(cfg)
        cfg.model["test_cfg"] = dict(mode="whole")
        return
    preprocessor.pop("batch_augments", None)
    node = cfg.model.get("detector", cfg.model)
    for key in ("train_cfg", "test_cfg"):
        _for_each_dict(node.get(key), _limit)


def _limit(node: dict[str, Any]) -> None:
    node.update({key: min(node[key], limit) for key, limit in _LIMITS.items() if node.get(key)})


def _train_and_predict(cfg: Config) -> tuple[set[str], float, str]:
    """Train a step and predict; return the parameters without gradient, the loss, and why it cannot predict."""
    MessageHub.get_current_instance().update_info_dict(dict(iter=0, epoch=0, max_iters=10))  # schedules in heads
    model = _build(cfg)
    torch.manual_seed(1)
    data = _segmentation_inputs(cfg) if cfg.get("default_scope") == "mmseg" else _detection_inputs(cfg, model)
    preprocessor: Any = model.data_preprocessor
    model.train()
    loss, _ = model.parse_losses(model(**preprocessor(copy.deepcopy(data), True), mode="loss"))  # type: ignore[operator]
    loss.backward()
    silent = {name for name, p in model.named_parameters() if p.requires_grad and p.grad is None}
    wrong = [name for name, p in model.named_parameters() if p.grad is not None and not p.grad.isfinite().all()]
    if not loss.isfinite() or wrong:
        raise ArithmeticError(f"loss {loss.item()}, gradients not finite in {wrong[:3]}")
    model.eval()
    try:
        with torch.no_grad():
            out = model(**preprocessor(copy.deepcopy(data), False), mode="predict")
        problem = "" if len(out) == 2 else f"2 images but {len(out)} predictions"
    except Exception as error:  # reported as a result
        problem = _message(error)
    return silent, loss.item(), problem


def changed_keys(before: Config, after: Config) -> list[str]:
    """Return the keys of the model that differ, except for the backbone, its weights and the preprocessor."""
    changed = []

    def compare(a: Mapping[str, Any], b: Mapping[str, Any], place: str) -> None:
        for key in sorted({*a, *b} - {"data_preprocessor", "pretrained", "init_cfg", "backbone"}):
            if key == "detector":
                compare(a[key], b[key], f"{place}detector.")
            elif json.dumps(a.get(key), default=str) != json.dumps(b.get(key), default=str):
                changed.append(place + key)

    compare(before.model.to_dict(), after.model.to_dict(), "")
    return changed


def check_family(scope: str, family: str) -> Row:
    """Run one config of a family with its own backbone and with PE; return a row of the table."""
    row: Row = dict(scope=scope, family=family)
    errors = []
    for _, (name, cfg) in zip(range(TRIES), _configs(scope, family), strict=False):
        row["config"] = name
        if isinstance(cfg, str):
            errors.append(cfg)
            continue
        start = time.perf_counter()
        with DefaultScope.overwrite_default_scope(scope):
            _check_config(cfg, row)
        row["seconds"] = round(time.perf_counter() - start, 1)
        if row["original"] == "runs" or row["refused"]:
            return row
        errors.append(row["original"])
    row.setdefault("original", errors[0] if errors else "no config of a model")
    return row


def _check_config(cfg: Config, row: Row) -> None:
    row.update(tracker=_is_tracker(cfg), type=cfg.model.type, refused=None, feature_specs=None)
    swap = None
    try:
        swap = plan_swap(cfg, SMALL, checkpoint=None)
        notes = [note for note in swap.notes if "no ViTDet recipe" not in note]  # that is about the depth of SMALL
        row.update(feature_specs=swap.feature_specs, unused=swap.unused, notes=notes)
        row["different"] = changed_keys(cfg, swap.cfg)
    except ConfigError as error:
        row["refused"] = str(error)
    original = copy.deepcopy(cfg)
    _shrink(original)
    silent: set[str] = set()
    try:
        silent, loss, problem = _train_and_predict(original)
        row.update(original="runs", original_loss=loss, original_predicts=problem or "yes")
    except Exception as error:  # then the swapped config is not judged
        row["original"] = _message(error)
    if swap is None:
        return
    _shrink(swap.cfg)
    try:
        silent_with_pe, loss, problem = _train_and_predict(swap.cfg)
    except Exception as error:  # reported as a result
        row["swapped"] = _message(error)
        return
    row.update(swapped="runs", swapped_loss=loss)
    if problem and row.get("original_predicts", "yes") == "yes":
        row["swapped"] = problem
    if row["original"] == "runs" and row["swapped"] == "runs":
        lost = sorted(name for name in silent_with_pe if name.startswith("backbone.") or name not in silent)
        if lost:
            row["swapped"] = f"no gradient in {len(lost)} parameters: {', '.join(lost[:3])}"


def check_in_process(scope: str, family: str) -> Row:
    """Call `check_family` in a process of its own, which frees its memory and can be ended after a timeout."""
    if "fork" not in multiprocessing.get_all_start_methods():
        raise ConfigError("check_swap forks processes, which Windows does not offer; run it on Linux, macOS or WSL")
    context = multiprocessing.get_context("fork")
    queue = context.Queue()

    def work() -> None:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        torch.set_num_threads(1)
        warnings.simplefilter("ignore")
        MMLogger.get_current_instance().setLevel("CRITICAL")
        queue.put(json.dumps(check_family(scope, family)))

    child = context.Process(target=work)
    child.start()
    try:
        deadline = time.monotonic() + TIMEOUT
        while time.monotonic() < deadline and child.is_alive() and queue.empty():
            time.sleep(0.2)
        if not queue.empty():
            return json.loads(queue.get())
        reason = f"took more than {TIMEOUT} s" if child.is_alive() else f"the process ended with {child.exitcode}"
        return dict(scope=scope, family=family, config="", original=reason)
    finally:  # also when interrupted
        child.kill()
        child.join()


def verdict(row: Row) -> str:
    """Return the result of a row in a few words."""
    if row.get("refused"):
        return "refused"
    if row["original"] != "runs":
        return "runs with PE only" if row.get("swapped") == "runs" else "not tested here"
    return "runs" if row.get("swapped") == "runs" else "FAILS"


def format_report(rows: Sequence[Row]) -> str:
    """Return docs/swap.md."""
    packages = ("torch", "onedl-mmengine", "onedl-mmcv", "onedl-mmdetection", "onedl-mmsegmentation")
    lines = [
        "# Which families take PE",
        "",
        "How to swap a backbone: [swap_how_to.md](swap_how_to.md). This page is written by",
        "`pe-spatial check_swap --write docs/swap.md`: one config of every family, without pretrained",
        f"weights, on two small images of noise ({platform.machine()}, CPU): with its own backbone, then with a small",
        "PE. Both train a step (finite loss and gradients; a gradient in every parameter of PE, and in every other",
        "one that got one before) and predict. Neck and heads are the same config, byte for byte, unless a remark",
        "says 'differs'.",
        "",
        ", ".join(f"{name} {version(name)}" for name in packages),
    ]
    for scope in sorted({row["scope"] for row in rows}):
        chosen = sorted((row for row in rows if row["scope"] == scope), key=lambda row: row["family"])
        lines += ["", f"## {scope}", "", _summary(chosen), ""]
        lines += ["| family | config | model | maps: channels at stride | own backbone | with PE | remarks |"]
        lines += ["|---|---|---|---|---|---|---|", *map(_table_row, chosen)]
    return "\n".join([*lines, "", "No head reads the maps in parentheses: PE returns them without any parameter.", ""])


def _summary(rows: Sequence[Row]) -> str:
    counts = Counter(map(verdict, rows))
    run = [row for row in rows if row["original"] == "runs"]
    good, refused = sum(verdict(row) in ("runs", "refused") for row in run), counts["refused"]
    return (
        f"{len(rows)} families; {len(run)} run with their own backbone on this machine. Of these {good} "
        f"({good / max(len(run), 1):.0%})\nrun with PE or are refused with a reason. Refused: {refused} of "
        f"{len(rows)} ({refused / max(len(rows), 1):.1%}).\n"
        + ", ".join(f"{name}: {count}" for name, count in sorted(counts.items())) + "."
    )  # fmt: skip


def _table_row(row: Row) -> str:
    specs, unused = row.get("feature_specs") or [], row.get("unused") or []
    maps = ", ".join(f"({c}@{s})" if i in unused else f"{c}@{s}" for i, (c, s) in enumerate(specs))
    remarks = [row["refused"]] if row.get("refused") else list(row.get("notes") or [])
    if row.get("tracker"):
        remarks.append("only its detector was run")
    if row.get("original_predicts", "yes") != "yes":
        remarks.append(f"trains; predicts neither before nor after ({row['original_predicts']})")
    remarks += [f"differs: {', '.join(row['different'])}"] if row.get("different") else []
    swapped = "refused" if row.get("refused") else row.get("swapped", "")
    cells = (row["family"], row.get("config", ""), row.get("type", ""), maps, row["original"], swapped)
    return "| " + " | ".join(str(x).replace("|", "/") for x in (*cells, "; ".join(remarks))) + " |"
