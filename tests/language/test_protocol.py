"""The functions of the zero-shot protocol equal straightforward ones."""

import math

import pytest
import torch
import torch.nn.functional as F
from helpers.language import WORD_CORE, tiny_core
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from pe_spatial.errors import ConfigError
from pe_spatial.language.protocol import (
    accuracy,
    check_names,
    class_embeddings,
    embed_texts,
    frame_numbers,
    recalls,
)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 20), st.integers(2, 8), st.integers(0, 2**31))
def test_accuracy_counts(number, classes, seed):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(number, classes, generator=generator)
    targets = torch.randint(classes, (number,), generator=generator)
    found = accuracy(scores, targets)
    ranked = [sorted(range(classes), key=lambda k: -row[k]) for row in scores.tolist()]
    assert math.isclose(found.acc1, sum(r[0] == t for r, t in zip(ranked, targets, strict=True)) / number, abs_tol=1e-6)
    if classes < 5:
        assert found.acc5 is None
    else:
        expected = sum(int(t) in r[:5] for r, t in zip(ranked, targets, strict=True)) / number
        assert math.isclose(found.acc5, expected, abs_tol=1e-6)
    by_class = [[r[0] == k for r, t in zip(ranked, targets, strict=True) if t == k] for k in range(classes)]
    expected = [sum(hits) / len(hits) if hits else None for hits in by_class]
    assert list(found.per_class) == expected
    known = [value for value in expected if value is not None]
    assert math.isclose(found.mean_per_class, sum(known) / len(known))


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 15), st.integers(1, 12), st.integers(0, 2**31))
def test_recalls_count(texts, images, seed):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(texts, images, generator=generator)
    owners = torch.randint(images, (texts,), generator=generator).tolist()
    words = [f"text {i}" for i in torch.randint(max(1, texts - 2), (texts,), generator=generator).tolist()]
    found = recalls(scores, owners, words, (1, 5, 10))
    right = {(i, owners[j]) for i in range(texts) for j in range(texts) if words[i] == words[j]}
    for k in (1, 5, 10):
        best = [sorted(range(images), key=lambda m: -scores[i, m])[:k] for i in range(texts)]
        hits = [any((i, m) in right for m in best[i]) for i in range(texts)]
        assert math.isclose(found[f"text to image R@{k}"], sum(hits) / texts, abs_tol=1e-6)
        best = [sorted(range(texts), key=lambda i: -scores[i, m])[:k] for m in range(images)]
        hits = [any((i, m) in right for i in best[m]) for m in range(images)]
        assert math.isclose(found[f"image to text R@{k}"], sum(hits) / images, abs_tol=1e-6)


@given(st.integers(1, 400))
def test_frames_are_the_released_ones(count):
    assert frame_numbers(count) == [int(i * (count - 1) / 7) for i in range(8)]
    assert frame_numbers(count, 1) == [count // 2]


def test_frames_of_a_short_video_repeat():
    assert frame_numbers(3) == [0, 0, 0, 0, 1, 1, 1, 2]
    assert frame_numbers(1) == [0] * 8


def test_templates_are_averaged():
    pytest.importorskip("open_clip")
    model = tiny_core(WORD_CORE)
    names, templates = ["cat", "red fox"], ["a photo of a {}.", "{}", "the {} in a {}"]
    got = class_embeddings(model, names, templates)
    with torch.inference_mode():
        for row, name in zip(got, names, strict=True):
            texts = [template.replace("{}", name) for template in templates]
            mean = F.normalize(model.encode_text(model.tokenizer(texts)), dim=-1).mean(0)
            assert_close(row, mean / mean.norm(), rtol=1e-5, atol=1e-5)
        assert_close(embed_texts(model, names, batch_size=1), embed_texts(model, names), rtol=1e-5, atol=1e-5)
    with pytest.raises(ConfigError, match=r"a template needs \{\} where the class goes; got 'a photo'"):
        class_embeddings(model, names, ["a photo"])


@pytest.mark.parametrize(
    ("names", "message"),
    [([], "names no class"), (["a", " "], "names an empty class"), (["Cat", "dog", "cat "], "names cat twice")],
)
def test_impossible_names(names, message):
    with pytest.raises(ConfigError, match=message):
        check_names(names)


def test_names_of_any_script():
    assert check_names([" 犬", "собака"]) == ("犬", "собака")
