"""plan --fit: the options that it prints make a training that is planned to fit."""

import copy
import shlex

import pytest

pytest.importorskip("mmseg")
pytest.importorskip("torch", minversion="2.4")
from helpers.configs import load
from helpers.repository import CONFIGS

import pe_spatial.segmentation  # noqa: F401  (registers)
from pe_spatial.engine.fit import fit
from pe_spatial.engine.options import set_options
from pe_spatial.engine.recipe import use_bfloat16
from pe_spatial.errors import ConfigError
from pe_spatial.planning.search import Hardware, plan

pytestmark = pytest.mark.mmseg


@pytest.fixture(scope="module")
def cfg():
    cfg = load(CONFIGS / "pe_spatial_linear_ade20k.py")
    cfg.model.backbone.variant = "pe_spatial_b16_512"
    return cfg


def follow(cfg, text):
    """Return the config that `pe-spatial train CONFIG TEXT` trains."""
    arguments, _, options = text.partition("--cfg-options")
    words, changed = shlex.split(arguments), copy.deepcopy(cfg)
    if "--amp" in words:
        use_bfloat16(changed)
    set_options(changed, dict(option.split("=", 1) for option in shlex.split(options)))
    return changed


@pytest.mark.parametrize(("memory", "words"), [(80, ()), (1, ("--amp", "accumulative_counts"))])
def test_options_make_a_training_that_fits(cfg, memory, words):
    hardware = Hardware(gpus=1, gpu_memory=memory, reserve=0.1)
    chosen = fit(cfg, hardware, images=100)
    assert all(word in str(chosen) for word in words)
    assert chosen.batch * chosen.accumulated == cfg.train_dataloader.batch_size
    assert bool(str(chosen)) == bool(words)
    changed = follow(cfg, str(chosen))
    recomputed = changed.model.backbone.get("grad_checkpointing", False)
    rows = plan(changed, hardware, images=100)
    row = next(row for row in rows if row["recomputed"] == recomputed)
    assert row["total"] == chosen.row["total"] <= hardware.usable


def test_what_does_not_fit_is_refused_with_what_does(cfg):
    for memory, words in ((0.65, "pe_spatial_t16_512 fits, with --amp"), (0.2, "No smaller PE-Spatial fits")):
        text = rf"does not fit into {memory} GB: .* needs .* GB, and 0.1 GB stay free. {words}"
        with pytest.raises(ConfigError, match=text):
            fit(cfg, Hardware(gpus=1, gpu_memory=memory, reserve=0.1), images=100)
