"""timm computes the same from the same weights: at the native size as released, at any size under its own geometry."""

from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from pe_spatial import VARIANTS, PerceptionEncoder
from pe_spatial.encoder.checkpoint import load_state

timm = pytest.importorskip("timm")

SIZES = {"t16": "tiny", "s16": "small", "b16": "base", "l14": "large", "g14": "gigantic"}


def timm_name(variant: str) -> str:
    _, family, size, side = variant.removesuffix("_tiling").split("_")
    return f"vit_pe_{family}_{SIZES[size]}_patch{size[1:]}_{side}"


@pytest.mark.parametrize("variant", VARIANTS)
def test_equals_timm(variant, randomize):
    """At full width; T at full depth too. In the others one block after the other is the same code."""
    depth = {"t16": VARIANTS[variant].depth, "g14": 1}.get(variant.split("_")[2], 2)
    config = replace(VARIANTS[variant], depth=depth)
    layers = tuple(range(config.depth))
    theirs = timm.create_model(timm_name(variant), depth=config.depth, dynamic_img_size=True).eval()
    randomize(theirs)
    with torch.device("meta"):
        ours = {
            geometry: PerceptionEncoder(config, out_indices=layers, geometry=geometry).eval()
            for geometry in ("release", "timm")
        }
    for model in ours.values():
        assert load_state(model, theirs.state_dict()).layout == "timm"

    def difference(geometry: str, grid: tuple[int, int]) -> float:
        """Compare the maps after every block; return the largest difference of the last."""
        images = torch.randn(1, 3, *(n * config.patch_size for n in grid))
        with torch.inference_mode():
            got = ours[geometry](images)
            expected = theirs.forward_intermediates(images, indices=list(layers), norm=False, intermediates_only=True)
        if geometry == "timm" or grid == (side, side):
            assert_close(got, tuple(expected), rtol=1e-4, atol=1e-4)
        return (got[-1] - expected[-1]).abs().max().item()

    torch.manual_seed(0)
    side = config.grid_size
    difference("release", (side, side))
    elsewhere = [(side // 2, side // 2), (side + 5, 7), (6, side + 1)]
    if config.embed_dim < 400:  # T and S
        elsewhere.append((side + 4, side + 4))
    for grid in elsewhere:
        difference("timm", grid)
    assert min(difference("release", grid) for grid in elsewhere[:2]) > 0.1  # a thousand tolerances
