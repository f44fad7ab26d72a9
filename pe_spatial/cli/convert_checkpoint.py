"""Convert an encoder's or a detector's checkpoint into another layout, without running the code that it may hold.

pe-spatial convert_checkpoint PE-Spatial-G14-448.pt pe_spatial_g14_16px.pth --to detectron2
pe-spatial convert_checkpoint hf://facebook/PE-Detection/mask_rcnn_PEspatial_G_coco36ep.pth g14.pth --to mmdet
pe-spatial convert_checkpoint hf://facebook/PE-Detection/deta_coco_1824pix.pth deta.pth --to mmdet
pe-spatial convert_checkpoint work_dirs/coco/iter_66375.pth for_detectron2.pth --to detectron2

The layout of IN is detected. OUT ends in .pt, .pth or .safetensors. Some layouts coincide:

- detector: pe_spatial is mmdet, because our detectors are MMDetection's; release is detectron2, because Meta published
  them that way (DETA: in a layout of its own). timm has no detectors, and detectron2 has no DETA: an error.
- encoder: mmdet is pe_spatial; a config loads it with model.backbone.init_cfg.checkpoint=OUT.
"""

import argparse
import re
from collections.abc import Iterable

from pe_spatial.convert.converter import TARGETS, Conversion, check_destination, convert, write_checkpoint
from pe_spatial.encoder.files import locate, read_checkpoint

# blocks, layers and stages, and the tensors of a layer, take one line of the table
NUMBER = re.compile(
    r"(?:(?<=blocks\.)|(?<=head\.)|(?<=predictor\.)|(?<=coder\.layers\.)|(?<=embed\.)|(?<=branches\.))\d+(?=\.)"
)
TENSOR = re.compile(r"(?<=[._])(weight|bias|cos|sin)$")


def grouped(rows: Iterable[tuple[str, str]]) -> list[tuple[int, str, str]]:
    """Bring rows that differ in the block, the stage or the tensor of a layer alone to (how many, name, text)."""
    groups: dict[tuple[str, ...], list[tuple[str, str]]] = {}
    for row in rows:
        number, tensor = NUMBER.search(row[0]), TENSOR.search(row[0])
        key = tuple(TENSOR.sub("{tensor}", NUMBER.sub("{number}", cell)) for cell in row)
        groups.setdefault(key, []).append((number[0] if number else "", tensor[0] if tensor else ""))
    out = []
    for key, members in groups.items():
        tensors = list(dict.fromkeys(tensor for _, tensor in members))
        number = spans({int(number) for number, _ in members if number})
        tensor = tensors[0] if len(tensors) == 1 else f"{{{','.join(tensors)}}}"
        name, text = (cell.replace("{number}", number).replace("{tensor}", tensor) for cell in key)
        out.append((len(members), name, text))
    return out


def spans(numbers: set[int]) -> str:
    """{0, 1, 2, 5} -> '{0-2,5}', {0} -> '0'."""
    starts, ends = (sorted(n for n in numbers if n + step not in numbers) for step in (-1, 1))
    text = ",".join(str(a) if a == b else f"{a}-{b}" for a, b in zip(starts, ends, strict=True))
    return text if len(numbers) == 1 else f"{{{text}}}"


def section(title: str, rows: Iterable[tuple[str, str]], between: str) -> list[str]:
    groups = grouped(rows)
    width = max((len(name) for _, name, _ in groups), default=0)
    lines = [f"  {count:>4}  {name:<{width}} {between} {text}" for count, name, text in groups]
    return [f"{title}: {sum(count for count, _, _ in groups) or 'none'}", *lines]


def report(done: Conversion) -> str:
    """Return the table of what was done, grouped over blocks."""
    same = sum(before == after for before, after in done.renamed.items())
    geometry = [] if done.geometry is None else [f"rotary tables: {done.geometry}"]
    return "\n".join(
        [
            *section("renamed", ((a, b) for a, b in done.renamed.items() if a != b), "->"),
            f"kept under their names: {same}",
            *section("dropped", done.dropped.items(), ":"),
            *section("added", done.added.items(), ":"),
            *section("resized", done.resized.items(), ":"),
            *geometry,
            *(f"note: {note}" for note in done.notes),
        ]
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("input", metavar="IN", help="a .pt, .pth or .safetensors file, or hf://owner/repo/file")
    parser.add_argument("output", metavar="OUT", help="the file to write")
    parser.add_argument("--to", required=True, choices=TARGETS, help="layout of OUT")
    parser.add_argument(
        "--all-classes", action="store_true", help="keep DETA's 91 classes, one for each category id, not COCO's 80"
    )


def run(args: argparse.Namespace) -> None:
    source = locate(args.input)
    check_destination(args.output, source)
    done = convert(read_checkpoint(source), args.to, all_classes=args.all_classes)
    size = write_checkpoint(args.output, done)
    print(report(done))
    print(
        f"{source} ({done.kind}, {done.layout_in}) -> {args.output} ({done.layout_out}): "
        f"{len(done.state)} tensors, {size:,} bytes"
    )
