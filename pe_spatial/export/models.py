"""From what a user names (a checkpoint, a config, a variant) to a module that can be exported."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pe_spatial.encoder.checkpoint import from_pretrained
from pe_spatial.encoder.variants import variant_key
from pe_spatial.encoder.vit import PerceptionEncoder
from pe_spatial.errors import ConfigError
from pe_spatial.export.encoder import encoder_graph
from pe_spatial.export.graph import Exportable


def build_encoder(
    source: str | Mapping[str, Any], *, weights: str | None = None, layers: Sequence[int] = (-1,),
    geometry: str = "release", inputs: str = "pixels", whole_windows: bool = False,
) -> Exportable:  # fmt: skip
    """Return an encoder to export.

    Args:
        source: a variant, the fields of an `EncoderConfig`, or a file of weights.
        weights: a file of weights for a variant; 'none' for random ones, None for the released ones.
        layers: blocks whose output is wanted.
        geometry, inputs, whole_windows: see `PerceptionEncoder` and `encoder_graph`.
    """
    options: dict[str, Any] = dict(out_indices=tuple(layers), geometry=geometry)
    if weights == "none":
        encoder = PerceptionEncoder(source, **options).eval()
    elif weights is not None:
        encoder = from_pretrained(weights, variant=source, **options)
    elif isinstance(source, str):
        encoder = from_pretrained(source, **options)
    else:
        raise ConfigError("no weights were released for an encoder of one's own; give --weights FILE, or none")
    return encoder_graph(encoder, inputs=inputs, whole_windows=whole_windows, source=str(weights or source))


def is_encoder(source: str | Mapping[str, Any]) -> bool:
    """Return whether `source` is an encoder alone: a variant, or weights without a config of a run."""
    if not isinstance(source, str):
        return True
    if not Path(source).exists() and "::" not in source and not source.endswith(".py"):
        try:
            variant_key(source)
        except ValueError:
            return "://" in source
        return True
    if source.endswith(".py") or "::" in source:
        return False
    from pe_spatial.encoder.files import locate, read_checkpoint

    meta = read_checkpoint(locate(source)).rest.get("meta")
    return not (isinstance(meta, Mapping) and isinstance(meta.get("cfg"), str))
