"""The encoder: released reference values, which blocks run, gradients, sizes, types and compilation."""

import copy
import pickle
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from helpers.golden import checkpoint_file, read_arrays, read_json
from helpers.versions import COMPILE, FLOAT16, SELECTIVE
from torch._dynamo.testing import CompileCounterWithBackend
from torch.testing import assert_close

from pe_spatial import EncoderConfig, PerceptionEncoder, load_checkpoint
from pe_spatial.encoder import vit
from pe_spatial.encoder.vit import PatchEmbed

EXACT = {"rtol": 1e-4, "atol": 1e-5}
WINDOWED = {"window_size": 3, "global_attn_indexes": (1, 3), "rope_mode": "interpolate", "pos_embed_mode": "tile"}
GEOMETRIES = [{}, WINDOWED, {**WINDOWED, "mask_window_padding": True}]
layouts = pytest.mark.parametrize("class_token", [True, False])
geometries = pytest.mark.parametrize("geometry", GEOMETRIES, ids=["global", "windows", "windows-masked"])


def images(h: int = 64, w: int = 64, batch: int = 2, seed: int = 0) -> torch.Tensor:
    return torch.randn(batch, 3, h, w, generator=torch.Generator().manual_seed(seed))


def gradients(model: PerceptionEncoder, x: torch.Tensor) -> tuple[tuple[torch.Tensor, ...], dict[str, torch.Tensor]]:
    """Outputs, and the gradients of a sum that weighs every element differently; the random state is fixed."""
    torch.manual_seed(5)
    model.zero_grad()
    maps = model(x)
    sum((m * torch.linspace(-1, 1, m.numel()).view_as(m)).sum() for m in maps).backward()
    return tuple(m.detach() for m in maps), {
        n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None
    }


# --- released reference values


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("encoder_cls_p16", (64, 64)),
        ("encoder_cls_p16", (96, 160)),
        ("encoder_cls_p16", (48, 32)),
        ("encoder_nocls_layerscale_p14", (56, 56)),
        ("encoder_nocls_layerscale_p14", (70, 140)),
    ],
)
def test_equals_released_encoder_after_every_block(golden, name, size):
    kw = read_json(golden / f"encoder/{name}.json")["kw"]
    values = read_arrays(golden / f"encoder/{name}.npz")
    config = EncoderConfig(
        img_size=kw["image_size"],
        patch_size=kw["patch_size"],
        embed_dim=kw["width"],
        depth=kw["layers"],
        num_heads=kw["heads"],
        mlp_ratio=kw["mlp_ratio"],
        class_token=kw["use_cls_token"],
        init_values=kw["ls_init_value"],
    )
    model = PerceptionEncoder(config, out_indices=range(config.depth)).eval()
    assert load_checkpoint(model, checkpoint_file(golden / f"encoder/{name}.pt")).layout == "release"
    tokens = []
    for block in model.blocks:
        block.register_forward_hook(lambda *args: tokens.append(args[-1]))
    tag, p = f"{size[0]}x{size[1]}", config.patch_size
    with torch.no_grad():
        maps = model(torch.from_numpy(values[f"input_{tag}"]))
    for layer in range(config.depth):
        expected = torch.from_numpy(values[f"tokens_{tag}_layer{layer}"])
        assert_close(tokens[layer], expected, **EXACT)
        as_map = expected[:, int(config.class_token) :].transpose(1, 2).unflatten(2, (size[0] // p, size[1] // p))
        assert_close(maps[layer], as_map, **EXACT)


# --- which blocks run


@geometries
def test_out_indices_give_each_layer_in_the_order_asked_for(tiny, geometry):
    x = images()
    with torch.no_grad():
        maps = tiny(out_indices=(0, 1, 2, 3), **geometry)(x)
        picked = tiny(out_indices=(2, 0, -1, 2), **geometry)(x)
    assert all((a - b).abs().max() > 0.1 for a, b in pairwise(maps))
    for got, layer in zip(picked, (2, 0, 3, 2), strict=True):
        assert got.shape == (2, 32, 4, 4)
        assert_close(got, maps[layer], rtol=0, atol=0)


def test_blocks_after_the_last_requested_are_not_built(tiny):
    model = tiny(out_indices=(0, -3))
    assert (model.depth, len(model.blocks), model.out_indices) == (2, 2, (0, 1))
    assert_close(model(images())[1], tiny(out_indices=(1, 3))(images())[0], rtol=0, atol=0)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"out_indices": (4,)}, r"out_indices is \(4,\), out of range for 4 blocks; -4 to 3"),
        ({"out_indices": (0, -5)}, "out of range"),
        ({"out_indices": ()}, "at least one block"),
        ({"window_size": 2, "global_attn_indexes": (7,)}, "global_attn_indexes"),
        ({"global_attn_indexes": (1,)}, "window_size"),
        ({"window_size": 0}, "a number of tokens from 1"),
        ({"pos_grid": 0}, "pos_grid is 0 tokens; give at least 1"),
        ({"grad_checkpointing": (9,)}, "grad_checkpointing"),
        ({"grad_checkpointing": "some"}, "grad_checkpointing is 'some'; allowed are True"),
        ({"grad_checkpointing": {0: "half"}}, "grad_checkpointing is .*; allowed are True"),
        ({"grad_checkpointing": {9: "full"}}, "grad_checkpointing"),
        ({"frozen_stages": 5}, "frozen_stages"),
        ({"drop_path_rate": 1.0}, "probability"),
        ({"pos_embed_mode": "nearest"}, "'bilinear', 'bicubic'"),
        ({"rope_mode": "stretch"}, "'extrapolate', 'interpolate'"),
        ({"rope_grid": 4}, "rope_mode='interpolate'"),
        ({"rope_mode": "interpolate", "rope_grid": (4, 4, 4)}, "windows, global"),
    ],
)
def test_bad_options_are_named(tiny, options, words):
    with pytest.raises(ValueError, match=words):
        tiny(**options)


@pytest.mark.parametrize(
    ("shape", "words"),
    [
        ((1, 3, 60, 64), "60x64 is not a multiple of patch_size 16; pad or resize to 64x64"),
        ((1, 3, 64, 8), "resize to 64x16"),
        ((1, 3, 64, 0), "resize to 64x16"),
        ((1, 4, 64, 64), r"expected \(B, 3, H, W\)"),
        ((3, 64, 64), r"expected \(B, 3, H, W\)"),
    ],
)
def test_bad_images_are_named(tiny, shape, words):
    with pytest.raises(ValueError, match=words):
        tiny()(torch.zeros(shape))


# --- independence


@layouts
@geometries
def test_batch_rows_are_independent(tiny, class_token, geometry):
    model, x = tiny(class_token, **geometry), images(80, 64, batch=3)
    with torch.no_grad():
        together = model(x)[0]
        for i in range(3):
            assert_close(together[i : i + 1], model(x[i : i + 1])[0], **EXACT)


@layouts
@geometries
def test_alternating_sizes_give_what_fresh_modules_give(tiny, class_token, geometry):
    model = tiny(class_token, **geometry)
    with torch.no_grad():
        for size in [(64, 64), (96, 32), (64, 64), (32, 96), (112, 112), (96, 32)]:
            assert_close(model(images(*size))[0], tiny(class_token, **geometry)(images(*size))[0], rtol=0, atol=0)


def test_copies_and_pickles_after_a_forward(tiny):
    model = tiny(**WINDOWED)
    expected = model(images())[0]
    before = set(model.state_dict())
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert_close(twin(images())[0], expected, rtol=0, atol=0)
    assert not any("rope" in name for name in before)
    assert before == {name for name, _ in model.named_parameters()}


def test_training_works_after_inference_mode(tiny):
    model = tiny(rope_mode="interpolate", rope_grid=7)  # tables that no other test has cached
    with torch.inference_mode():
        expected = model(images(80, 48))[0].clone()
    maps, grads = gradients(model, images(80, 48))
    assert_close(maps[0], expected, **EXACT)
    assert set(grads) == {name for name, _ in model.named_parameters()}


def test_builds_and_runs_on_the_meta_device():
    with torch.device("meta"):
        model = PerceptionEncoder("pe_spatial_g14_448", out_indices=(3, -1), **WINDOWED)
        maps = model(torch.empty(2, 3, 448, 560))
    assert [m.shape for m in maps] == [(2, 1536, 32, 40)] * 2
    assert all(p.is_meta for p in model.parameters())


# --- training


@pytest.mark.parametrize(
    "blocks",
    [
        pytest.param(True, id="all"),
        pytest.param((1, -1), id="some"),
        pytest.param("selective", marks=SELECTIVE, id="selective"),
        pytest.param({1: "full", -1: "selective"}, marks=SELECTIVE, id="mixed"),
    ],
)
@pytest.mark.parametrize("drop_path_rate", [0.0, 0.5])
@geometries
def test_grad_checkpointing_changes_nothing_and_recomputes(tiny, blocks, drop_path_rate, geometry):
    options = {"drop_path_rate": drop_path_rate, "out_indices": (1, 3), **geometry}
    plain, saving = tiny(**options).train(), tiny(**options, grad_checkpointing=blocks).train()
    calls: list[int] = []
    for i, block in enumerate(saving.blocks):
        block.norm1.register_forward_hook(lambda *_, i=i: calls.append(i))
    maps, grads = gradients(plain, images(64, 80))
    maps_again, grads_again = gradients(saving, images(64, 80))
    assert_close(maps_again, maps, rtol=0, atol=0)
    assert_close(grads_again, grads, rtol=0, atol=0)
    twice = {0, 1, 2, 3} if blocks in (True, "selective") else {1, 3}
    assert [calls.count(i) for i in range(4)] == [1 + (i in twice) for i in range(4)]
    with torch.no_grad():
        saving(images())
    assert calls.count(3) == 3


@layouts
@geometries
def test_drop_path_draws_once_per_image(tiny, class_token, geometry):
    model = tiny(class_token, out_indices=(2,), drop_path_rate=0.9, **geometry).train()
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    model.blocks[2].register_forward_hook(lambda _, args, out: seen.append((args[0], out)))
    model.blocks[2].mlp.fc2.bias.data.fill_(100.0)  # makes a kept MLP branch unmistakable
    if model.blocks[2].gamma_2 is not None:
        model.blocks[2].gamma_2.data.fill_(1.0)
    torch.manual_seed(0)
    model(images(96, 96, batch=16))
    before, after = seen[0]
    kept = ((after - before) > 50).unflatten(0, (16, -1)).flatten(1)  # (images, windows * tokens * channels)
    assert bool((kept.all(1) | ~kept.any(1)).all())
    assert 0 < kept.all(1).sum() < 16
    assert_close((after - before)[(after - before) > 50].mean().item(), 100 / 0.4, rtol=0.05, atol=0)
    assert [round(block.drop_path, 2) for block in model.blocks] == [0.0, 0.3, 0.6]
    assert_close(model.eval()(images()), model(images()), rtol=0, atol=0)


@pytest.mark.parametrize("stages", [-1, 0, 2, 4])
def test_frozen_stages(tiny, stages):
    model = tiny(out_indices=(1, 3), frozen_stages=stages, drop_path_rate=0.5).train()
    stem = ("patch_embed", "cls_token", "pos_embed", "norm_pre")
    frozen = (stem if stages >= 0 else ()) + tuple(f"blocks.{i}." for i in range(stages))
    expected = {name for name, _ in model.named_parameters() if not name.startswith(frozen)}
    assert {name for name, p in model.named_parameters() if p.requires_grad} == expected
    assert [block.training for block in model.blocks] == [i >= stages for i in range(4)]
    graphs: list[bool] = []
    for block in model.blocks:
        block.register_forward_hook(lambda *args: graphs.append(args[-1].requires_grad))
    x = images().requires_grad_()  # would make a graph of the frozen part too, did that not run without autograd
    if stages < 4:
        assert set(gradients(model, x)[1]) == expected
    else:
        assert not any(m.requires_grad for m in model(x))
    assert (x.grad is not None) is (stages < 0)
    assert graphs == [i >= stages for i in range(4)]
    assert_close(model.eval()(images()), tiny(out_indices=(1, 3))(images()), rtol=0, atol=0)


# --- number types


@layouts
@geometries
@pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.bfloat16, 0.03), pytest.param(torch.float16, 0.004, marks=FLOAT16.marks)]
)
def test_half_precision_stays_close_to_float32(tiny, class_token, geometry, dtype, bound):
    """The mean error over the mean magnitude stays under four units in the last place of the type."""
    model = tiny(class_token, out_indices=(0, 3), **geometry)
    with torch.no_grad():
        expected = model(images(80, 64))
        cast = copy.deepcopy(model).to(dtype)(images(80, 64).to(dtype))
        with torch.autocast("cpu", dtype):
            mixed = model(images(80, 64))
    for want, low, auto in zip(expected, cast, mixed, strict=True):
        assert low.dtype == dtype
        for got in (low, auto):
            error = (got.float() - want).abs().mean() / want.abs().mean()
            assert 1e-6 < error < bound, error


# --- compilation


@COMPILE
@pytest.mark.parametrize(("class_token", "geometry"), zip((True, False, True), GEOMETRIES, strict=True))
def test_compiles_without_graph_breaks_and_seldom_for_new_sizes(tiny, class_token, geometry):
    torch._dynamo.reset()
    model, counter = tiny(class_token, out_indices=(0, 1), **geometry), CompileCounterWithBackend("eager")
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True, backend=counter)
    with torch.no_grad():
        for h, w in [(4, 4), (7, 7), (6, 4), (8, 10), (9, 6), (4, 4), (5, 9), (6, 12), (11, 7), (8, 9)]:
            x = images(16 * h, 16 * w)
            assert_close(compiled(x), model(x), **EXACT)
    assert counter.frame_count <= 5


@COMPILE
def test_compiled_training_gives_the_same_gradients(tiny):
    torch._dynamo.reset()
    options = {**WINDOWED, "out_indices": (2,), "grad_checkpointing": (0, 2), "frozen_stages": 1}
    model, twin = tiny(**options).train(), tiny(**options).train()
    twin.forward = torch.compile(twin.forward, fullgraph=True, backend="aot_eager")
    assert_close(gradients(twin, images(80, 64)), gradients(model, images(80, 64)), **EXACT)


@COMPILE
@pytest.mark.slow
def test_inductor_gives_the_same(tiny):
    torch._dynamo.reset()
    model, twin = tiny(out_indices=(1,), **WINDOWED), tiny(out_indices=(1,), **WINDOWED)
    twin.forward = torch.compile(twin.forward, fullgraph=True)
    assert_close(gradients(twin, images(80, 64)), gradients(model, images(80, 64)), **EXACT)


# --- the patch embedding


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(("patch", "size"), [(16, (64, 64)), (14, (28, 70)), (8, (40, 16)), (1, (3, 5))])
@pytest.mark.parametrize("dtype", [torch.bfloat16, FLOAT16, torch.float32])
def test_patch_embedding_equals_its_convolution(dtype, patch, size, layout):
    """Outputs, and gradients of images and weights; in float32 to the last bit."""
    embed = PatchEmbed(3, 8, patch).to(dtype).to(memory_format=layout)
    assert {name: tuple(x.shape) for name, x in embed.state_dict().items()} == {"proj.weight": (8, 3, patch, patch)}
    results = []
    for convolve in (embed.proj, lambda x: F.conv2d(x, embed.proj.weight, stride=patch)):
        x = images(*size).to(dtype).to(memory_format=layout).requires_grad_()
        out = convolve(x)
        weights = torch.linspace(-1, 1, out.numel()).view(out.shape).to(dtype)
        results.append((out, *torch.autograd.grad((out * weights).sum(), (x, embed.proj.weight))))
    bound = {"rtol": 0, "atol": 0} if dtype == torch.float32 else {"rtol": 0.02, "atol": 0.02}
    for ours, reference in zip(*results, strict=True):
        assert ours.dtype == dtype
        assert_close(ours, reference, **bound)
    assert_close(embed(x), results[0][0].permute(0, 2, 3, 1), rtol=0, atol=0)


def test_patch_embedding_as_a_matrix_product_is_exact():
    """Computed in float32 as it is in 16 bits, it has the gradients of the convolution."""
    embed, results = PatchEmbed(3, 8, 16), []
    with torch.autocast("cpu", torch.bfloat16):
        assert embed(images(32, 64)).dtype == torch.bfloat16
        assert_close(embed.proj(images(32, 64)), F.conv2d(images(32, 64), embed.proj.weight, stride=16))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vit, "is_autocast", lambda _: True)
        for convolve in (embed.proj, lambda x: F.conv2d(x, embed.proj.weight, stride=16)):
            x = images(32, 64).requires_grad_()
            results.append((out := convolve(x), *torch.autograd.grad(out.square().sum(), (x, embed.proj.weight))))
    for ours, reference in zip(*results, strict=True):
        assert_close(ours, reference, rtol=1e-6, atol=1e-6 * float(reference.abs().max()))
    assert not torch.equal(results[0][0], results[1][0])  # the matrix product did run


@COMPILE
def test_patch_embedding_in_16_bits_compiles_and_runs_without_values():
    torch._dynamo.reset()
    embed, counter = PatchEmbed(3, 8, 16).bfloat16(), CompileCounterWithBackend("eager")
    compiled = torch.compile(embed, backend=counter, fullgraph=True, dynamic=True)
    for x in (images(32, 64).bfloat16(), images(64, 96).bfloat16()):
        assert_close(compiled(x), embed(x), rtol=0, atol=0)
    assert counter.frame_count == 1
    assert embed.to("meta")(x.to("meta")).shape == (2, 4, 6, 8)
