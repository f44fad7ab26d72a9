"""Names for the classes of released detectors, whose files have none; MMDetection knows them by dataset."""

import io
from contextlib import redirect_stdout
from dataclasses import replace
from importlib import import_module
from importlib.util import find_spec

from pe_spatial.convert.converter import Conversion
from pe_spatial.convert.layouts import COCO_CATEGORY_IDS, DETA_CLASSES

_DATASETS = {len(COCO_CATEGORY_IDS): "CocoDataset", DETA_CLASSES: "CocoDataset", 1203: "LVISV1Dataset"}
"""Number of classes -> MMDetection's dataset. Both order their classes by category id, as the released training did."""


def name_classes(conversion: Conversion) -> Conversion:
    """Add `dataset_meta`, from which MMDetection names predictions, to a detector in its layout that has none.

    The names of COCO (80 classes, or DETA's 91 category ids) and LVIS (1,203) are known; for other numbers of classes,
    and where mmdet is not installed, a note says that names are missing.
    """
    number = conversion.num_classes
    if conversion.layout_out != "mmdet" or number is None or "dataset_meta" in conversion.meta:
        return conversion
    names = _names(number)
    if names is None:
        what = "mmdet, which knows the names of the classes, is not installed" if number in _DATASETS else (
            f"the names of {number} classes are not known"
        )  # fmt: skip
        note = f"{what}: MMDetection will take those of COCO or of a config"
        return replace(conversion, notes=[*conversion.notes, note])
    if number == DETA_CLASSES and not conversion.resized:
        by_id = dict(zip(COCO_CATEGORY_IDS, names, strict=True))
        names = tuple(by_id.get(i, f"unused id {i}") for i in range(number))
    return replace(conversion, meta={**conversion.meta, "dataset_meta": {"classes": names}})


def _names(number: int) -> tuple[str, ...] | None:
    if number not in _DATASETS or find_spec("mmdet") is None:
        return None
    with redirect_stdout(io.StringIO()):
        datasets = import_module("mmdet.datasets")
    names: tuple[str, ...] = getattr(datasets, _DATASETS[number]).METAINFO["classes"]
    return names
