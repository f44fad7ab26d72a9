"""Texts to token ids, with the vocabulary that open_clip ships.

Equal to facebookresearch/perception_models@3e352cc:core/vision_encoder/tokenizer.py: ftfy, HTML entities, spaces, lower
case, CLIP's byte pairs; 0 fills the context, and the end token stays in texts that are cut.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from pe_spatial.errors import listed

_log = logging.getLogger(__name__)


@cache
def _tokenizer() -> Any:
    try:
        from open_clip.tokenizer import SimpleTokenizer
    except ImportError as error:
        raise ImportError(
            f"texts need {error.name or 'open_clip'}: pip install 'pe_spatial[language]'", name=error.name
        ) from error
    return SimpleTokenizer()


def tokenize(texts: str | Sequence[str], context_length: int) -> Tensor:
    """Return the ids (B, context_length), int64, of one text or several; a warning names texts that are cut."""
    texts = [texts] if isinstance(texts, str) else list(texts)
    if not texts:
        return torch.zeros(0, context_length, dtype=torch.int64)
    tokenizer = _tokenizer()
    ids: Tensor = tokenizer(texts, context_length=context_length)
    full = (ids[:, -1] != 0).nonzero()[:, 0].tolist()
    cut = [texts[i] for i in full if len(tokenizer.encode(texts[i])) > context_length - 2]
    if cut:
        names = listed([f"{text[:40]!r}..." for text in cut], 3)
        _log.warning("cut to the %d tokens of the context: %s", context_length, names)
    return ids
