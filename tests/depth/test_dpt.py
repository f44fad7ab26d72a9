"""The DPT head: equal to the reference at every stage, at odd grids and at every width."""

import re

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("mmengine")
from helpers.golden import read_arrays, read_json

from pe_spatial.depth.dpt import DPTDepthHead
from pe_spatial.errors import ConfigError

TOKENS = {"ignore": None, "add": "class", "project": "class"}
WIDTHS = {"T": 192, "S": 384, "B": 768, "L": 1024, "G": 1536}


@pytest.fixture(scope="module")
def reference(golden):
    arrays = read_arrays(golden / "depth/dpt_head.npz")
    return {name: torch.from_numpy(arrays[name]) for name in arrays}


RENAMED = [
    (r"^reassemble_blocks\.projects\.(\d)\.conv", r"reassemble.\1.project"),
    (r"^reassemble_blocks\.resize_layers\.(\d)", r"reassemble.\1.resize"),
    (r"^reassemble_blocks\.readout_projects\.(\d)\.0", r"reassemble.\1.readout.0"),
    (r"^convs\.(\d)\.conv", r"convs.\1"),
    (r"^conv_depth\.head\.0", "narrow"),
    (r"^conv_depth\.head\.2", "hidden"),
    (r"^conv_depth\.head\.4", "out"),
    (r"^project\.conv", "project"),
    (r"\.res_conv_unit1\.", ".level_unit."),
    (r"\.res_conv_unit2\.", ".unit."),
    (r"\.conv\.weight", ".weight"),
    (r"\.conv\.bias", ".bias"),
]


def ours(reference):
    """Give the weights our names; the reference counts fusions from the deepest level, we from the finest."""
    state = {}
    for name, value in reference.items():
        if not name.startswith("weights/"):
            continue
        name = name.removeprefix("weights/")
        for pattern, new in RENAMED:
            name = re.sub(pattern, new, name)
        name = re.sub(r"^fusion_blocks\.(\d)", lambda found: f"fusions.{3 - int(found[1])}", name)
        state[name] = value[..., None, None] if ".readout.0.weight" in name else value
    return state


def assert_close(depth, expected):
    """Within 1e-5 of the largest value: the reference's own rounding is 1.8e-5 m at 16 m (found in float64)."""
    torch.testing.assert_close(depth, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


def reference_head(reference, readout):
    head = DPTDepthHead([32] * 4, channels=16, readout=readout, token=TOKENS[readout]).eval()
    state = {name: x for name, x in ours(reference).items() if readout == "project" or ".readout." not in name}
    head.load_state_dict(state)
    return head


def inputs(reference, grid):
    return ([reference[f"dpt_{grid}/{kind}_{i}"] for i in range(4)] for kind in ("patch", "cls"))


@pytest.mark.parametrize("readout", TOKENS)
@pytest.mark.parametrize("grid", ["4x6", "5x7"])
def test_equals_the_reference(reference, golden, grid, readout):
    head = reference_head(reference, readout)
    case = f"dpt_{grid}"
    with torch.no_grad():
        depth = head(*inputs(reference, grid))
    assert_close(depth, reference[f"{case}/{readout}/head_output"])
    size = read_json(golden / "depth/heads.json")["cases"][case]["image_size"]
    resized = F.interpolate(depth.clamp(1e-3, 10.0), size, mode="bilinear", align_corners=False)
    assert_close(resized, reference[f"{case}/{readout}/resized_output"])


@pytest.mark.parametrize("grid", ["4x6", "5x7"])
def test_every_stage_equals_the_reference(reference, grid):
    head = reference_head(reference, "project")
    seen = {}
    for i in range(4):
        head.reassemble[i].register_forward_hook(lambda *args, i=i: seen.update({f"reassembled_{i}": args[2]}))
        head.fusions[i].register_forward_hook(lambda *args, i=i: seen.update({f"fused_{3 - i}": args[2]}))
    with torch.no_grad():
        head(*inputs(reference, grid))
    del seen["fused_3"]  # not among the reference's values
    assert len(seen) == 7
    for name, value in seen.items():
        assert_close(value, reference[f"dpt_{grid}/project/{name}"])


@pytest.mark.parametrize("size", WIDTHS)
def test_channels_follow_from_the_width(size):
    width = WIDTHS[size]
    with torch.device("meta"):
        head = DPTDepthHead([width] * 4)
    assert [level.project.out_channels for level in head.reassemble] == [width // 8, width // 4, width // 2, width]
    assert head.project.out_channels == width // 4


@pytest.mark.parametrize("grid", [(5, 7), (4, 6), (1, 3)])
@pytest.mark.parametrize("options", [dict(), dict(bins=16)])
def test_any_grid(grid, options):
    head = DPTDepthHead([16] * 4, **options)
    depth = head([torch.randn(1, 16, *grid)] * 4)
    side = 16 if options else 32  # bins stay at half resolution
    assert depth.shape == (1, 1, side * -(-grid[0] // 2), side * -(-grid[1] // 2))


def test_one_layer_four_times():
    torch.manual_seed(0)
    head = DPTDepthHead([16], in_index=[0, 0, 0, 0])
    x = torch.randn(1, 16, 4, 4)
    four = DPTDepthHead([16] * 4)
    four.load_state_dict(head.state_dict())
    torch.testing.assert_close(head([x]), four([x] * 4))


def test_in_index_chooses_the_layer_of_each_level():
    torch.manual_seed(0)
    head = DPTDepthHead([16] * 4, in_index=[3, 2, 1, 0])
    straight = DPTDepthHead([16] * 4)
    straight.load_state_dict(head.state_dict())
    maps = [torch.randn(1, 16, 4, 4) for _ in range(4)]
    torch.testing.assert_close(head(maps), straight(maps[::-1]))


@pytest.mark.parametrize("scale", [1.0, 100.0])
def test_begins_near_the_mean_depth_and_with_a_gradient(scale):
    torch.manual_seed(0)
    head = DPTDepthHead([64] * 4, norm="batch", init_depth=3.0)
    depth = head([torch.randn(2, 64, 4, 4) * scale for _ in range(4)])
    assert (depth - 3).abs().max() < 0.5
    depth.log().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in head.parameters())


def test_bins_stay_in_their_range():
    torch.manual_seed(0)
    depth = DPTDepthHead([16] * 4, bins=8, min_depth=1.0, max_depth=2.0)([torch.randn(1, 16, 4, 4) * 9] * 4)
    assert ((depth >= 1) & (depth <= 2)).all()


def test_hierarchical_maps_keep_their_scales():
    head = DPTDepthHead([8, 16, 32, 64], scales=[1, 1, 1, 1], channels=16)
    maps = [torch.randn(1, 8 * 2**i, 16 // 2**i, 24 // 2**i) for i in range(4)]
    assert head(maps).shape == (1, 1, 64, 96)


def test_checkpointing_leaves_outputs_and_gradients_unchanged():
    maps = [torch.randn(1, 16, 3, 5) for _ in range(4)]
    results = []
    for grad_checkpointing in (False, True):
        torch.manual_seed(0)
        head = DPTDepthHead([16] * 4, grad_checkpointing=grad_checkpointing).train()
        depth = head(maps)
        depth.square().sum().backward()
        results.append([depth.detach(), *(p.grad for p in head.parameters())])
    for plain, checkpointed in zip(*results, strict=True):
        torch.testing.assert_close(plain, checkpointed)


def test_checkpointing_really_recomputes():
    head = DPTDepthHead([16] * 4, grad_checkpointing=True).train()
    runs = []
    for fusion in head.fusions:
        fusion.register_forward_pre_hook(lambda *_: runs.append(1))
    depth = head([torch.randn(1, 16, 2, 2)] * 4)
    assert len(runs) == 4
    depth.sum().backward()
    assert len(runs) == 8


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(readout="cls"), "readout is 'cls'; allowed are 'ignore', 'add', 'project'"),
        (dict(readout="project"), "readout is 'project' and token None"),
        (dict(token="mean"), "readout is 'ignore' and token 'mean'"),
        (dict(in_index=[0, 1, 2]), r"in_index is \[0, 1, 2\] but the encoder gives 4 maps"),
        (dict(in_index=[0, 1, 2, 4]), "give four indices"),
        (dict(scales=[8, 4, 2, 1]), "the scale of a DPT level is 8"),
    ],
)
def test_wrong_options_are_named(options, message):
    with pytest.raises(ConfigError, match=message):
        DPTDepthHead([16] * 4, **options)
