"""Put an own dataset into a detection or instance-segmentation config, with everything that follows from it."""

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmengine.config import Config, ConfigDict

from pe_spatial.data.colors import palette
from pe_spatial.data.dataset import OwnDataset
from pe_spatial.engine.classes import add_imports, set_classes
from pe_spatial.engine.nodes import EVALUATORS, LOADERS, core, leaves, pipelines, replace_dataset, steps, type_name
from pe_spatial.errors import ConfigError

_DATASET_OPTIONS = (
    "pipeline", "filter_cfg", "test_mode", "serialize_data", "lazy_init", "max_refetch", "backend_args", "indices",
    "skip_missing", "return_classes",
)  # fmt: skip
_METRIC_OPTIONS = ("metric", "classwise", "proposal_nums", "iou_thrs", "metric_items", "collect_device", "backend_args")
_COCO_METRICS = {"bbox", "segm", "proposal", "proposal_fast"}
_LOADS_ANNOTATIONS = ("LoadAnnotations", "LoadPanopticAnnotations")

_REFUSED = {
    "FastRCNN": "it reads its proposals from a file; train a faster_rcnn config",
    "PanopticFPN": "it learns a map of all pixels, which boxes and masks of objects are not; train a mask_rcnn config",
    "BaseReID": "it embeds crops; train a detector",
}
_WITHOUT_MASKS = {
    "MaskScoringRoIHead": "StandardRoIHead",
    "PointRendRoIHead": "StandardRoIHead",
    "HybridTaskCascadeRoIHead": "CascadeRoIHead",
}
"""Heads that are built around masks, and those that learn the same boxes."""


def apply_dataset(cfg: Config, dataset: OwnDataset, files: Mapping[str, Path]) -> list[str]:
    """Let a config train and evaluate on `dataset`; return sentences about what else changed.

    Datasets become CheckedCocoDataset, inside wrappers too, evaluators CheckedCocoMetric; every head gets the number of
    classes. Masks are no longer learned where the data has none, nor semantic maps.

    Args:
        cfg: merged config of mmdet, of this project, or a swapped one; it is changed in place.
        dataset, files: as `open_dataset` and `write_splits` return them.

    Raises:
        ConfigError: if the model cannot learn from boxes and masks of objects.
    """
    _refuse(cfg)
    notes: list[str] = []
    _drop_semantic(cfg, notes)
    masks = _learns_masks(cfg)
    if masks and not dataset.has_masks:
        _drop_masks(cfg, notes)
        masks = False
    _set_datasets(cfg, dataset, files, notes)
    _set_evaluators(cfg, files, masks, notes)
    set_classes(cfg, len(dataset.classes), notes)
    if type_name(core(cfg.model).get("bbox_head") or {}) == "SSDHead":
        core(cfg.model).bbox_head.type = "PredictingSSDHead"
    hooks = [hook for hook in cfg.get("custom_hooks") or [] if hook.get("type") != "SetClassWeights"]
    if len(hooks) < len(cfg.get("custom_hooks") or []):
        cfg.custom_hooks = hooks
    add_imports(cfg, "pe_spatial.engine", "pe_spatial.detection")
    return list(dict.fromkeys(notes))


def _refuse(cfg: Config) -> None:
    model = cfg.get("model") or {}
    if "Track" in type_name(model.get("data_preprocessor") or {}):
        raise ConfigError(f"{cfg.filename} trains a tracker on videos; --data takes detection configs")
    if type_name(model) in _REFUSED:
        raise ConfigError(f"--data does not suit {type_name(model)}: {_REFUSED[type_name(model)]}")


def _learns_masks(cfg: Config) -> bool:
    return any(
        step.get("with_mask") or type_name(step) == "LoadPanopticAnnotations"
        for pipeline in pipelines(cfg)
        for step in steps(pipeline)
        if type_name(step) in _LOADS_ANNOTATIONS
    )


def _drop_semantic(cfg: Config, notes: list[str]) -> None:
    """Remove what learns semantic maps: the branch of HTC and SCNet, the stuff of panoptic models."""
    for pipeline in pipelines(cfg):
        for step in steps(pipeline):
            if type_name(step) == "LoadPanopticAnnotations":
                backend = {key: step[key] for key in ("backend_args",) if key in step}
                step.clear()
                step.update(type="LoadAnnotations", with_bbox=True, with_mask=True, **backend)
            elif step.get("with_seg"):
                step["with_seg"] = False
    head = core(cfg.model).get("roi_head") or {}
    removed = [key for key in ("semantic_roi_extractor", "semantic_head") if head.pop(key, None)]
    if removed:
        notes.append("the semantic head is dropped: the data has no semantic maps")
    if "panoptic_head" in core(cfg.model):
        test_cfg = core(cfg.model).setdefault("test_cfg", ConfigDict())
        if test_cfg.get("panoptic_on", True):
            notes.append("the model predicts instances only: the data has no stuff")
        test_cfg.update(panoptic_on=False, semantic_on=False, instance_on=True)


def _drop_masks(cfg: Config, notes: list[str]) -> None:
    """Remove mask heads, and masks from pipelines; ConfigError for models that find objects by their masks."""
    model = core(cfg.model)
    head = model.get("roi_head")
    own = [key for key in ("mask_head", "panoptic_head", "segm_head") if model.get(key)]
    kind = type_name(head or {})
    if own or kind == "SCNetRoIHead" or "InsSepBN" in type_name(model.get("bbox_head") or {}):
        raise ConfigError(
            f"{type_name(model)} learns masks, and not every object of the data has one; train a detector, for "
            "instance pe_spatial::pe_spatial_cascade_coco.py, which does without"
        )
    if head and head.get("mask_head"):
        for key in ("mask_head", "mask_roi_extractor", "mask_iou_head", "point_head", "interleaved", "mask_info_flow"):
            head.pop(key, None)
        head["type"] = _WITHOUT_MASKS.get(kind, head["type"])
        notes.append("mask heads and their losses are dropped: not every object of the data has a mask")
    for pipeline in pipelines(cfg):
        if any(type_name(step) == "CopyPaste" for step in pipeline):
            pipeline[:] = [step for step in pipeline if type_name(step) != "CopyPaste"]
            notes.append("CopyPaste is dropped: it copies objects by their masks")
        for step in steps(pipeline):
            for key in ("with_mask", "by_mask"):
                if step.get(key):
                    step[key] = False


def _set_datasets(cfg: Config, dataset: OwnDataset, files: Mapping[str, Path], notes: list[str]) -> None:
    splits = {"train": dataset.train, "val": dataset.val, "test": dataset.test or dataset.val}
    paths = {"train": files["train"], "val": files["val"], "test": files.get("test", files["val"])}
    colors = palette(len(dataset.classes))
    for name in LOADERS:
        if not cfg.get(name):
            continue
        split, loader = name.partition("_")[0], copy.deepcopy(cfg[name])
        loader["dataset"] = _without_repetition(loader.dataset)
        for leaf in leaves(loader.dataset):
            replace_dataset(
                leaf,
                keep=_DATASET_OPTIONS,
                type="CheckedCocoDataset",
                ann_file=str(paths[split]),
                data_prefix=dict(img=f"{splits[split].root}/"),
                metainfo=dict(classes=tuple(dataset.classes), palette=colors),
            )
            _read_run_lengths(leaf, splits[split].content)
        cfg[name] = loader
    train: Mapping[str, Any] = next(leaves((cfg.get("train_dataloader") or {}).get("dataset")), {})
    objects = {annotation["image_id"] for annotation in dataset.train.content["annotations"]}
    negatives = len(dataset.train.content["images"]) - len(objects)
    if negatives and (train.get("filter_cfg") or {}).get("filter_empty_gt"):
        notes.append(
            f"{negatives} training images without objects are omitted, as the config's filter_cfg says; "
            "train_dataloader.dataset.filter_cfg.filter_empty_gt=False keeps them"
        )


def _without_repetition(node: Any) -> Any:
    """Replace ConcatDataset by its first dataset if all have the same pipeline: they become the same images."""
    if node.get("dataset"):
        node["dataset"] = _without_repetition(node["dataset"])
    datasets = node.get("datasets")
    if datasets:
        datasets = [_without_repetition(one) for one in datasets]
        if all(one.get("pipeline") == datasets[0].get("pipeline") for one in datasets):
            return datasets[0]
        node["datasets"] = datasets
    elif isinstance(node.get("ann_file"), list | tuple):  # several files in one dataset
        node["ann_file"] = node["ann_file"][0]
    return node


def _read_run_lengths(leaf: Any, content: Mapping[str, Any]) -> None:
    """Read masks as bitmaps where some are run lengths: as polygons they would be dropped."""
    if any(isinstance(annotation.get("segmentation"), Mapping) for annotation in content["annotations"]):
        for step in steps(leaf.get("pipeline") or []):
            if step.get("poly2mask") is False:
                step["poly2mask"] = True


def _set_evaluators(cfg: Config, files: Mapping[str, Path], masks: bool, notes: list[str]) -> None:
    for name in EVALUATORS:
        if not cfg.get(name):
            continue
        path = files["val"] if name.startswith("val") else files.get("test", files["val"])
        old = cfg[name] if isinstance(cfg[name], list | tuple) else [cfg[name]]
        kinds = [type_name(one) for one in old]
        coco: Mapping[str, Any] = next(
            (one for one in old if type_name(one) in ("CocoMetric", "CheckedCocoMetric")), {}
        )
        replaced = [kind for kind in kinds if kind not in ("CocoMetric", "CheckedCocoMetric")]
        if replaced:
            notes.append(f"CheckedCocoMetric evaluates in place of {' and '.join(replaced)}")
        source = coco or old[0]
        options = {key: source[key] for key in _METRIC_OPTIONS if key in source}
        options["metric"] = _metrics(options.get("metric"), masks)
        if not coco:
            options.pop("iou_thrs", None)  # of VOC
        cfg[name] = ConfigDict(type="CheckedCocoMetric", ann_file=str(path), **options)


def _metrics(old: Any, masks: bool) -> Any:
    """Return what to evaluate: what the config evaluated, boxes if that was something else, masks if there are any."""
    wanted = [one for one in ([old] if isinstance(old, str) else old or []) if one in _COCO_METRICS]
    wanted = wanted or (["bbox", "segm"] if masks else ["bbox"])
    kept = [one for one in wanted if masks or one != "segm"] or ["bbox"]
    return kept[0] if len(kept) == 1 else kept
