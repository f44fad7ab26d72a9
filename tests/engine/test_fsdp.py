"""Sharded training equals replicated training and training in one process; either resumes what the other saved."""

import os
import sys
from types import SimpleNamespace

import pytest
import torch
from torch.testing import assert_close

pytest.importorskip("mmdet")
pytest.importorskip("torch", minversion="2.7")
from helpers.encoders import TINY
from helpers.processes import free_port, start
from helpers.tiny_deta import SIDE, WIDTH, tiny_deta
from mmdet.structures import DetDataSample
from mmengine.config import Config
from mmengine.evaluator import BaseMetric
from mmengine.hooks import Hook
from mmengine.registry import DATASETS, HOOKS, METRICS
from mmengine.runner import Runner
from mmengine.structures import InstanceData
from torch.distributed import checkpoint as dcp
from torch.distributed.fsdp import FSDPModule

from pe_spatial import PerceptionEncoder
from pe_spatial.encoder.files import CheckpointError
from pe_spatial.engine.checkpoints import find_checkpoint
from pe_spatial.engine.fsdp import ShardedRunner, consolidate, gather, write_parts
from pe_spatial.engine.runner import QuietRunner
from pe_spatial.errors import ConfigError

pytestmark = [pytest.mark.mmdet, pytest.mark.skipif(sys.platform == "win32", reason="gloo")]
PICTURES = 18
RECORDED = [dict(type="ShardingRecord")]
AVERAGED = {  # plain steps: Adam's first ones follow the sign of a gradient, however small
    "optim_wrapper.optimizer": dict(_delete_=True, type="SGD", lr=0.1, momentum=0.9),
    "custom_hooks": [*RECORDED, dict(type="EMAHook", momentum=0.3, begin_iter=2, update_buffers=True)],
}
FROZEN = {"model.backbone.frozen_stages": 2}
EQUAL = dict(rtol=1e-5, atol=1e-5)
SMALLER = {  # each tensor is a collective
    "model.encoder.num_layers": 1, "model.decoder.num_layers": 1, "model.backbone.variant.depth": 3
}  # fmt: skip
TRAINED_ONLY = {"train_cfg.val_begin": 9}


@DATASETS.register_module()
class ShardingNoise(torch.utils.data.Dataset):
    """Images of noise with one to three boxes."""

    def __init__(self, number):
        self.number = number

    def __len__(self):
        return self.number

    def __getitem__(self, index):
        generator = torch.Generator().manual_seed(index)
        corners = torch.rand(1 + index % 3, 2, 2, generator=generator).sort(1).values.flatten(1) * SIDE
        labels = torch.randint(3, (len(corners),), generator=generator)
        sample = DetDataSample(gt_instances=InstanceData(bboxes=corners, labels=labels))
        sample.set_metainfo(dict(img_id=index, img_shape=(SIDE, SIDE), ori_shape=(SIDE, SIDE), scale_factor=(1, 1)))
        image = torch.randint(256, (3, SIDE, SIDE), generator=generator, dtype=torch.uint8)
        return dict(inputs=image, data_samples=sample)


@METRICS.register_module()
class ShardingScores(BaseMetric):
    """The sum of all scores: any wrong weight shows in it."""

    default_prefix = "sum"

    def process(self, _, samples):
        self.results += [float(sample["pred_instances"]["scores"].sum()) for sample in samples]

    def compute_metrics(self, results):
        return dict(scores=sum(results), images=len(results))


@HOOKS.register_module()
class ShardingRecord(Hook):
    """Losses and norms of gradients, iteration by iteration, and metrics."""

    def before_train(self, runner):
        runner.record = dict(loss=[], norm=[], metrics=[])

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):  # noqa: ARG002
        runner.record["loss"].append(float(outputs["loss"]))
        runner.record["norm"].append(float(runner.message_hub.get_scalar("train/grad_norm").current()))

    def after_val_epoch(self, runner, metrics=None):
        runner.record["metrics"].append(metrics)


def config(folder, *, world, kind="Runner", **options):
    """A DETA of three blocks on noise: four iterations of four images, a checkpoint after two, validation at the end.

    The batch is the same whatever the number of processes.
    """
    cfg = tiny_deta()
    cfg.merge_from_dict(SMALLER)
    cfg.merge_from_dict(
        dict(
            runner_type=kind,
            work_dir=str(folder),
            experiment_name=folder.name,
            launcher="pytorch" if world > 1 else "none",
            train_dataloader=dict(
                batch_size=4 // world, num_workers=0, collate_fn=dict(type="pseudo_collate"),
                sampler=dict(type="DefaultSampler", shuffle=False), dataset=dict(type="ShardingNoise", number=PICTURES),
            ),
            val_dataloader=dict(
                batch_size=1, num_workers=0, collate_fn=dict(type="pseudo_collate"),
                sampler=dict(type="DefaultSampler", shuffle=False, round_up=False),
                dataset=dict(type="ShardingNoise", number=5),  # one rank has one more than the other
            ),
            val_evaluator=dict(type="ShardingScores"),
            train_cfg=dict(type="IterBasedTrainLoop", max_iters=4, val_interval=4),
            val_cfg=dict(type="ValLoop"),
            optim_wrapper=dict(
                type="OptimWrapper",
                optimizer=dict(type="AdamW", lr=1e-3, weight_decay=0.05),
                clip_grad=dict(max_norm=0.1),
                constructor="LayerDecayOptimWrapperConstructor",
                paramwise_cfg=dict(layer_decay_rate=0.5, decay_norm_bias=False),
            ),
            param_scheduler=[dict(type="LinearLR", start_factor=0.1, by_epoch=False, begin=0, end=4)],
            default_hooks=dict(checkpoint=dict(type="CheckpointHook", by_epoch=False, interval=2)),
            custom_hooks=RECORDED,
            log_level="ERROR",
            randomness=dict(seed=0),
            env_cfg=dict(dist_cfg=dict(backend="gloo")),
        )
    )  # fmt: skip
    if world > 1 and kind != "ShardedRunner":
        cfg.model_wrapper_cfg = dict(type="MMDistributedDataParallel", device_ids=None, broadcast_buffers=False)
    cfg.merge_from_dict(options)
    return Config(cfg.to_dict(), format_python_code=False)  # formatting takes longer than training


def run(folder, *, resume=None, **options):
    """Train; return the runner, whose `record` tells how it went."""
    cfg = config(folder, **options)
    if resume:
        cfg.update(resume=True, load_from=str(resume))
    runner = dict(ShardedRunner=ShardedRunner, QuietRunner=QuietRunner).get(cfg.runner_type, Runner).from_cfg(cfg)
    runner.train()
    return runner


def facts(model):
    """What this process holds after a training, what is gathered together, and in which types."""
    weights = dict(state_dict=model.state_dict())
    block = model.backbone.encoder.blocks[2]
    found = dict(
        local={name: tuple(p.to_local().shape) for name, p in block.named_parameters()},
        whole={type(value) for value in gather(weights)["state_dict"].values()},
        units=[name for name, module in model.named_modules() if isinstance(module, FSDPModule)],
    )
    block.unshard()
    block.attn.unshard() if isinstance(block.attn, FSDPModule) else None
    found["types"] = {"norm": block.norm1.weight.dtype, "linear": block.attn.qkv.weight.dtype}
    return found


def two_processes(rank, port, folder):
    """Everything that two processes do, in one start of the processes."""
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="localhost", MASTER_PORT=str(port), RANK=str(rank), LOCAL_RANK=str(rank))
    os.environ.update(WORLD_SIZE="2")
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    records = {}
    sharded = dict(world=2, kind="ShardedRunner")
    recompute = {"model.backbone.grad_checkpointing": True, "model.grad_checkpointing": True}
    bfloat16 = {"optim_wrapper.type": "BFloat16OptimWrapper"}
    without_buffers = [*RECORDED, dict(type="EMAHook", momentum=0.3, begin_iter=2)]  # there are none in the files
    averaged = AVERAGED | FROZEN
    parts = averaged | dict(sharded_checkpoints=True, custom_hooks=without_buffers)
    parts["default_hooks.checkpoint"] = dict(type="AtomicCheckpointHook", interval=1, max_keep_ckpts=2)
    adapters = AVERAGED | {
        "model.backbone.lora": dict(rank=3, dora=True),
        "model.backbone.init_cfg": dict(_delete_=True, type="Pretrained", checkpoint=str(folder / "base.pt")),
    }
    last = TRAINED_ONLY | {"default_hooks.checkpoint.interval": 4}
    for name, options in {
        "parts_adapters": sharded | adapters | TRAINED_ONLY | dict(sharded_checkpoints=True),
        "resumed_adapters": sharded | adapters | last | dict(resume=folder / "parts_adapters" / "iter_2.pth"),
        "bfloat16_adapters": sharded | adapters | bfloat16 | last,
        "ddp_adapters": dict(world=2, kind="QuietRunner") | adapters,
        "ddp": dict(world=2),
        "sharded": sharded,
        "resumed": sharded | recompute | last | dict(resume=folder / "ddp" / "iter_2.pth"),
        "ddp_bfloat16": dict(world=2) | bfloat16,
        "sharded_bfloat16": sharded | bfloat16 | recompute,
        "ddp_averaged": dict(world=2) | averaged,
        "sharded_averaged": sharded | averaged,
        "resumed_averaged": sharded | averaged | last | dict(resume=folder / "ddp_averaged" / "iter_2.pth"),
        "parts": sharded | parts | TRAINED_ONLY,
        "resumed_parts": sharded | averaged | last | dict(resume=folder / "parts" / "iter_3.pth"),
    }.items():
        runner = run(folder / name, **options)
        records[name] = runner.record
        if name.startswith("sharded"):
            records[name] |= facts(runner.model)
    cfg = config(folder / "sync_bn", world=2, kind="ShardedRunner", sync_bn="torch")
    with pytest.raises(ConfigError, match="sync_bn is set"):
        ShardedRunner.from_cfg(cfg)
    records["parts"]["folders"] = sorted(path.name for path in (folder / "parts").glob("*.parts"))
    # a kill before the file is there: its parts are, and belong to none
    write_parts(dict(state_dict=runner.model.state_dict()), folder / "parts" / "iter_5.pth")
    runner = ShardedRunner.from_cfg(config(folder / "published", **sharded, **parts))
    runner.hooks[-1].published_keys = ["state_dict"]
    with pytest.raises(ConfigError, match="publishes nothing"):
        runner.train()
    # without training
    cfg = config(folder / "evaluated", **sharded, load_from=str(folder / "sharded" / "iter_4.pth"))
    runner = ShardedRunner.from_cfg(cfg)
    runner.record = dict(metrics=[])
    records["evaluated"] = runner.val()
    torch.save(records, folder / f"rank{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """The records of both ranks, the folder of their checkpoints, and the record of one process."""
    folder = tmp_path_factory.mktemp("sharding")
    cfg = tiny_deta()
    cfg.merge_from_dict(SMALLER)
    variant = {key: value for key, value in cfg.model.backbone.variant.items() if key != "_delete_"}
    torch.manual_seed(0)
    torch.save(PerceptionEncoder(variant).state_dict(), folder / "base.pt")
    start(two_processes, (free_port(), folder), number=2)
    ranks = [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in (0, 1)]
    return ranks, folder, run(folder / "alone", world=1).record


def losses(ranks, name):
    return torch.tensor([rank[name]["loss"] for rank in ranks]).mean(0)


def norms(ranks, name):
    assert ranks[0][name]["norm"] == ranks[1][name]["norm"]
    return torch.tensor(ranks[0][name]["norm"])


def scores(record):
    (metrics,) = record["metrics"]
    assert metrics["sum/images"] == 5
    return metrics["sum/scores"]


def read(folder, name, step):
    return torch.load(folder / name / f"iter_{step}.pth", weights_only=False)


@pytest.mark.parametrize("name", ["ddp", "sharded"])
def test_two_processes_equal_one(results, name):
    ranks, _, alone = results
    assert_close(losses(ranks, name), torch.tensor(alone["loss"]), **EQUAL)
    assert_close(norms(ranks, name), torch.tensor(alone["norm"]), **EQUAL)
    assert_close(scores(ranks[0][name]), scores(alone), **EQUAL)


def test_frozen_blocks(results):
    ranks, folder, _ = results
    assert_close(losses(ranks, "sharded_averaged"), losses(ranks, "ddp_averaged"), **EQUAL)
    assert_close(norms(ranks, "sharded_averaged"), norms(ranks, "ddp_averaged"), **EQUAL)
    start, end = (read(folder, "sharded_averaged", step)["state_dict"] for step in (2, 4))
    moved = {name for name in start if not torch.equal(start[name], end[name])}
    assert not any(name.startswith(("backbone.encoder.blocks.0", "backbone.encoder.blocks.1")) for name in moved)
    assert any(name.startswith("backbone.encoder.blocks.2") for name in moved)


def test_bfloat16(results):
    """Gathered in bfloat16, weights are rounded as autocast rounds them; their gradients are averaged in float32."""
    ranks, folder, _ = results
    assert_close(losses(ranks, "sharded_bfloat16"), losses(ranks, "ddp_bfloat16"), rtol=1e-2, atol=0)
    assert_close(norms(ranks, "sharded_bfloat16"), norms(ranks, "ddp_bfloat16"), rtol=5e-2, atol=0)
    assert_close(scores(ranks[0]["sharded_bfloat16"]), scores(ranks[0]["ddp_bfloat16"]), rtol=1e-2, atol=0)
    assert {x.dtype for x in read(folder, "sharded_bfloat16", 4)["state_dict"].values()} == {torch.float32}
    exponents = [rank["sharded"]["loss"] for rank in ranks]
    assert [rank["sharded_bfloat16"]["loss"] for rank in ranks] != exponents  # it was not float32 all along


def test_each_process_holds_half_and_gathers_block_by_block(results):
    ranks, _, _ = results
    blocks = {f"backbone.encoder.blocks.{i}" for i in range(3)}
    for name, linear in (("sharded", torch.float32), ("sharded_bfloat16", torch.bfloat16)):
        for rank in ranks:
            record = rank[name]
            assert record["local"]["mlp.fc1.weight"] == (2 * WIDTH, WIDTH)
            assert record["local"]["norm1.weight"] == (WIDTH // 2,)
            assert record["types"] == {"norm": torch.float32, "linear": linear}
            units = {""} | blocks
            if linear is torch.bfloat16:
                units |= {f"{block}.{part}" for block in blocks for part in ("attn", "mlp")}
            assert set(record["units"]) == units
        assert ranks[0][name]["whole"] == {torch.Tensor}
        assert ranks[1][name]["whole"] == {type(None)}  # only the first rank's memory has to hold the model


def describe(tree):
    """The form of a checkpoint: keys in their order, shapes, types and devices, and all values that are no tensors."""
    if isinstance(tree, torch.Tensor):
        assert type(tree) is torch.Tensor
        return tuple(tree.shape), tree.dtype, str(tree.device)
    if isinstance(tree, dict):
        return [(key, describe(value)) for key, value in tree.items()]
    return [describe(value) for value in tree] if isinstance(tree, list | tuple) else tree


@pytest.mark.parametrize("part", ["state_dict", "optimizer", "param_schedulers"])
def test_checkpoint_has_the_form_and_values_of_a_plain_run(results, part):
    _, folder, _ = results
    ours, plain = (read(folder, name, 4)[part] for name in ("sharded", "alone"))
    if part == "optimizer":  # groups of the layer-wise decay, with their rates, and the state of each parameter
        rates = {round(group["initial_lr"] / 1e-3, 6) for group in plain["param_groups"]}
        assert rates == {0.5**k for k in range(5)}
        pairs = zip(ours["state"].values(), plain["state"].values(), strict=True)
        for mine, theirs in pairs:
            for key in theirs:
                assert_close(mine[key], theirs[key], rtol=1e-3, atol=1e-6)
    elif part == "state_dict":
        for name in plain:  # Adam's first steps follow the sign of a gradient, however small
            assert_close(ours[name], plain[name], rtol=1e-3, atol=1e-4)
    assert describe(ours) == describe(plain)


def test_sharded_resumes_a_plain_run(results):
    """Recomputing what the plain run kept."""
    ranks, _, alone = results
    assert_close(losses(ranks, "resumed"), torch.tensor(alone["loss"][2:]), **EQUAL)
    assert_close(norms(ranks, "resumed"), torch.tensor(alone["norm"][2:]), **EQUAL)


def test_one_process_resumes_a_sharded_run(results, tmp_path):
    ranks, folder, _ = results
    record = run(tmp_path / "continued", world=1, resume=folder / "sharded" / "iter_2.pth").record
    assert_close(torch.tensor(record["loss"]), losses(ranks, "sharded")[2:], **EQUAL)
    assert_close(torch.tensor(record["norm"]), norms(ranks, "sharded")[2:], **EQUAL)


def test_evaluation_alone_is_not_sharded(results):
    ranks, _, alone = results
    assert_close(ranks[0]["evaluated"]["sum/scores"], scores(alone), **EQUAL)


def test_one_process_needs_no_sharding(results, tmp_path):
    _, _, alone = results
    record = run(tmp_path / "one", world=1, kind="ShardedRunner").record
    assert record["loss"] == alone["loss"]


def equal_files(ours, theirs):
    assert ours.keys() == theirs.keys()
    for part in ("state_dict", "ema_state_dict"):
        assert describe(ours[part]) == describe(theirs[part])
        for name, value in theirs[part].items():
            assert_close(ours[part][name], value, rtol=1e-6, atol=1e-6)
    assert describe(ours["optimizer"]) == describe(theirs["optimizer"])
    for mine, other in zip(ours["optimizer"]["state"].values(), theirs["optimizer"]["state"].values(), strict=True):
        assert_close(mine["momentum_buffer"], other["momentum_buffer"], **EQUAL)


def test_averages_equal_those_of_replicated_training(results):
    """Also what is evaluated, which is the average, and the weights that training goes on with."""
    ranks, folder, _ = results
    for step in (2, 4):
        equal_files(read(folder, "sharded_averaged", step), read(folder, "ddp_averaged", step))
    saved = read(folder, "sharded_averaged", 4)
    distances = [(saved["state_dict"][k] - saved["ema_state_dict"][f"module.{k}"]).norm() for k in saved["state_dict"]]
    assert max(distances) > 1e-3  # an average it is
    assert_close(scores(ranks[0]["sharded_averaged"]), scores(ranks[0]["ddp_averaged"]), **EQUAL)


def test_averages_resume_both_ways(results, tmp_path):
    _, folder, _ = results
    expected = read(folder, "ddp_averaged", 4)
    equal_files(read(folder, "resumed_averaged", 4), expected)
    run(tmp_path / "continued", world=1, resume=folder / "sharded_averaged" / "iter_2.pth", **AVERAGED, **FROZEN)
    equal_files(read(tmp_path, "continued", 4), expected)


def test_parts_make_the_file_of_a_plain_run(results, tmp_path):
    _, folder, _ = results
    part = str(folder / "parts" / "iter_4.pth")
    assert find_checkpoint(part, str(folder / "parts")) == part  # what --resume asks
    consolidate(folder / "parts" / "iter_4.pth", tmp_path / "whole.pth")
    whole = torch.load(tmp_path / "whole.pth", weights_only=False)
    equal_files(whole, read(folder, "ddp_averaged", 4))
    assert whole["state_dict"]._metadata == read(folder, "ddp_averaged", 4)["state_dict"]._metadata
    with pytest.raises(CheckpointError, match="it contains its weights"):
        consolidate(tmp_path / "whole.pth", tmp_path / "again.pth")
    (tmp_path / "alone.pth").write_bytes((folder / "parts" / "iter_4.pth").read_bytes())
    with pytest.raises(CheckpointError, match="keep the two together"):
        consolidate(tmp_path / "alone.pth", tmp_path / "again.pth")


@pytest.mark.parametrize("world", [1, 2])
def test_parts_are_resumed(results, tmp_path, world):
    _, folder, _ = results
    if world == 1:
        options = dict(world=1, kind="ShardedRunner", resume=folder / "parts" / "iter_3.pth")
        run(tmp_path / "resumed_parts", **options, **AVERAGED, **FROZEN)
    equal_files(read(tmp_path if world == 1 else folder, "resumed_parts", 4), read(folder, "ddp_averaged", 4))


def test_parts_are_kept_and_removed_with_their_files(results):
    """What a kill left without its file changes nothing."""
    ranks, folder, _ = results
    files = sorted(path.name for path in (folder / "parts").glob("*.pth"))
    parts = ranks[0]["parts"]["folders"]
    assert files == ["iter_3.pth", "iter_4.pth"]
    assert [name.rsplit(".", 2)[0] for name in parts] == files
    assert len(list((folder / "parts").glob("iter_5.pth.*.parts"))) == 1
    assert (folder / "parts" / "last_checkpoint").read_text() == str(folder / "parts" / "iter_4.pth")
    whole = (folder / "sharded_averaged" / "iter_4.pth").stat().st_size
    assert (folder / "parts" / "iter_4.pth").stat().st_size < 0.6 * whole
    stored = dcp.FileSystemReader(folder / "parts" / parts[1]).read_metadata().state_dict_metadata
    for part in ("state_dict['", "optimizer['state'][0]['momentum_buffer", "ema_state_dict['module."):
        name = next(name for name in stored if name.startswith(part))
        assert len(stored[name].chunks) == 2  # each process wrote a half


def test_adapters_are_saved_without_their_base_and_resume(results, tmp_path):
    """Sharded, replicated, resumed, in parts, with an average; either kind of runner resumes the other's."""
    ranks, folder, _ = results
    assert_close(losses(ranks, "parts_adapters"), losses(ranks, "ddp_adapters"), **EQUAL)
    assert_close(losses(ranks, "bfloat16_adapters"), losses(ranks, "ddp_adapters"), rtol=3e-2, atol=0)
    expected = read(folder, "ddp_adapters", 4)
    assert not any(name.endswith("blocks.0.mlp.fc1.weight") for name in expected["state_dict"])
    assert any(name.endswith("blocks.0.mlp.fc1.lora_magnitude") for name in expected["state_dict"])
    equal_files(read(folder, "resumed_adapters", 4), expected)
    assert read(folder, "resumed_adapters", 4)["meta"]["lora"] == expected["meta"]["lora"]
    consolidate(folder / "parts_adapters" / "iter_4.pth", tmp_path / "whole.pth")
    equal_files(torch.load(tmp_path / "whole.pth", weights_only=False), expected)
    adapters = AVERAGED | {
        "model.backbone.lora": dict(rank=3, dora=True),
        "model.backbone.init_cfg": dict(_delete_=True, type="Pretrained", checkpoint=str(folder / "base.pt")),
    }
    consolidate(folder / "parts_adapters" / "iter_2.pth", tmp_path / "half.pth")
    run(tmp_path / "continued", world=1, kind="QuietRunner", resume=tmp_path / "half.pth", **adapters)
    equal_files(read(tmp_path, "continued", 4), expected)


@pytest.mark.parametrize(
    ("micro_batch", "shardable", "said"),
    [
        (1, True, "micro_batch keeps the gradients of the complete encoder on every GPU"),
        (None, False, "ShardedRunner does not shard the states of SimpleNamespace; set optim_wrapper.optimizer.type"),
    ],
)
def test_micro_batches_and_states_of_8_bits_are_refused(micro_batch, shardable, said):
    runner = SimpleNamespace(model=PerceptionEncoder(TINY, micro_batch=micro_batch), cfg={})
    wrapper = SimpleNamespace(optimizer=SimpleNamespace(shardable=shardable))
    with pytest.raises(ConfigError, match=said):
        ShardedRunner._shard(runner, wrapper)
