"""The released zero-shot evaluation: class embeddings from templates, accuracies, recalls of retrieval.

Source: facebookresearch/perception_models@3e352cc:apps/pe/clip_benchmark (metrics/zeroshot_classification.py,
metrics/zeroshot_retrieval.py, datasets/video_classification_dataset.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pe_spatial.errors import ConfigError, listed

from .model import PECore

DEFAULT_TEMPLATE = "a photo of a {}."


class Accuracy(NamedTuple):
    """Shares from 0 to 1; `acc5` is None below five classes, and a class without images has the recall None."""

    acc1: float
    acc5: float | None
    mean_per_class: float
    per_class: tuple[float | None, ...]


@torch.inference_mode()
def embed_texts(model: PECore, texts: Sequence[str], *, batch_size: int = 256) -> Tensor:
    """Return the normalized features (N, D), float32, of texts."""
    ids = model.tokenizer(texts)
    parts = []
    for batch in ids.split(batch_size):
        longest = int(batch.argmax(-1).max()) + 1  # nothing after the end tokens counts
        parts.append(model.encode_text(batch[:, :longest], normalize=True).float())
    return torch.cat(parts) if parts else model.logit_scale.new_zeros(0, model.config.output_dim)


def class_embeddings(model: PECore, names: Sequence[str], templates: Sequence[str] = (DEFAULT_TEMPLATE,)) -> Tensor:
    """Return the classifier (C, D) of class names: the mean over templates of normalized features, normalized again.

    Raises ConfigError for a template without '{}'.
    """
    wrong = [template for template in templates if "{}" not in template]
    if wrong or not templates:
        raise ConfigError(f"a template needs {{}} where the class goes; got {wrong[0]!r}" if wrong else "no templates")
    texts = [template.replace("{}", name) for name in names for template in templates]
    features = embed_texts(model, texts).unflatten(0, (len(names), len(templates)))
    return F.normalize(features.mean(dim=1), dim=-1)


def check_names(names: Sequence[str], source: str = "--classes") -> tuple[str, ...]:
    """Return class names without blanks around them; ConfigError for none, an empty one, or two that are equal.

    Case does not count: texts become lower case.
    """
    cleaned = tuple(name.strip() for name in names)
    if not cleaned or not all(cleaned):
        raise ConfigError(f"{source} names {'an empty class' if cleaned else 'no class'}; give names such as cat,dog")
    lower = [name.lower() for name in cleaned]
    twice = [name for i, name in enumerate(cleaned) if name.lower() in lower[:i]]
    if twice:
        raise ConfigError(f"{source} names {listed(twice)} twice, which no text can tell apart; name each class once")
    return cleaned


def accuracy(scores: Tensor, targets: Tensor) -> Accuracy:
    """Return the accuracies of scores (N, C) against the classes (N,); the mean is over the classes with images."""
    classes = scores.shape[1]
    top = scores.topk(min(5, classes), dim=1).indices
    hits = top == targets[:, None]
    counts = torch.bincount(targets, minlength=classes)
    right = torch.bincount(targets[hits[:, 0]], minlength=classes)
    recalls = [None if not n else int(k) / int(n) for k, n in zip(right, counts, strict=True)]
    known = [recall for recall in recalls if recall is not None]
    return Accuracy(
        acc1=hits[:, 0].float().mean().item(),
        acc5=hits.any(1).float().mean().item() if classes >= 5 else None,
        mean_per_class=sum(known) / len(known),
        per_class=tuple(recalls),
    )


def recalls(
    scores: Tensor, owners: Sequence[int], texts: Sequence[str], ranks: Sequence[int] = (1, 5, 10)
) -> dict[str, float]:
    """Return the recalls of retrieval in both directions, from 0 to 1.

    A query counts if at least one right answer is among the first k. Equal texts share their images.

    Args:
        scores: similarity of texts and images (T, M).
        owners: the image of each text.
        texts: the texts themselves.
        ranks: the values of k.
    """
    right = torch.zeros(scores.shape, dtype=torch.bool)
    groups: dict[str, list[int]] = {}
    for i, (text, owner) in enumerate(zip(texts, owners, strict=True)):
        groups.setdefault(text, []).append(i)
        right[i, owner] = True
    for rows in groups.values():
        if len(rows) > 1:
            right[rows] = right[rows].any(0)
    found = {}
    for name, similarity, answers in (("text to image", scores, right), ("image to text", scores.T, right.T)):
        order = similarity.topk(min(max(ranks), similarity.shape[1]), dim=1).indices
        hits = answers.gather(1, order.cpu())
        for k in ranks:
            found[f"{name} R@{k}"] = hits[:, :k].any(1).float().mean().item()
    return found


def frame_numbers(count: int, wanted: int = 8) -> list[int]:
    """Return the frames of a video of `count` that represent it; a shorter video repeats some."""
    if wanted == 1:
        return [count // 2]
    return [int(i * (count - 1) / (wanted - 1)) for i in range(wanted)]
