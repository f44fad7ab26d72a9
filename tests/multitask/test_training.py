"""Heads that train together: the losses of each model alone, one frozen encoder, and a checkpoint for each task."""

from itertools import islice

import numpy as np
import pytest
import torch

pytest.importorskip("mmdet")
pytest.importorskip("mmseg")
pytest.importorskip("sam2")
from helpers.repository import REPO
from mmengine.config import Config
from mmengine.optim import OptimWrapper
from mmengine.registry import DATASETS, MODELS, DefaultScope

import pe_spatial
from pe_spatial.engine.determinism import make_deterministic
from pe_spatial.engine.runner import build_runner
from pe_spatial.errors import ConfigError
from pe_spatial.multitask import training
from pe_spatial.synthetic import write_dataset

pytestmark = pytest.mark.slow
SIZE = 192


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return write_dataset(
        tmp_path_factory.mktemp("world") / "world", scenes=dict(train=2, val=1), frames_per_scene=3, size=(SIZE, SIZE)
    )


@pytest.fixture(scope="module")
def tasks(world):
    """The recipes of the three tasks on the synthetic world, small."""
    root = "train_dataloader.dataset.data_root"
    frozen = {"model.backbone.drop_path_rate": 0.0, "model.backbone.frozen_stages": 5}
    detection = {root: f"{world}/", "train_dataloader.batch_size": 2, **frozen}
    depth = {root: f"{world}/", "train_dataloader.batch_size": 3}
    tracker = dict(grid=12, d_model=32, mem_dim=8, layers=1, feedforward=32)
    tracking = {f"model.tracker.{name}": value for name, value in tracker.items()}
    tracking |= {root: f"{world}/", "train_dataloader.batch_size": 1}
    tracking |= {f"train_dataloader.dataset.pipeline.{k}": v for k, v in {"0.num_frames": 2, "2.size": 192}.items()}
    projects = REPO / "projects"
    return dict(
        detection=dict(config="pe_spatial::pe_demo_cascade_synthetic.py", options=detection),
        depth=dict(config=str(projects / "nyu_depth" / "synthetic_dpt.py"), options=depth, weight=2.0),
        tracking=dict(config=str(projects / "video_tracking" / "synthetic.py"), options=tracking),
    )


@pytest.fixture(scope="module")
def model(tasks):
    torch.manual_seed(0)
    model = training.MultiTaskModel(tasks)
    model.init_weights()
    return model


@pytest.fixture(scope="module")
def batch(tasks):
    dataset = training.MultiTaskDataset(tasks)
    return training.only_item([dataset[next(iter(training.MultiTaskSampler(dataset, seed=0)))]])


def test_losses_are_those_of_the_models_alone_times_their_weights(model, tasks, batch):
    model.train()
    assert not model.encoder.training
    states = {task: model.task_state(task) for task in tasks}
    for task, options in tasks.items():
        cfg = training.task_config(**options)
        with DefaultScope.overwrite_default_scope(cfg.get("default_scope", "mmengine")):
            alone = MODELS.build(cfg.model)
        alone.load_state_dict(states[task])
        alone.train()
        torch.manual_seed(1)
        found = model.task_losses(task, batch[task])
        torch.manual_seed(1)
        half = cfg.optim_wrapper.type == "BFloat16OptimWrapper"
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            expected = alone._run_forward(alone.data_preprocessor(batch[task], True), mode="loss")
        weight = options.get("weight", 1.0)
        for name, value in expected.items():
            ours = found[name]
            if isinstance(value, list):
                ours, value = sum(ours), sum(value)
            factor = weight if "loss" in name else 1.0
            torch.testing.assert_close(ours, factor * value, msg=lambda text, name=name: f"{name}: {text}")


def test_a_step_trains_every_head_and_leaves_the_encoder(model, tasks, batch):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    parameters = [p for p in model.parameters() if p.requires_grad]
    wrapper = OptimWrapper(torch.optim.SGD(parameters, lr=1e-3))
    logs = model.train_step(batch, wrapper)
    assert torch.isfinite(logs["loss"])
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert not [name for name in changed if name.startswith("encoder.")]
    assert {name.split(".")[1] for name in changed} == set(tasks)
    assert [name for name, _ in model.named_parameters() if name.startswith("encoder.")]


def test_a_tuned_encoder_gets_the_gradients_of_all_tasks(tasks, batch):
    model = training.MultiTaskModel(tasks, frozen=False)
    model.init_weights()
    model.train()
    weight = model.encoder.blocks[0].attn.qkv.weight
    gradients = []
    for task in ("detection", "depth"):
        losses = {k: v for k, v in model(**batch).items() if k.startswith(task)}
        gradients.append(torch.autograd.grad(model.parse_losses(losses)[0], weight)[0])
    assert all(g.abs().max() > 0 for g in gradients)
    encoder = dict(optimizer=dict(type="SGD", lr=1e-3), clip_grad=dict(max_norm=0.1))
    wrappers = training.TaskOptimWrapperConstructor(dict(encoder=encoder))(model)
    before = weight.detach().clone()
    model.train_step(batch, wrappers)
    assert not torch.equal(weight, before)
    assert {*wrappers.keys()} == {*tasks, "encoder"}


def test_a_run_trains_each_head_as_its_own_training_does(tasks, tmp_path):
    """To the last bit: the same first weights, batches, augmentation, precision, optimizer and limit of gradients."""
    tasks = {task: {key: value for key, value in options.items() if key != "weight"} for task, options in tasks.items()}
    cfg = Config.fromfile(REPO / "configs" / "pe_spatial_multitask.py")
    cfg.train_dataloader.update(num_workers=0, persistent_workers=False)
    cfg.model.tasks = cfg.train_dataloader.dataset.tasks = tasks
    run_shortly(cfg, tmp_path / "run")
    paths = [tmp_path / "run" / f"{task}.pth" for task in tasks]
    for path, options in zip(paths, tasks.values(), strict=True):
        alone = run_shortly(training.task_config(**options), tmp_path / path.stem).model.state_dict()
        ours = torch.load(path, weights_only=False)["state_dict"]
        different = [name for name, value in alone.items() if not torch.equal(ours[name], value)]
        assert ours.keys() == alone.keys()
        assert not different, path
    together = pe_spatial.MultiTask(paths)
    assert together.tasks == ("detection", "depth", "tracking")
    assert len(together.shared.groups) == 1
    rgb = np.random.default_rng(0).integers(0, 255, (192, 192, 3), np.uint8)
    results = pe_spatial.MultiTask(paths[:2])(rgb)
    assert results["detection"].class_names == ("sphere", "box", "cylinder", "cone", "torus")
    assert np.array_equal(results["depth"].depth, pe_spatial.load(paths[1])(rgb).depth)


def run_shortly(cfg, work_dir):
    """Train two steps, deterministically and without validation."""
    cfg.merge_from_dict({"work_dir": str(work_dir), "train_cfg.max_iters": 2, "train_cfg.val_interval": 3})
    for split in ("val", "test"):
        cfg.update({f"{split}_{part}": None for part in ("cfg", "dataloader", "evaluator")})
    cfg.param_scheduler = None
    make_deterministic(cfg, 0)
    runner = build_runner(cfg)
    runner.train()
    return runner


def test_a_resumed_run_draws_what_follows(tasks):
    samplers = [training.MultiTaskSampler(training.MultiTaskDataset(tasks), seed=3) for _ in range(2)]
    samplers[1].skip(2)
    assert list(islice(samplers[0], 2, 5)) == list(islice(samplers[1], 3))


def test_what_cannot_train_together_is_one_sentence(tasks):
    with pytest.raises(ConfigError, match="tasks has 1 of them; give at least two"):
        training.MultiTaskModel(dict(depth=tasks["depth"]))
    with pytest.raises(ConfigError, match=r"the weight of .*synthetic_dpt.py is 0"):
        training.MultiTaskModel({**tasks, "depth": {**tasks["depth"], "weight": 0}})
    windows = {**tasks["depth"]["options"], "model.backbone.window_size": 6, "model.backbone.global_attn_indexes": [4]}
    with pytest.raises(ConfigError, match="encoders of detection and depth have different geometries"):
        training.MultiTaskModel({**tasks, "depth": {**tasks["depth"], "options": windows}})
    with pytest.raises(ConfigError, match="optim_wrapper has type, optimizer; heads that train together"):
        training.TaskOptimWrapperConstructor(dict(type="OptimWrapper", optimizer=dict(type="AdamW"), encoder={}))
    counts = {**tasks["depth"]["options"], "optim_wrapper.accumulative_counts": 2}
    accumulating = training.MultiTaskModel({**tasks, "depth": {**tasks["depth"], "options": counts}})
    with pytest.raises(ConfigError, match="of depth is BFloat16OptimWrapper with accumulative_counts=2"):
        training.TaskOptimWrapperConstructor(dict(encoder=dict(optimizer=dict(type="SGD", lr=1.0))))(accumulating)
    with pytest.raises(ConfigError, match="the batch size is 2"):
        training.only_item([1, 2])
    with pytest.raises(ConfigError, match="only trains"):
        training.MultiTaskModel.forward(None, mode="predict")
    assert DATASETS.get("MultiTaskDataset") is training.MultiTaskDataset
