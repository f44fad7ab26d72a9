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
from pe_spatial.planning.planner import measure_step
from pe_spatial.planning.search import Hardware, plan

pytestmark = pytest.mark.mmseg


@pytest.fixture(scope="module")
def cfg():
    """Four classes on two blocks with adapters, 4 images in a step."""
    cfg = load(CONFIGS / "pe_spatial_linear_ade20k.py")
    variant = dict(img_size=448, patch_size=14, embed_dim=512, depth=2, num_heads=8)
    cfg.model.backbone.update(variant=variant, lora=dict(rank=8), init_cfg=None)
    cfg.model.decode_head.num_classes = 4
    cfg.train_dataloader.batch_size = 4
    return cfg


def follow(cfg, text):
    """Return the config that `pe-spatial train CONFIG TEXT` trains."""
    arguments, _, options = text.partition("--cfg-options")
    words, changed = shlex.split(arguments), copy.deepcopy(cfg)
    if "--amp" in words:
        use_bfloat16(changed)
    set_options(changed, dict(option.split("=", 1) for option in shlex.split(options)))
    return changed


@pytest.mark.parametrize(
    ("memory", "words"),
    [
        (0.7, ()),
        (0.47, ("--amp",)),
        pytest.param(0.32, ("--amp", "micro_batch=2"), marks=pytest.mark.slow),
        (0.2, ("--amp", "accumulative_counts=4")),
    ],
)
def test_options_make_a_training_that_fits(cfg, memory, words):
    hardware = Hardware(gpus=1, gpu_memory=memory, reserve=0.1)
    chosen = fit(cfg, hardware, images=100)
    assert all(word in str(chosen) for word in words)
    assert chosen.batch * chosen.accumulated == cfg.train_dataloader.batch_size
    assert bool(str(chosen)) == bool(words)
    changed = follow(cfg, str(chosen))
    recomputed = changed.model.backbone.get("grad_checkpointing", False)
    (row,) = plan(changed, hardware, images=100, kinds=[recomputed])
    assert row["total"] == chosen.row["total"] <= hardware.usable


def test_recomputing_of_the_config_counts(cfg):
    cfg = copy.deepcopy(cfg)
    cfg.model.backbone.grad_checkpointing = True
    hardware = Hardware(gpus=1, gpu_memory=0.7, reserve=0.1)
    assert str(fit(cfg, hardware, images=100)) == ""
    cfg.model.backbone.grad_checkpointing = [0]
    assert "grad_checkpointing=False" in str(fit(cfg, hardware, images=100))


@pytest.mark.slow
def test_what_does_not_fit_is_refused_with_what_does(cfg):
    cfg = copy.deepcopy(cfg)
    cfg.model.backbone.update(variant="pe_spatial_s16_512", lora=None)
    cfg.train_dataloader.batch_size = 1
    for memory, words in ((0.19, "pe_spatial_t16_512 fits, with"), (0.11, "No smaller PE-Spatial fits")):
        text = rf"does not fit into {memory} GB: .* needs .* GB, and 0.1 GB stay free \(--reserve\). {words}"
        with pytest.raises(ConfigError, match=text):
            fit(cfg, Hardware(gpus=1, gpu_memory=memory, reserve=0.1), images=100)


def test_a_refusal_plans_the_smallest_training_of_each_encoder_alone(cfg, monkeypatch):
    """What fits nowhere ends soon: one image, all recomputed, is planned, and nothing that needs more."""
    measured = []

    def measure(model, batch_size, *arguments, **options):
        measured.append(batch_size)
        return measure_step(model, batch_size, *arguments, **options)

    monkeypatch.setattr("pe_spatial.planning.search.measure_step", measure)
    with pytest.raises(ConfigError, match=r"needs .* GB, and 4 GB stay free"):
        fit(cfg, Hardware(gpus=1, gpu_memory=2), images=100)
    assert measured == [1, 2]


@pytest.mark.long
def test_two_gigabytes_for_the_largest_encoder():
    text = r"needs 11 GB.*pe_spatial_t16_512 needs [\d.]+ GB beside that, with --image-size"
    with pytest.raises(ConfigError, match=text):
        fit(load(CONFIGS / "pe_spatial_cascade_coco_g14.py"), Hardware(gpus=1, gpu_memory=2), images=100)
