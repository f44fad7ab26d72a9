"""Options of data loading that belong together stay together; workers that die are explained."""

import multiprocessing
import os

import pytest

pytest.importorskip("mmengine")
from helpers.tiny_run import Jitter, tiny_config
from mmengine.config import Config
from mmengine.registry import TRANSFORMS

from pe_spatial.engine.runner import build_runner
from pe_spatial.engine.training import explain_failure, prepare_training, train
from pe_spatial.errors import TrainingError


@pytest.fixture(autouse=True)
def fast(monkeypatch):
    """Formatting the config takes most of the time of a run this small."""
    monkeypatch.setattr("mmengine.config.Config.pretty_text", "", raising=True)


WORKERS = dict(persistent_workers=True, prefetch_factor=4, timeout=30, multiprocessing_context="fork", pin_memory=False)


@pytest.mark.parametrize("name", WORKERS)
@pytest.mark.parametrize("loader", ["train_dataloader", "test_dataloader"])
def test_no_workers(tmp_path, loader, name):
    """C3: num_workers=0 for debugging, with the options of workers that the config has."""
    cfg = tiny_config(tmp_path, **{"train_cfg.max_iters": 1})
    cfg.train_dataloader[name] = WORKERS[name]
    if loader == "test_dataloader":
        sampler = dict(type="DefaultSampler", shuffle=False)
        cfg.test_dataloader = dict(cfg.train_dataloader, sampler=sampler)
        cfg.update(test_cfg=dict(), test_evaluator=dict(type="DumpResults", out_file_path=str(tmp_path / "o.pkl")))
        cfg.train_dataloader = cfg.train_cfg = cfg.optim_wrapper = None
        loop = build_runner(cfg).test_loop
        assert len(list(loop.dataloader)) == 10
    else:
        prepare_training(cfg)
        assert train(cfg).iter == 1


def test_workers_keep_their_options(tmp_path):
    cfg = tiny_config(tmp_path, workers=1, **{"train_dataloader.persistent_workers": True, "train_cfg.max_iters": 2})
    prepare_training(cfg)
    runner = train(cfg)
    assert runner.train_dataloader.persistent_workers
    assert runner.train_dataloader.timeout == 600


@pytest.mark.parametrize(
    ("batch_size", "counts", "lr", "by_option"),
    [(8, 1, 0.1, True), (2, 4, 0.1, True), (2, 4, 0.1, False), (4, 8, 0.4, True)],
)
def test_auto_scale_lr_counts_accumulation(tmp_path, batch_size, counts, lr, by_option):
    """C7: the learning rate belongs to the images of an optimizer's step; 8 here."""
    changes = {"train_dataloader.batch_size": batch_size, "auto_scale_lr.base_batch_size": 8, "train_cfg.max_iters": 1}
    cfg = tiny_config(tmp_path, **changes, **{"optim_wrapper.accumulative_counts": counts})
    cfg.auto_scale_lr.enable = not by_option
    prepare_training(cfg, scale_lr=by_option)
    assert train(cfg).optim_wrapper.optimizer.param_groups[0]["lr"] == pytest.approx(lr)


@TRANSFORMS.register_module()
class Dies(Jitter):
    def __call__(self, results):
        if multiprocessing.current_process().name != "MainProcess":
            os.kill(os.getpid(), 9)
        return super().__call__(results)


def test_a_killed_worker_is_explained(tmp_path):
    """D8: by the kernel, for want of memory or of shared memory."""
    cfg = tiny_config(tmp_path, workers=1)
    cfg.train_dataloader.dataset.pipeline = [dict(type="Dies")]
    prepare_training(cfg)
    with pytest.raises(TrainingError, match=r"data worker.*killed.*memory.*/dev/shm.*train_dataloader\.num_workers"):
        train(cfg)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("DataLoader worker (pid(s) 12, 13) exited unexpectedly", "killed"),
        ("DataLoader worker (pid 12) is killed by signal: Bus error. It is possible ...", "/dev/shm"),
        ("unable to write to file </torch_12_34_0>: No space left on device (28)", "/dev/shm"),
        ("unable to open shared memory object </torch_12>: Too many open files (24)", "ulimit -n"),
        ("received 0 items of ancdata", "ulimit -n"),
        ("Too many open files. Communication with the workers is no longer possible.", "ulimit -n"),
    ],
)  # fmt: skip
def test_words_of_torch_about_workers(text, named):
    cfg = Config(dict(model=dict(), train_dataloader=dict(batch_size=2, num_workers=4)))
    explained = explain_failure(cfg, 3, RuntimeError(text))
    assert isinstance(explained, TrainingError)
    assert named in str(explained)
    assert "num_workers (now 4)" in str(explained)


@pytest.mark.parametrize("method", ["spawn"])
def test_workers_by_spawn(tmp_path, method):
    """K4: as on macOS and Windows, everything that a worker gets must pickle."""
    before = multiprocessing.get_start_method(allow_none=True)
    cfg = tiny_config(tmp_path, workers=1, **{"train_cfg.max_iters": 1})
    cfg.env_cfg = dict(mp_cfg=dict(mp_start_method=method))
    prepare_training(cfg, deterministic=True)
    try:
        assert train(cfg).iter == 1
    finally:
        multiprocessing.set_start_method(before, force=True)
