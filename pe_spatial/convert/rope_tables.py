"""The rotary tables that released detectors keep in their files, and the geometry that they depend on."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from pe_spatial.convert.layouts import ENCODERS, released_configs
from pe_spatial.encoder.files import CheckpointError, CheckpointFile, join_names
from pe_spatial.encoder.geometry import PRESETS, Geometry
from pe_spatial.encoder.variants import VITDET_RECIPES

_DETA_RANGE = 16  # tokens: the rotary range of the released DETA, see PRESETS


@dataclass(frozen=True, kw_only=True)
class RopeTables:
    """What the rotary tables of a released detector depend on; its weights do not tell it, so files store it."""

    geometry: Geometry  # of the encoder, with numbers for window_size, rope_grid and global_attn_indexes
    num_heads: int
    image_grid: int  # side of an image, in tokens
    dtype: str = "float32"  # torch's name of the tables' dtype

    def build(self, layout: str, width: int, depth: int) -> dict[str, Tensor]:
        """Return every rotary table by its name in `layout`, bit for bit as the reference.

        A table is (L * L, head dimension) for a window or an image of side L: angles of the column, then of the row,
        each twice. Cell i of an axis has the position 1 + i * rope_grid / L
        (perception_models@3e352cc:apps/detection/detectron2_pe/modeling/backbone/pev1_det.py, and
        apps/detection/DETA_pe/models/pev1.py).
        """
        geometry: Any = self.geometry  # in numbers
        half = width // self.num_heads // 2
        frequencies = 1.0 / (10000 ** (torch.arange(0, half, 2).float() / half))
        pairs = []
        for side in (geometry.window_size, self.image_grid):
            places = torch.arange(side) / side * geometry.rope_grid + 1
            axis = torch.outer(places, frequencies).repeat_interleave(2, dim=-1)  # (L, half)
            cells = torch.cat((axis.expand(side, -1, -1), axis[:, None].expand(-1, side, -1)), dim=-1).flatten(0, 1)
            pairs.append([table.to(getattr(torch, self.dtype)) for table in (cells.cos(), cells.sin())])
        owners = {"rope_win": pairs[0], "rope_glb": pairs[1]} | {
            f"transformer.resblocks.{i}.attn.rope": pairs[i in geometry.global_attn_indexes] for i in range(depth)
        }
        return {
            f"{ENCODERS[layout]}{owner}.freqs_{name}": table
            for owner, pair in owners.items()
            for name, table in zip(("cos", "sin"), pair, strict=True)
        }


def detector_geometry(*, pos_grid: int, window_size: int, rope_grid: int, blocks: Sequence[int]) -> Geometry:
    """Return the geometry of a released detector in numbers."""
    sizes: dict[str, Any] = dict(pos_grid=pos_grid, window_size=window_size, rope_grid=rope_grid)
    return replace(PRESETS["vitdet"], global_attn_indexes=tuple(blocks), **sizes)


def read_tables(
    file: CheckpointFile, layout: str, rope: Mapping[str, Tensor], sizes: Mapping[str, int]
) -> tuple[RopeTables, float]:
    """Return the geometry that gives the tables `rope` of a file, and their largest deviation from it.

    Raises CheckpointError for tables that belong to no geometry.
    """
    path, prefix = file.path, ENCODERS[layout]
    windows, images = (rope.get(f"{prefix}rope_{kind}.freqs_cos") for kind in ("win", "glb"))
    if windows is None or images is None or any(table.ndim != 2 or not table.numel() for table in (windows, images)):
        raise CheckpointError(f"{path} has rotary tables, but rope_win and rope_glb are not both matrices in it")
    pos_grid = math.isqrt(sizes["n"])
    blocks = [
        int(name.removeprefix(f"{prefix}transformer.resblocks.").partition(".")[0])
        for name, table in rope.items()
        if name.endswith("attn.rope.freqs_cos") and table.shape == images.shape
    ]
    tables = RopeTables(
        geometry=detector_geometry(
            pos_grid=pos_grid,
            window_size=math.isqrt(windows.shape[0]),
            rope_grid=_rope_range(windows, rope.get(f"{prefix}rope_win.freqs_sin"))
            or (_DETA_RANGE if layout == "deta" else pos_grid),
            blocks=blocks,
        ),
        num_heads=max(sizes["e"] // images.shape[1], 1),
        image_grid=math.isqrt(images.shape[0]),
        dtype=str(images.dtype).removeprefix("torch."),
    )
    expected, deviation = tables.build(layout, sizes["e"], sizes["d"]), 0.0
    shapes = [{(name, table.shape) for name, table in each.items()} for each in (rope, expected)]
    odd = join_names(sorted({name for name, _ in shapes[0] ^ shapes[1]}))
    if shapes[0] != shapes[1]:
        raise CheckpointError(f"{path} has rotary tables that do not fit together ({odd}) for {tables}")
    for name, table in rope.items():
        difference = 0.0 if table.is_meta else float((table.float() - expected[name].float()).abs().max())
        if not difference <= 1e-5:  # nor nan
            raise CheckpointError(
                f"{path} has rotary tables of another geometry: {name} differs by {difference:.1g} from that of "
                f"{tables} on a grid of {pos_grid} tokens"
            )
        deviation = max(deviation, difference)
    return tables, deviation


def _rope_range(cos: Tensor, sin: Tensor | None) -> int | None:
    """Return rope_grid, which the shapes do not tell, from the angle between two cells of a row."""
    side = math.isqrt(cos.shape[0])
    if cos.is_meta or sin is None or sin.shape != cos.shape or side < 2:
        return None
    first, second = torch.atan2(sin[:2, 0].double(), cos[:2, 0].double()).tolist()
    return round((second - first) % math.tau * side)


def stored_tables(file: CheckpointFile, sizes: Mapping[str, int]) -> RopeTables | None:
    """Return the geometry that a converted file carries: an entry of its meta, or JSON in safetensors' metadata."""
    meta = file.rest.get("meta")
    entry = (meta if isinstance(meta, Mapping) else {}).get("pe_spatial", file.rest.get("pe_spatial"))
    if entry is None:
        return None
    try:
        facts: dict[str, Any] = json.loads(entry) if isinstance(entry, str) else dict(entry)
        fields: Any = {k: tuple(v) if isinstance(v, list) else v for k, v in facts["geometry"].items()}
        tables = RopeTables(**{**facts, "geometry": Geometry(**fields)})
        if sizes["e"] % (4 * tables.num_heads):
            raise ValueError(f"{tables.num_heads} heads")
        tables.build("detectron2", sizes["e"], 0)
    except Exception as error:  # whatever an entry of another type or size leads to
        raise CheckpointError(
            f"{file.path} has an entry 'pe_spatial' that describes no rotary tables of this model ({entry}); remove it"
        ) from error
    return tables


def recipe_tables(kind: str, sizes: Mapping[str, int]) -> RopeTables | None:
    """Return the geometry of the released detectors: images of 1024 or 1824 pixels, windows of the learned grid."""
    deta = kind == "DETA"
    heads = {config.num_heads for config in released_configs(sizes, letters="emdts" if deta else "emndts")}
    if len(heads) != 1 or sizes["d"] not in VITDET_RECIPES or (deta and sizes["n"] != 24**2):
        return None
    side = math.isqrt(sizes["n"])
    rope_grid = _DETA_RANGE if deta else side
    blocks = VITDET_RECIPES[sizes["d"]].global_attn_indexes
    geometry = detector_geometry(pos_grid=side, window_size=side, rope_grid=rope_grid, blocks=blocks)
    return RopeTables(geometry=geometry, num_heads=heads.pop(), image_grid=(1824 if deta else 1024) // 16)
