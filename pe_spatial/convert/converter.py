"""Convert checkpoints of encoders and detectors between layouts: one table (layouts.py), read in either direction.

A file that the table does not cover tensor by tensor is refused, and no tensor is copied: files are mapped in memory
and written tensor by tensor.
"""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pe_spatial.atomic import atomic_write
from pe_spatial.convert.layouts import (
    ALIAS,
    COCO_CATEGORY_IDS,
    DETA_CLASSES,
    DETECTOR_MARKS,
    ENCODER_MARKS,
    ENCODERS,
    NO_PLACE,
    ROPE,
    ROWS,
    SYNONYMS,
    THEIRS,
    Row,
    released_configs,
)
from pe_spatial.convert.rope_tables import RopeTables, detector_geometry, read_tables, recipe_tables, stored_tables
from pe_spatial.encoder.checkpoint import OMITTED, encoder_prefix, rename
from pe_spatial.encoder.files import SUFFIXES, CheckpointError, CheckpointFile, join_names
from pe_spatial.encoder.lora import is_adapter
from pe_spatial.encoder.resize import resize_patch_kernel
from pe_spatial.encoder.variants import VITDET_RECIPES

TARGETS = ("pe_spatial", "mmdet", "detectron2", "timm", "release", "same")

_META = ("dataset_meta", "cfg", "pe_spatial", "lora")
"""What is kept of a checkpoint's 'meta': names of the classes, the config, and facts of this package."""


@dataclass(frozen=True)
class Conversion:
    """A checkpoint in another layout, and what was done to it."""

    path: Path  # of the original file
    kind: str  # 'encoder', 'detector' or 'DETA'
    layout_in: str  # layout of the original file
    layout_out: str  # layout of `state`
    state: dict[str, Tensor]  # name -> tensor
    renamed: dict[str, str]  # name in the file -> name in `state`, for all tensors that were kept
    dropped: dict[str, str]  # name in the file that is not in `state` -> reason
    resized: dict[str, str] = field(default_factory=dict)  # name in `state` -> 'shape -> shape'
    added: dict[str, str] = field(default_factory=dict)  # name in `state` that is not in the file -> reason
    notes: list[str] = field(default_factory=list)  # sentences that a user should read
    rope: RopeTables | None = None  # a released detector's, where they are known
    meta: dict[str, Any] = field(default_factory=dict)  # names of the classes and config, for MMDetection
    num_classes: int | None = None  # of a detector in the original file


def convert(file: CheckpointFile, to: str, *, all_classes: bool = False) -> Conversion:
    """Bring an encoder or a detector into the layout `to`, one of `TARGETS`.

    The classes of Meta's DETA are COCO's category ids, 0 to 90. MMDetection's layout keeps the 80 ids in use, in their
    order, or all 91 with `all_classes`, which can be converted back. Other numbers of classes stay as they are. 'same'
    keeps the names of any checkpoint, and omits what is not weights.

    Raises CheckpointError for a file of no known layout, for tensors that have no counterpart or another shape than the
    rest of the file asks for, and where the layout `to` has no names for this model.
    """
    meta = _kept_meta(file.rest)
    if to == "same":
        return _slimmed(file, meta)
    if any(map(is_adapter, file.state)):
        raise CheckpointError(
            f"{file.path} holds LoRA adapters, which have no other layout; merge them first: pe-spatial merge_lora "
            f"{file.path} FILE"
        )
    meta.pop("pe_spatial", None)  # it is read from the file or its tables, and written anew
    weights = _with_released_names(file.state)
    layout_in = _find_layout(weights)
    if layout_in is None:
        raise CheckpointError(
            f"{file.path} holds no encoder or detector that is known here, but {join_names(file.state)}; known are "
            "encoders of perception_models, timm and pe_spatial, and Meta's and our (Cascade) Mask R-CNN and DETA"
        )
    prefix, kind, layout = layout_in
    target = _target(file.path, kind, to)
    state = {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
    why = "text tower" if "visual." in prefix else f"not the {kind}"
    dropped = {name: why for name in weights if not name.startswith(prefix)} | _omitted_entries(file.rest)
    if kind == "encoder":
        dropped |= {prefix + name: why for name, why in _remove_unused(file.path, state).items()}
    rope = {name: state.pop(name) for name in list(state) if layout in ENCODERS and ROPE.fullmatch(name)}
    aliases = _remove_aliases(file.path, state) if layout == "deta" else {}

    table = _table(file.path, kind, layout, state, target)
    sizes = _sizes(file.path, table, layout, state)
    renamed, out = {}, {}
    for name, value in state.items():
        ours = renamed[prefix + name] = _name(table[name], target)
        axes = len(_shape(table[name], target).split())
        out[ours] = value.reshape(((1,) * axes + tuple(value.shape))[-axes:])
    if kind == "encoder":
        resized = _fit_kernel(file.path, out, target, sizes)
        return Conversion(file.path, kind, layout, target, out, renamed, dropped, resized, meta=meta)

    tables, deviation = read_tables(file, layout, rope, sizes) if rope else (stored_tables(file, sizes), 0.0)
    done = Conversion(
        file.path, kind, layout, target, out, renamed, dropped, rope=tables, meta=meta, num_classes=sizes["C"]
    )
    if layout == target:
        out |= rope | aliases
        renamed |= {prefix + name: name for name in rope | aliases}
        return done
    if target == "mmdet":
        why = "rotary constants, computed here" + (f" to within {deviation:.0e}" if deviation else "")
        dropped |= {prefix + name: why for name in rope}
        dropped |= {prefix + name: f"second name of {_first_name(name)}" for name in aliases}
        if kind == "DETA":
            _fit_deta(done, sizes, all_classes)
        elif tables:
            _note_geometry(done, "vitdet", _is_vitdet(tables, sizes))
        return done
    if kind == "DETA":
        _add_aliases(done, sizes)
    return _add_tables(done, sizes)


def _slimmed(file: CheckpointFile, meta: dict[str, Any]) -> Conversion:
    layout = (_find_detector(file.state) or ("", "", "same"))[2]
    names = {name: name for name in file.state}
    dropped = _omitted_entries(file.rest)
    return Conversion(file.path, "checkpoint", layout, layout, file.state, names, dropped, meta=meta)


def _is_vitdet(tables: RopeTables, sizes: Mapping[str, int]) -> bool:
    side = math.isqrt(sizes["n"])
    blocks = VITDET_RECIPES.get(sizes["d"], tables.geometry).global_attn_indexes or ()
    return tables.geometry == detector_geometry(pos_grid=side, window_size=side, rope_grid=side, blocks=blocks)


def to_mmdet(file: CheckpointFile) -> dict[str, Tensor]:
    """Return the weights of released detectors under MMDetection's names, and those of any other file as they are."""
    layout = _find_detector(_with_released_names(file.state))
    return convert(file, "mmdet").state if layout and layout[2] in ENCODERS else file.state


def check_destination(path: str | Path, source: str | Path) -> None:
    """Raise CheckpointError unless a checkpoint can be written to `path`, which must not be `source`."""
    path = Path(path)
    if path.suffix not in SUFFIXES:
        raise CheckpointError(f"{path} does not end in {', '.join(SUFFIXES)}; rename the output")
    if not path.parent.is_dir():
        raise CheckpointError(f"there is no folder {path.parent} for {path.name}; create it first")
    if path.is_dir() or path.resolve() == Path(source).resolve():
        raise CheckpointError(f"{path} is a folder, or the checkpoint that is read; write to another file")


def write_checkpoint(path: str | Path, conversion: Conversion) -> int:
    """Write a .pt, .pth or .safetensors file as its layout wraps it; return its size in bytes.

    The file appears under its name when it is complete, or not at all. Raises CheckpointError if it cannot be written.
    """
    path = Path(path)
    check_destination(path, conversion.path)
    facts = {} if conversion.rope is None else {"pe_spatial": asdict(conversion.rope)}
    meta = conversion.meta | (facts if conversion.layout_out == "mmdet" else {})
    state = {name: _compact(value) for name, value in conversion.state.items()}
    wrapped: dict[str, Any] = {"model": state} if conversion.layout_out in ENCODERS else {"state_dict": state}
    try:
        with atomic_write(path) as unfinished:
            if path.suffix == ".safetensors":
                from safetensors.torch import save_file

                described = {"format": "pt"} | {name: json.dumps(value) for name, value in facts.items()}
                described |= {"meta": json.dumps(conversion.meta)} if conversion.meta else {}
                save_file(_unshared(state), unfinished, described)
            elif conversion.layout_out == "release":
                torch.save(state, unfinished)
            else:
                torch.save(wrapped | ({"meta": meta} if meta or conversion.layout_out == "mmdet" else {}), unfinished)
    except Exception as error:
        # OSError from the file system, RuntimeError from torch, SafetensorError
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise CheckpointError(f"{path} cannot be written ({reason}); nothing was left there") from error
    return path.stat().st_size


# --- names


def _with_released_names(state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Rename a detector that was trained with integrations.detectron2, where the backbone has our names."""
    if not all(any(name.startswith(part) for name in state) for part in ("proposal_generator.", "backbone.encoder.")):
        return state
    theirs = {row.ours: row.theirs for row in ROWS["detector"] if row.theirs}
    return {rename(name, theirs): value for name, value in state.items()}


def _find_layout(state: Mapping[str, Tensor]) -> tuple[str, str, str] | None:
    """Return (prefix of the names, kind, layout), or None."""
    detector = _find_detector(state)
    if detector is not None:
        return detector
    prefix = encoder_prefix(state)
    for mark, layout in ENCODER_MARKS.items():
        if any(name.startswith(prefix + mark) for name in state):
            positions = state.get(f"{prefix}positional_embedding")  # (1, n, e) in what detectors start from
            initial = layout == "release" and positions is not None and positions.ndim == 3
            return prefix, "encoder", "detectron2" if initial else layout
    return None


def _find_detector(state: Mapping[str, Tensor]) -> tuple[str, str, str] | None:
    for mark, (kind, layout) in DETECTOR_MARKS.items():
        for prefix in ("", "model."):  # which Lightning adds
            if any(name.startswith(prefix + mark) for name in state):
                return prefix, kind, layout
    return None


def _target(path: Path, kind: str, to: str) -> str:
    if to not in TARGETS:
        raise CheckpointError(f"unknown layout {to!r}; known are {', '.join(TARGETS)}")
    if (kind, to) == ("detector", "timm"):
        raise CheckpointError(f"{path} is a detector and timm has none; convert it to mmdet or detectron2")
    if kind == "DETA" and to in ("timm", "detectron2"):
        raise CheckpointError(f"{path} is a DETA and {to} has none; convert it to mmdet or release")
    return SYNONYMS.get((kind, to), to)


def _remove_unused(path: Path, state: dict[str, Tensor]) -> dict[str, str]:
    """Remove from `state` what an encoder does not use; return the names with the reasons."""
    unused = {name: why for name in state for pattern, why in OMITTED.items() if re.fullmatch(pattern, name)}
    parts = [name for name in unused if "rope" not in name]
    if parts and not any(name.startswith("attn_pool.") for name in parts):
        raise CheckpointError(
            f"{path} has {join_names(parts)} but no attention pooling, like a CLIP and unlike any Perception Encoder; "
            "if it is one nevertheless, save its encoder alone"
        )
    for name in unused:
        del state[name]
    return unused


def _kept_meta(rest: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a checkpoint tells MMDetection besides its weights: plain data of three known entries."""
    meta = rest.get("meta")
    kept = {name: _plain(meta[name]) for name in _META if name in meta} if isinstance(meta, Mapping) else {}
    return {name: value for name, value in kept.items() if value is not None}


def _plain(value: Any) -> Any:
    """Return the texts, numbers, sequences and mappings of `value`; None for anything else."""
    if isinstance(value, Mapping):
        return {str(name): _plain(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_plain(entry) for entry in value)
    return value if isinstance(value, str | int | float | bool) else None


def _omitted_entries(rest: Mapping[str, Any]) -> dict[str, str]:
    meta = rest.get("meta")
    kept = {"format", "pe_spatial"} | ({"meta"} if isinstance(meta, Mapping) and meta.keys() <= set(_META) else set())
    why = {"meta": f"state of the run; kept: {join_names(_kept_meta(rest))}"}
    return {name: why.get(name, "training state or description, not weights") for name in rest if name not in kept}


def _name(row: Row, layout: str) -> str:
    return row.theirs if layout in THEIRS else row.ours


def _shape(row: Row, layout: str) -> str:
    """Return the shape without leading axes of one where `layout` has none."""
    shape = row.shape.removesuffix(" ?")
    bare = layout == "release" or (layout == "detectron2" and shape.startswith("1 1 "))
    return shape.replace("1 ", "") if bare else shape


def _table(path: Path, kind: str, layout: str, state: Mapping[str, Tensor], target: str) -> dict[str, Row]:
    """Return name -> row for exactly the tensors of `state`, or raise CheckpointError that lists both sides."""
    numbers: dict[str, list[str]] = {}
    for mark, part in {"{}": "(?:res)?blocks", "{i}": r"encoder\.layers", "{j}": r"decoder\.layers"}.items():
        present = {match[1] for name in state if (match := re.search(rf"(?:^|\.){part}\.(\d+)\.", name))}
        numbers[mark] = [str(i) for i in range(len(present))]
    numbers["{h}"] = [str(i) for i in range(len(numbers["{j}"]) + 1)]
    for mark, pattern in {"{s}": r"roi_heads?\.b?box_(head|predictor)\.\d", "{m}": r"roi_head\.mask_head\.\d"}.items():
        numbers[mark] = [".0", ".1", ".2"] if any(re.match(pattern, name) for name in state) else [""]
    table: dict[str, Row] = {}
    for theirs, ours, shape in ROWS[kind]:
        mark = next((mark for mark in numbers if mark in ours), "{}")
        rows = [
            Row("" if mark == "{m}" and number else theirs.replace(mark, number), ours.replace(mark, number), shape)
            for number in (numbers[mark] if mark in ours else [""])
        ]
        if not shape.endswith("?") or any(_name(row, layout) in state for row in rows):
            table |= {_name(row, layout): row for row in rows}
    table.pop("", None)
    extra, missing = [name for name in state if name not in table], [name for name in table if name not in state]
    if extra or missing:
        allowed = (
            ""
            if kind == "encoder"
            else (
                "; detectors that convert are Mask R-CNN and Cascade Mask R-CNN with Detectron2's heads, as in "
                "configs/_base_/models/*_rcnn_pe.py, and DETA; heads of MMDetection, as in the demo config, do not"
            )
        )
        raise CheckpointError(
            f"{path} does not map one to one from {layout} to {target}; only in the file: {join_names(extra)}; "
            f"missing in it: {join_names(missing)}; it is of another model, or only a part of this {kind}{allowed}; "
            "--to same keeps the names of any checkpoint"
        )
    nameless = [row.ours for row in table.values() if not _name(row, target)]
    if nameless:
        why = next(why for part, why in NO_PLACE.items() if part in nameless[0])
        raise CheckpointError(f"{path} has no way to {target}: no place for {join_names(nameless)}, because {why}")
    return table


# --- shapes


def _sizes(path: Path, table: Mapping[str, Row], layout: str, state: Mapping[str, Tensor]) -> dict[str, int]:
    """Return letter -> size, or raise CheckpointError for the first tensor that disagrees with those before it."""
    sizes: dict[str, int] = {}
    source: dict[str, str] = {}
    for name, row in table.items():
        words, shape = _shape(row, layout).split(), tuple(state[name].shape)
        expected = [_expect(word, size, sizes) for word, size in zip(words, shape, strict=False)]
        if len(words) != len(shape) or tuple(expected) != shape:
            letters = sorted(set(re.findall("[a-zA-Z]", row.shape)) & source.keys())
            given = ", ".join(f"{letter} is {sizes[letter]} as in {source[letter]}" for letter in letters)
            wanted = f"({', '.join(words)}){f', where {given}' if given else ''}"
            raise CheckpointError(f"{path}: {name} is {shape} but should be {wanted}; give an undamaged file")
        source |= {letter: name for letter in sizes.keys() - source.keys()}
    ours = [row.ours for row in table.values()]
    sizes["d"] = sum(name.endswith("norm1.bias") for name in ours)
    sizes["t"] = sum(name.endswith("cls_token") for name in ours)
    sizes["s"] = sum(name.endswith("gamma_1") for name in ours)
    if math.isqrt(sizes["n"] - sizes["t"]) ** 2 != sizes["n"] - sizes["t"]:
        raise CheckpointError(f"{path}: {source['n']} has {sizes['n']} positions, not a square grid of patches")
    if "b" in sizes and sizes["b"] not in (4, 4 * sizes["C"]):
        raise CheckpointError(f"{path}: {source['b']} has {sizes['b']} outputs but should have 4 or {4 * sizes['C']}")
    return sizes


def _expect(word: str, size: int, sizes: dict[str, int]) -> int | None:
    """Return the size that `word` ('7', 'e', '3e', 'e/2' or 'C+1') stands for; the first `size` defines a letter."""
    found = re.fullmatch(r"(\d*)([a-zA-Z]?)(?:/(\d+))?(?:\+(\d+))?", word)
    assert found
    times, over, plus = (int(found[group] or default) for group, default in ((1, 1), (3, 1), (4, 0)))
    if not found[2]:
        return times
    if found[2] not in sizes:
        value, remainder = divmod((size - plus) * over, times)
        if remainder or value < 1:
            return None
        sizes[found[2]] = value
    return sizes[found[2]] * times // over + plus


def _fit_kernel(path: Path, state: dict[str, Tensor], target: str, sizes: Mapping[str, int]) -> dict[str, str]:
    """Resize the patch kernel for Detectron2, whose detectors have patches of 16 pixels; return what was resized."""
    size, released = sizes["p"], {config.patch_size for config in released_configs(sizes)}
    if target in ("release", "timm") and released and size not in released:
        raise CheckpointError(
            f"{path} has no way to {target}: its patch kernel was resized to {size} pixels from {released.pop()}, "
            "which cannot be undone; convert the released file instead"
        )
    if target != "detectron2" or size == 16:
        return {}
    before, state["conv1.weight"] = state["conv1.weight"], resize_patch_kernel(state["conv1.weight"], 16)
    return {"conv1.weight": f"{tuple(before.shape)} -> {tuple(state['conv1.weight'].shape)}"}


# --- DETA


def _remove_aliases(path: Path, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Remove the second names of the heads from `state`; return them with their tensors."""
    aliases = {}
    for name in [name for name in state if ALIAS.fullmatch(name) and _first_name(name) in state]:
        first = _first_name(name)
        if not state[name].is_meta and not torch.equal(state[name], state[first]):
            raise CheckpointError(f"{path}: {name} and {first} should be one tensor but differ; give an undamaged file")
        aliases[name] = state.pop(name)
    return aliases


def _first_name(alias: str) -> str:
    return ALIAS.sub(r"\1", alias)


def _fit_deta(done: Conversion, sizes: Mapping[str, int], all_classes: bool) -> None:
    """Keep the rows of COCO's categories, and note a geometry of the encoder that is not 'deta'.

    The last head proposes boxes by its row 0, whatever the class, so its first rows are kept.
    """
    heads = [name for name in done.state if name.startswith("bbox_head.cls_branches.")]
    if sizes["C"] == DETA_CLASSES and not all_classes:
        last = max(int(name.split(".")[2]) for name in heads)
        for name in heads:
            value = done.state[name]
            rows = torch.tensor(COCO_CATEGORY_IDS, device=value.device)
            kept = done.state[name] = value[: len(rows)] if int(name.split(".")[2]) == last else value[rows]
            done.resized[name] = f"{tuple(value.shape)} -> {tuple(kept.shape)}"
        done.notes.append("of 91 classes the 80 of COCO are kept; the last head keeps the objectness, its first")
    ours, recipe = done.rope, recipe_tables("DETA", sizes)
    same = ours and recipe and (ours.geometry, ours.num_heads) == (recipe.geometry, recipe.num_heads)
    _note_geometry(done, "deta", not ours or bool(same))


def _note_geometry(done: Conversion, preset: str, same: bool) -> None:
    """Note the geometry that a config must set, unless it is the `same` as that of its preset."""
    if done.rope and not same:
        geometry = done.rope.geometry
        done.notes.append(
            f"the geometry of its encoder is not {preset!r}: window_size={geometry.window_size}, "
            f"rope_grid={geometry.rope_grid}, pos_grid={geometry.pos_grid}, "
            f"global_attn_indexes={geometry.global_attn_indexes}"
        )


def _add_aliases(done: Conversion, sizes: Mapping[str, int]) -> None:
    if sizes["C"] == len(COCO_CATEGORY_IDS):
        raise CheckpointError(
            f"{done.path} has no way to release: there a class is a category id of COCO, so that 91 are needed, and of "
            "these it has 80; convert the released file with all classes instead"
        )
    first = {f"transformer.decoder.{name}": name for name in done.state if name.startswith(("class_", "bbox_"))}
    done.state.update({name: done.state[own] for name, own in first.items()})
    done.added.update({name: f"second name of {own}" for name, own in first.items()})


# --- rotary tables of the released detectors


def _add_tables(done: Conversion, sizes: Mapping[str, int]) -> Conversion:
    project = {"detectron2": "Detectron2", "deta": "Meta's DETA"}[done.layout_out]
    rope = done.rope or recipe_tables(done.kind, sizes)
    if rope is None:
        done.notes.append(
            "the rotary tables are omitted: the file does not tell their geometry, and no released detector has these "
            f"shapes; {project} computes them itself, and warns"
        )
        return done
    tables = rope.build(done.layout_out, sizes["e"], sizes["d"])
    done.state.update(tables)
    done.added.update(dict.fromkeys(tables, f"rotary constants, which {project} keeps in the file"))
    return replace(done, rope=rope)


# --- writing


def _compact(value: Tensor) -> Tensor:
    """Return `value`, or a copy if its storage is larger, because the file would contain the complete storage."""
    value = value.detach().contiguous()
    return value if value.untyped_storage().nbytes() == value.nbytes else value.clone()


def _unshared(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors with storages of their own, as safetensors asks; only those that share one are copied."""
    seen: set[int] = set()
    out: dict[str, Tensor] = {}
    for name, value in state.items():
        out[name] = value.clone() if value.data_ptr() in seen else value
        seen.add(value.data_ptr())
    return out
