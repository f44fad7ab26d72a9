"""Which families of the swap can be exported: one config of each, with a small PE, as a section of docs/export.md.

python benchmarks/export_families.py [--family atss detr] [--write docs/export.md]
"""

import argparse
import json
import re
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from mmdet.structures import DetDataSample
from mmengine.logging import MMLogger
from mmengine.registry import DefaultScope
from onnxruntime.capi.onnxruntime_pybind11_state import Fail, InvalidArgument, RuntimeException

from pe_spatial.errors import ConfigError
from pe_spatial.export.certificate import _random
from pe_spatial.export.dense import segmenter_graph
from pe_spatial.export.detector import exportable_of, graph_of, pixels_of
from pe_spatial.export.graph import Exportable, export
from pe_spatial.export.suppression import translations
from pe_spatial.integrations.swap import check
from pe_spatial.integrations.swap.policy import plan_swap
from pe_spatial.runtime.compare import DETECTION, LIMITS, difference, match, problems, worst
from pe_spatial.runtime.manifest import read_manifest
from pe_spatial.runtime.sessions import open_session
from pe_spatial.runtime.verify import objects

FAMILIES = {
    "mmdet": ["atss", "cornernet", "ddod", "deformable_detr", "detectors", "detr", "dino", "faster_rcnn", "fcos", "gfl",
              "mask2former", "mask_rcnn", "paa", "retinanet", "soft_teacher", "ssd", "tood", "vfnet", "yolo", "yolof",
              "yolox"],
    "mmseg": ["fastscnn", "pidnet", "pspnet", "segformer", "segmenter", "unet", "upernet"],
}  # fmt: skip
RUNTIME_ERRORS = (InvalidArgument, Fail, RuntimeException)
HEADING = "## Families of the swap"


class Network(torch.nn.Module):
    """Backbone, neck and heads of a model, without the selection of results in Python."""

    def __init__(self, model: Any, samples: Any) -> None:
        super().__init__()
        self.model, self.samples = model, samples

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(_tensors(self.model(images, self.samples, mode="tensor")))


def _tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return [tensor for item in items for tensor in _tensors(item)]


def family_row(scope: str, family: str) -> dict[str, str]:
    """Return one row of the table."""
    for name, cfg in check._configs(scope, family):
        if isinstance(cfg, str):
            continue
        row = dict(scope=scope, family=family, config=name, type=cfg.model.type)
        try:
            with DefaultScope.overwrite_default_scope(scope):
                swap = plan_swap(cfg, check.SMALL, checkpoint=None)
                check._shrink(swap.cfg)
                for part in ("encoder", "decoder"):
                    if "num_layers" in swap.cfg.model.get(part, {}):
                        swap.cfg.model[part].num_layers = 2
                if swap.cfg.model.get("as_two_stage"):
                    swap.cfg.model.num_queries = 100  # a small image has fewer places than DINO takes
                model = check._build(swap.cfg).eval()
                return row | try_export(scope, swap.cfg, model)
        except ConfigError as error:
            return row | dict(result="no", reason=explained(error))
        except Exception as error:  # reported as a result
            return row | dict(result="no", reason=f"{type(error).__name__}: {str(error).splitlines()[0][:140]}")
    return dict(scope=scope, family=family, config="", type="", result="no", reason="no config can be read")


def try_export(scope: str, cfg: Any, model: Any) -> dict[str, str]:
    """Export the complete model, or else the network, and compare."""
    try:
        return segmenter_row(model) if scope == "mmseg" else detector_row(model)
    except ConfigError as error:
        reason = explained(error)
    except RUNTIME_ERRORS as error:  # a file that fails at another size than the tracer's
        reason = f"at other sizes {re.sub('[<>]', '', ' '.join(str(error).split()))[:160]}"
    make = check._segmentation_inputs if scope == "mmseg" else lambda c: check._detection_inputs(c, model)
    data = model.data_preprocessor(make(cfg), False)
    network = Network(model, data.get("data_samples"))
    with torch.no_grad():
        names = [f"output_{i}" for i in range(len(network(data["inputs"])))]
    exportable = Exportable(
        module=network, task="network", inputs={"images": data["inputs"]}, dynamic={}, outputs=names,
        translations=translations(),
    )  # fmt: skip
    with exported(exportable) as run:
        found = run(data["inputs"].numpy())
    with torch.no_grad():
        expected = [x.numpy() for x in network(data["inputs"])]
    largest = max(relative(found[key], theirs) for key, theirs in zip(names, expected, strict=True))
    return dict(result="network", reason=f"one size; {reason}; differs by {largest:.1g} at most")


def detector_row(model: Any) -> dict[str, str]:
    """Compare the exported graph with `predict`, at the sizes of a certificate."""
    pixels, _ = pixels_of(model.data_preprocessor, [])
    spread(model)
    exportable = exportable_of(graph_of(model, pixels))
    height, width = exportable.inputs["pixels"].shape[1:3]
    matched = []
    with exported(exportable) as run:
        for batch, h, w in ((1, height, width), (3, width, height), (1, height, height)):
            images = random_pixels(batch, h, w)
            values = run(images)
            for i, theirs in enumerate(predicted(model, images)):
                matched.append(match(objects({k: values[k][i] for k in DETECTION if k in values}), theirs))
    found = worst(matched)
    limits = LIMITS["fp32"] | dict(iou=0.95)  # masks of random weights are noise about the threshold
    if problems({}, found, limits):
        return dict(result="no", reason="; ".join(problems({}, found, limits)))
    masks = f", masks with IoU of at least {found['iou']:.3f}" if "masks" in exportable.outputs else ""
    return dict(result="complete", reason=f"{found['theirs']:.0f} detections, boxes within {found['box']:.1g} px, "
                                          f"scores within {found['score']:.1g}{masks}")  # fmt: skip


def segmenter_row(model: Any) -> dict[str, str]:
    """Compare the logits of images with those before MMSegmentation's argmax, and count other classes."""
    pipeline = SimpleNamespace(transforms=[])
    exportable = segmenter_graph(SimpleNamespace(model=model, pipeline=pipeline, meta={}, class_names=()))
    height, width = exportable.inputs["pixels"].shape[1:3]
    gaps, other, total = [], 0, 0
    with exported(exportable) as run:
        for batch, h, w in ((1, height, width), (3, width, height), (1, height, height)):
            images = random_pixels(batch, h, w)
            found = run(images)["logits"]
            meta = dict(img_shape=(h, w), ori_shape=(h, w), pad_shape=(h, w))
            with torch.no_grad():
                inputs = exportable.module.normalized(torch.from_numpy(images))
                theirs = model.encode_decode(inputs, [meta] * batch).numpy()
            gaps.append(relative(found, theirs))
            other += int((found.argmax(1) != theirs.argmax(1)).sum())
            total += theirs.argmax(1).size
    reason = f"logits within {max(gaps):.1g}; another class in {other} of {total} pixels"
    return dict(result="complete" if max(gaps) <= LIMITS["fp32"]["stage"] else "no", reason=reason)


def spread(model: Any) -> None:
    """Give the heads random weights whose scores and boxes differ, as those of a fresh model do not."""
    torch.manual_seed(0)
    for head in ("bbox_head", "rpn_head", "roi_head"):
        for name, weight in getattr(model, head, torch.nn.Module()).named_parameters():
            if weight.ndim > 1 and "embed" not in name:
                torch.nn.init.normal_(weight, std=weight[0].numel() ** -0.5)
            elif name.endswith("bias"):
                torch.nn.init.normal_(weight, std=0.1)


def predicted(model: Any, images: np.ndarray) -> list[dict[str, np.ndarray]]:
    """Return what MMDetection finds in images (B, H, W, 3) uint8 RGB."""
    size = images.shape[1:3]
    sample = DetDataSample(metainfo=dict(img_shape=size, ori_shape=size, scale_factor=(1.0, 1.0)))
    inputs = [torch.from_numpy(image.copy()).permute(2, 0, 1).flip(0) for image in images]
    data = dict(inputs=inputs, data_samples=[sample.clone() for _ in inputs])
    with torch.no_grad():
        found = [one.pred_instances for one in model(**model.data_preprocessor(data, False), mode="predict")]
    return [
        dict(boxes=one.bboxes.numpy(), scores=one.scores.numpy(), labels=one.labels.numpy())
        | (dict(masks=one.masks.numpy()) if "masks" in one else {})
        for one in found
    ]


def random_pixels(batch: int, height: int, width: int) -> np.ndarray:
    """Return images as a certificate has them."""
    return _random(1, batch, (height, width), seed=batch)


def explained(error: ConfigError) -> str:
    """Return an error with the line of the model that cannot be traced."""
    lines = traceback.extract_tb(error.__cause__.__traceback__) if error.__cause__ else []
    own = [line for line in lines if re.search(r"site-packages/(mm|timm)", line.filename)]
    where = f"; in {own[-1].filename.split('site-packages/')[1]}: `{own[-1].line}`" if own else ""
    return str(error).replace("<", "").replace(">", "") + where


@contextmanager
def exported(exportable: Exportable) -> Iterator[Callable[[np.ndarray], dict[str, np.ndarray]]]:
    """Yield a call of the exported file in ONNX Runtime."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "out"
        export(exportable, folder)
        session = open_session(folder, read_manifest(folder))
        (key,) = exportable.inputs
        yield lambda value: session.run({key: value})


def relative(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Return the largest difference, relative to the largest value above 1."""
    one = difference(ours, theirs)
    return one["largest"] / max(1.0, one["scale"])


def table(rows: list[dict[str, str]]) -> str:
    """Return the section of docs/export.md."""
    lines = [
        HEADING, "",
        "Written by `python benchmarks/export_families.py --write docs/export.md`: one config of each family, with a",
        "small PE, two layers in transformers, 100 queries of two stages and random weights, to ONNX; ONNX Runtime",
        "against PyTorch at three sizes, in batches of 1 and 3. `complete`: pixels in; boxes, or logits of the image's",
        "size, out; any size and batch from one file. `network`: backbone, neck and heads at one size; the selection",
        "of results stays in Python. Differences of logits and outputs of networks are relative to the largest value",
        "above 1.", "",
        "| family | config | exported | remarks |", "|---|---|---|---|",
    ]  # fmt: skip
    keys = ("family", "config", "result", "reason")
    lines += ["| " + " | ".join(row[key].replace("|", "/") for key in keys) + " |" for row in rows]
    lines += [
        "", "MMDetection 3.5's own `predict` of SSD stops (`SSDHead` has no `loss_cls`), so nothing to compare.",
        "Small models of eleven families are compared with `predict` by `tests/export/test_one_stage.py`.",
    ]  # fmt: skip
    return "\n".join([*lines, ""])


def replace_section(page: str, section: str) -> str:
    """Return a page with its section of this heading replaced."""
    before, _, rest = page.partition(HEADING)
    return f"{before}{section}\n## {rest.split(f'{chr(10)}## ', 1)[1]}"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", nargs="+", help="only these")
    parser.add_argument("--results", type=Path, default=Path("work_dirs/export_families.jsonl"))
    parser.add_argument("--write", type=Path, help="page whose section is written from the results")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    MMLogger.get_current_instance().setLevel("CRITICAL")
    args.results.parent.mkdir(parents=True, exist_ok=True)
    rows = [json.loads(line) for line in args.results.read_text().splitlines()] if args.results.exists() else []
    done = {(row["scope"], row["family"]) for row in rows}
    for scope, families in FAMILIES.items():
        for family in families:
            if (scope, family) in done or (args.family and family not in args.family):
                continue
            rows.append(family_row(scope, family))
            print(json.dumps(rows[-1]), flush=True)
            with args.results.open("a") as file:
                file.write(json.dumps(rows[-1]) + "\n")
    if args.write:
        section = table(sorted(rows, key=lambda row: (row["scope"], row["family"])))
        args.write.write_text(replace_section(args.write.read_text(), section))
