"""Heads that train together: the losses of each model alone, one frozen encoder, and a checkpoint for each task."""

from types import SimpleNamespace

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
    detection = {root: f"{world}/", "train_dataloader.batch_size": 2, "model.backbone.drop_path_rate": 0.0}
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
    np.random.seed(0)
    return training.only_item([training.MultiTaskDataset(tasks)[0]])


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


def test_gradients_are_limited_task_by_task(model, tasks, batch):
    """With SGD at a rate of 1 a step is as long as its gradient."""
    limits = dict(zip(tasks, (0.5, 0.01, 0.002), strict=True))
    for task, limit in limits.items():
        model.configs[task].optim_wrapper.clip_grad = dict(max_norm=limit)
    parameters = [p for p in model.parameters() if p.requires_grad]
    wrapper = OptimWrapper(torch.optim.SGD(parameters, lr=1.0))
    training.ClipTasks(encoder=dict(max_norm=1.0)).before_train(SimpleNamespace(model=model, optim_wrapper=wrapper))
    before = {name: value.detach().clone() for name, value in model.models.named_parameters()}
    model.train_step(batch, wrapper)
    for task, limit in limits.items():
        steps = [p.detach() - before[f"{task}.{name}"] for name, p in model.models[task].named_parameters()]
        assert torch.cat([step.flatten() for step in steps]).norm() == pytest.approx(limit, rel=1e-3)


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


def test_a_run_writes_a_checkpoint_for_each_task_that_share_their_encoder(tasks, tmp_path):
    cfg = Config.fromfile(REPO / "configs" / "pe_spatial_multitask.py")
    cfg.merge_from_dict({
        "train_dataloader.num_workers": 0, "train_dataloader.persistent_workers": False,
        "train_cfg.max_iters": 2, "train_cfg.val_interval": 3, "work_dir": str(tmp_path / "run"),
    })  # fmt: skip
    cfg.model.tasks = tasks
    cfg.train_dataloader.dataset.tasks = tasks
    build_runner(cfg).train()
    paths = [tmp_path / "run" / f"{task}.pth" for task in tasks]
    together = pe_spatial.MultiTask(paths)
    assert together.tasks == ("detection", "depth", "tracking")
    assert len(together.shared.groups) == 1
    rgb = np.random.default_rng(0).integers(0, 255, (192, 192, 3), np.uint8)
    results = pe_spatial.MultiTask(paths[:2])(rgb)
    assert results["detection"].class_names == ("sphere", "box", "cylinder", "cone", "torus")
    assert np.array_equal(results["depth"].depth, pe_spatial.load(paths[1])(rgb).depth)


def test_what_cannot_train_together_is_one_sentence(tasks):
    with pytest.raises(ConfigError, match="tasks has 1 of them; give at least two"):
        training.MultiTaskModel(dict(depth=tasks["depth"]))
    with pytest.raises(ConfigError, match=r"the weight of .*synthetic_dpt.py is 0"):
        training.MultiTaskModel({**tasks, "depth": {**tasks["depth"], "weight": 0}})
    windows = {**tasks["depth"]["options"], "model.backbone.window_size": 6, "model.backbone.global_attn_indexes": [4]}
    with pytest.raises(ConfigError, match="encoders of detection and depth have different geometries"):
        training.MultiTaskModel({**tasks, "depth": {**tasks["depth"], "options": windows}})
    with pytest.raises(ConfigError, match="the batch size is 2"):
        training.only_item([1, 2])
    with pytest.raises(ConfigError, match="only trains"):
        training.MultiTaskModel.forward(None, mode="predict")
    assert DATASETS.get("MultiTaskDataset") is training.MultiTaskDataset
