"""The classes of a dataset, put into every part of a config that counts them."""

from collections.abc import Sequence
from typing import Any

from mmengine.config import Config, ConfigDict

from pe_spatial.engine.checks import NOT_OF_THE_DATA
from pe_spatial.engine.nodes import type_name


def set_classes(cfg: Config, number: int, notes: list[str]) -> None:
    """Set the number of classes in every head of a model; add sentences to `notes` about what else changed."""
    for place in ("model", "tta_model"):
        _set_classes(cfg.get(place), number, None, notes)


def _set_classes(node: Any, number: int, old: int | None, notes: list[str]) -> None:
    """Set the number of classes in every head below `node`, and the weights of classes in their losses."""
    if isinstance(node, list | tuple):
        for one in node:
            _set_classes(one, number, old, notes)
    if not isinstance(node, dict) or "language_model" in node:  # it detects what a text names
        return
    if type_name(node) == "FederatedLoss":
        node.clear()
        node.update(type="CrossEntropyLoss", use_sigmoid=False, loss_weight=1.0)
        notes.append("cross-entropy replaces FederatedLoss, which needs LVIS's counts of images")
        return
    if "num_things_classes" in node:
        old = node["num_things_classes"] + node.get("num_stuff_classes", 0)
        node.update(num_things_classes=number, num_stuff_classes=0)
    if isinstance(node.get("num_classes"), int):
        old, node["num_classes"] = node["num_classes"], number
    if node.get("class_ids"):  # COCO's
        node["class_ids"] = None
    weights = node.get("class_weight")
    if isinstance(weights, list | tuple) and old is not None and len(weights) in (old, old + 1):
        same = set(weights[:old]) <= {weights[0]}
        node["class_weight"] = [weights[0] if same else 1.0] * number + list(weights[old:])
        if not same:
            notes.append("the losses' class_weight, which was different for each class, is 1 for each")
    for key, value in node.items():
        if key not in NOT_OF_THE_DATA and "teacher" not in key:
            _set_classes(value, number, old, notes)


def add_imports(cfg: Config, *modules: str) -> None:
    """Let a config import `modules`, which register what it names."""
    imports = cfg.get("custom_imports") or {}
    names: str | Sequence[str] = imports.get("imports", ())
    names = [names] if isinstance(names, str) else names
    cfg.custom_imports = ConfigDict(imports=list(dict.fromkeys([*names, *modules])), allow_failed_imports=False)
