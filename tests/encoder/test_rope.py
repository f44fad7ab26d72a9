"""Rotary positions: the released formula, invariances, the cache of tables."""

import math

import pytest
import torch
from torch.testing import assert_close

from pe_spatial.encoder import rope
from pe_spatial.encoder.rope import apply_rope, rope_table

CPU = torch.device("cpu")


def turned_one_by_one(vector: list[float], x: float, y: float) -> list[float]:
    """Turn interleaved pairs: the first half of the vector by x, the second by y, at theta 10000."""
    out, pairs = [], len(vector) // 4
    for i in range(2 * pairs):
        angle = (x if i < pairs else y) * 10000 ** (-(i % pairs) / pairs)
        a, b = vector[2 * i : 2 * i + 2]
        out += [a * math.cos(angle) - b * math.sin(angle), a * math.sin(angle) + b * math.cos(angle)]
    return out


@pytest.mark.parametrize(("offset", "prefix", "scale"), [(0, 0, (1.0, 1.0)), (1, 1, (0.5, 2.0))])
def test_turns_pairs_by_column_then_row(offset, prefix, scale):
    grid, head_dim = (3, 2), 8
    vectors = torch.randn(1, prefix + 6, head_dim)
    table = rope_table(grid, head_dim, scale=scale, offset=offset, num_prefix_tokens=prefix, device=CPU)
    turned = apply_rope(vectors, table)
    assert_close(turned[:, :prefix], vectors[:, :prefix], rtol=0, atol=0)
    for token in range(6):
        row, col = divmod(token, grid[1])
        y, x = ((i + offset) * s for i, s in zip((row, col), scale, strict=True))
        expected = turned_one_by_one(vectors[0, prefix + token].tolist(), x, y)
        assert_close(turned[0, prefix + token], torch.tensor(expected))


def test_shift_of_all_positions_keeps_attention_among_patches_but_not_with_the_class_token():
    q, k = torch.randn(2, 1, 13, 2, 16).unbind(0)

    def logits(offset: int, prefix: int) -> torch.Tensor:
        table = rope_table((4, 3), 16, offset=offset, num_prefix_tokens=prefix, device=CPU)
        turned = [apply_rope(v[:, 1 - prefix :], table) for v in (q, k)]
        return torch.einsum("bnhd,bmhd->bhnm", *turned)

    assert_close(logits(0, 0), logits(5, 0), rtol=1e-4, atol=1e-4)
    assert_close(logits(0, 1)[..., 1:, 1:], logits(5, 1)[..., 1:, 1:], rtol=1e-4, atol=1e-4)
    assert (logits(0, 1) - logits(1, 1))[..., 0, 1:].abs().max() > 0.1


def test_is_a_rotation_with_the_right_gradient():
    x = torch.randn(2, 12, 3, 16, requires_grad=True)
    table = rope_table((4, 3), 16, device=CPU)
    assert_close(apply_rope(x, table).norm(dim=-1), x.norm(dim=-1))
    weight = torch.randn(2, 12, 3, 16)
    (apply_rope(x, table) * weight).sum().backward()
    backwards = torch.stack((table[..., 0], -table[..., 1]), dim=-1)
    assert_close(x.grad, apply_rope(weight, backwards))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_turned_in_float32(dtype):
    x = torch.randn(1, 64, 2, 16).to(dtype)
    table = rope_table((1, 64), 16, scale=(1, 100), device=CPU)
    assert_close(apply_rope(x, table), apply_rope(x.float(), table).to(dtype), rtol=0, atol=0)


def test_tables_are_cached_by_value_within_a_bound(monkeypatch):
    monkeypatch.setattr(rope, "_tables", {})
    first = rope_table((3, 5), 8, device=CPU)
    assert rope_table((3, 5), 8, device=CPU) is first
    assert rope_table((5, 3), 8, device=CPU) is not first
    for side in range(1, 2 * rope._MAX_TABLES):
        rope_table((side, 1), 8, device=CPU)
    assert len(rope._tables) == rope._MAX_TABLES
    assert_close(rope_table((3, 5), 8, device=CPU), first, rtol=0, atol=0)


def test_table_built_under_inference_mode_is_an_ordinary_tensor(monkeypatch):
    monkeypatch.setattr(rope, "_tables", {})
    with torch.inference_mode():
        table = rope_table((2, 2), 8, device=CPU)
    assert not table.is_inference()
    assert not table.requires_grad
