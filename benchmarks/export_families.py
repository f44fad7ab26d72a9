"""Which families of the swap can be exported: one config of each, with a small PE, as a section of docs/export.md.

python benchmarks/export_families.py [--family atss detr] [--write docs/export.md]
"""

import argparse
import json
import re
import tempfile
import traceback
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.registry import DefaultScope

from pe_spatial.errors import ConfigError
from pe_spatial.export.graph import Exportable, export
from pe_spatial.export.pixels import Pixels
from pe_spatial.export.suppression import translations
from pe_spatial.export.two_stage import TwoStageGraph
from pe_spatial.integrations.swap import check
from pe_spatial.integrations.swap.policy import plan_swap
from pe_spatial.runtime.manifest import read_manifest
from pe_spatial.runtime.sessions import open_session

FAMILIES = {
    "mmdet": ["atss", "cornernet", "detectors", "detr", "faster_rcnn", "mask2former", "mask_rcnn", "soft_teacher",
              "ssd", "yolo", "yolof", "yolox"],
    "mmseg": ["fastscnn", "pidnet", "pspnet", "segformer", "segmenter", "unet", "upernet"],
}  # fmt: skip
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
                model = check._build(swap.cfg).eval()
                return row | try_export(scope, swap.cfg, model)
        except ConfigError as error:
            return row | dict(result="no", reason=explained(error))
        except Exception as error:  # reported as a result
            return row | dict(result="no", reason=f"{type(error).__name__}: {str(error).splitlines()[0][:140]}")
    return dict(scope=scope, family=family, config="", type="", result="no", reason="no config can be read")


def try_export(scope: str, cfg: Any, model: Any) -> dict[str, str]:
    """Export the complete detector, or else the network, and compare."""
    if hasattr(model, "roi_head"):
        processor = model.data_preprocessor
        pixels = Pixels(processor.mean.flatten().tolist(), processor.std.flatten().tolist(),
                        multiple=processor.pad_size_divisor)  # fmt: skip
        try:
            graph = TwoStageGraph(model, pixels)
        except ConfigError as error:
            reason = str(error)
        else:
            example = torch.randint(0, 256, (2, 128, 160, 3), dtype=torch.uint8)
            dynamic = {"pixels": {0: "batch", 1: "height", 2: "width"}}
            largest = exported_difference(Exportable(
                module=graph, task="detection", inputs={"pixels": example}, dynamic=dynamic, outputs=graph.outputs(),
                stages=graph.stages(), translations=translations(),
            ))  # fmt: skip
            return dict(result="complete", reason=f"pixels in, boxes out; differs by {largest:.1g} at most")
    else:
        reason = "selection of results in Python"
    make = check._segmentation_inputs if scope == "mmseg" else lambda c: check._detection_inputs(c, model)
    data = model.data_preprocessor(make(cfg), False)
    network = Network(model, data.get("data_samples"))
    with torch.no_grad():
        names = [f"output_{i}" for i in range(len(network(data["inputs"])))]
    largest = exported_difference(Exportable(
        module=network, task="network", inputs={"images": data["inputs"]}, dynamic={}, outputs=names,
        translations=translations(),
    ))  # fmt: skip
    return dict(result="network", reason=f"one size; {reason}; differs by {largest:.1g} at most")


def explained(error: ConfigError) -> str:
    """Return an error with the line of the model that cannot be traced."""
    lines = traceback.extract_tb(error.__cause__.__traceback__) if error.__cause__ else []
    own = [line for line in lines if re.search(r"site-packages/(mm|timm)", line.filename)]
    where = f"; in {own[-1].filename.split('site-packages/')[1]}: `{own[-1].line}`" if own else ""
    return str(error).replace("<", "").replace(">", "") + where


def exported_difference(exportable: Exportable) -> float:
    """Return the largest difference of ONNX Runtime from PyTorch, relative to the largest value above 1."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "out"
        export(exportable, folder)
        values = open_session(folder, read_manifest(folder), stages=True).run(
            {key: value.numpy() for key, value in exportable.inputs.items()}
        )
    with torch.no_grad():
        expected = exportable.module(*exportable.inputs.values())
    names = [*exportable.outputs, *exportable.stages]
    skip = ("boxes", "scores", "labels", "valid", "masks")
    gaps = [
        np.abs(values[key].astype(np.float64) - theirs.numpy()).max(initial=0) / max(1.0, float(theirs.abs().max()))
        for key, theirs in zip(names, expected, strict=True)
        if key not in skip and theirs.numel()
    ]
    return float(max(gaps, default=0.0))


def table(rows: list[dict[str, str]]) -> str:
    """Return the section of docs/export.md."""
    lines = [
        HEADING, "",
        "Written by `python benchmarks/export_families.py --write docs/export.md`: one config of each family of the",
        "swap's fast sample, with a small PE and random weights, to ONNX; ONNX Runtime against PyTorch, relative to",
        "the largest value above 1. `complete`: pixels in, boxes out, any size from one file. `network`: backbone,",
        "neck and heads at one size; the selection of results stays in Python.", "",
        "| family | config | exported | remarks |", "|---|---|---|---|",
    ]  # fmt: skip
    keys = ("family", "config", "result", "reason")
    lines += ["| " + " | ".join(row[key].replace("|", "/") for key in keys) + " |" for row in rows]
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
