"""Two processes train an alignment as one does, with weights replicated or sharded, and average them alike."""

import os
import sys

import pytest
import torch
from torch.testing import assert_close

pytest.importorskip("mmcv")
pytest.importorskip("pytorch_optimizer")
pytest.importorskip("torch", minversion="2.7")
import numpy as np
from helpers.encoders import TINY
from helpers.processes import free_port, start
from mmengine.config import Config
from PIL import Image

import pe_spatial.alignment  # noqa: F401  (registers)
from pe_spatial import PerceptionEncoder
from pe_spatial.engine.fault_tolerance import add_fault_tolerance
from pe_spatial.engine.runner import build_runner

pytestmark = [pytest.mark.mmdet, pytest.mark.slow, pytest.mark.skipif(sys.platform == "win32", reason="gloo")]


def run(folder, name, *, world, kind=None):
    """Two steps of four images, without anything random, which differs between processes."""
    steps = ["LoadUnlabeled", dict(type="FixedView", size=64), "PackViews"]
    weights = dict(type="Pretrained", checkpoint=str(folder / "encoder.pt"))
    losses = [dict(kind="token_cosine", teacher="core"), dict(kind="pairwise_similarity", teacher="masks")]
    cfg = Config(
        dict(
            model=dict(
                type="SpatialAlignment",
                backbone=dict(type="PerceptionEncoder", variant=TINY.__dict__, init_cfg=weights),
                teachers=dict(
                    core=dict(type="EncoderTeacher", layer=1), masks=dict(type="ObjectMaskTeacher", objects=3)
                ),
                losses=losses,
                layer_scale=0.1,
            ),
            custom_imports=dict(imports=["pe_spatial.alignment"]),
            work_dir=str(folder / name),
            launcher="pytorch" if world > 1 else "none",
            train_dataloader=dict(
                batch_size=4 // world,
                num_workers=0,
                sampler=dict(type="DefaultSampler", shuffle=False),
                dataset=dict(
                    type="UnlabeledImages",
                    data_root=str(folder),
                    data_prefix=dict(img="rgb", instances="ids"),
                    pipeline=[step if isinstance(step, dict) else dict(type=step) for step in steps],
                ),
            ),
            optim_wrapper=dict(optimizer=dict(type="LAMB", lr=0.01)),
            train_cfg=dict(type="IterBasedTrainLoop", max_iters=2),
            default_hooks=dict(checkpoint=dict(type="CheckpointHook", by_epoch=False, interval=2)),
            custom_hooks=[dict(type="EMAHook", momentum=0.3, update_buffers=True)],
            default_scope="mmengine",
            log_level="ERROR",
            experiment_name=name,
            randomness=dict(seed=0),
            env_cfg=dict(dist_cfg=dict(backend="gloo")),
        )
    )
    if kind:
        cfg.runner_type = kind
    add_fault_tolerance(cfg)
    build_runner(cfg).train()


def two_processes(rank, port, folder):
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="localhost", MASTER_PORT=str(port), RANK=str(rank), LOCAL_RANK=str(rank))
    os.environ.update(WORLD_SIZE="2")
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    run(folder, "ddp", world=2)
    run(folder, "sharded", world=2, kind="ShardedRunner")
    torch.distributed.destroy_process_group()


def test_two_processes_equal_one(tmp_path):
    generator = np.random.default_rng(0)
    for kind in ("rgb", "ids"):
        (tmp_path / kind).mkdir()
    for i in range(8):
        Image.fromarray(generator.integers(0, 256, (64, 64, 3), np.uint8)).save(tmp_path / f"rgb/{i}.png")
        Image.fromarray(generator.integers(0, 3, (8, 8), np.uint8).repeat(8, 0).repeat(8, 1)).save(
            tmp_path / f"ids/{i}.png"
        )
    torch.manual_seed(0)
    torch.save(PerceptionEncoder(TINY).state_dict(), tmp_path / "encoder.pt")
    run(tmp_path, "one", world=1)
    start(two_processes, (free_port(), tmp_path), number=2)
    states = {
        name: torch.load(tmp_path / name / "iter_2.pth", weights_only=False) for name in ("one", "ddp", "sharded")
    }
    start_state = torch.load(tmp_path / "encoder.pt")
    trained = states["one"]["state_dict"]["backbone.blocks.2.mlp.fc1.weight"]
    assert (trained - start_state["blocks.2.mlp.fc1.weight"]).abs().max() > 1e-4
    for name in ("ddp", "sharded"):
        for key in ("state_dict", "ema_state_dict"):
            assert_close(states[name][key], states["one"][key], rtol=1e-4, atol=1e-5)
