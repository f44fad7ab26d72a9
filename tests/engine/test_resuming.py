"""Resuming finds what is there, continues with the samples that were not seen, and never starts over in silence."""

import os
import re
import shutil
import signal

import pytest
import torch

pytest.importorskip("mmengine")
from helpers.tiny_run import tiny_config
from mmengine.hooks import Hook
from mmengine.registry import HOOKS

from pe_spatial.encoder.files import CheckpointError
from pe_spatial.engine.checkpoints import find_checkpoint
from pe_spatial.engine.fault_tolerance import StopOnSignalHook
from pe_spatial.engine.training import prepare_training, train
from pe_spatial.errors import TrainingError


def run(folder, *, stop_after=None, option=None, batch_size=2, **changes):
    """Train in `folder`, with --resume OPTION; a signal stops the run after step `stop_after`."""
    cfg = tiny_config(folder, **{"train_dataloader.batch_size": batch_size, **changes})
    prepare_training(cfg, resume=option)
    cfg.custom_hooks = [*cfg.custom_hooks, dict(type="Watch", stop_after=stop_after)]
    try:
        return train(cfg)
    except SystemExit:
        return None


@HOOKS.register_module()
class Watch(Hook):
    images = []  # noqa: RUF012

    def __init__(self, stop_after):
        self.stop_after = stop_after

    def after_train_iter(self, runner, *, data_batch, **_):
        Watch.images.append([sample.img_path for sample in data_batch["data_samples"]])
        if runner.iter + 1 == self.stop_after:
            stop = next(hook for hook in runner.hooks if isinstance(hook, StopOnSignalHook))
            stop._receive(signal.SIGTERM, None)


@pytest.fixture(autouse=True)
def fast(monkeypatch):
    """Formatting the config and waiting for the disk take most of the time of a run this small."""
    monkeypatch.setattr("mmengine.config.Config.pretty_text", "", raising=True)
    monkeypatch.setattr(os, "fsync", lambda _: None)


@pytest.fixture
def watch():
    Watch.images = []
    return Watch


@pytest.fixture
def warned(monkeypatch):
    """The warnings of runs."""
    lines = []
    monkeypatch.setattr("mmengine.logging.MMLogger.warning", lambda _, text, *__: lines.append(text))
    return lines


@pytest.fixture
def trained(tmp_path):
    """The folder of a run that kept iter_4.pth, iter_8.pth and iter_10.pth."""
    run(tmp_path / "a", **{"default_hooks.checkpoint.max_keep_ckpts": -1})
    return tmp_path / "a"


def test_a_moved_folder(trained):
    """D1: last_checkpoint has the path at which the file was written."""
    moved = trained.rename(trained.with_name("b"))
    assert find_checkpoint("auto", str(moved)) == str(moved / "iter_10.pth")
    (moved / "last_checkpoint").write_text("C:\\runs\\a\\iter_8.pth\n")  # written on Windows, with a line end
    assert find_checkpoint("auto", str(moved)) == str(moved / "iter_8.pth")


def test_checkpoints_without_the_text_file(trained):
    """D2: copied files have any time stamps; the one with most steps is the latest."""
    (trained / "last_checkpoint").unlink()
    for step, stamp in ((4, 30), (8, 20), (10, 10)):
        os.utime(trained / f"iter_{step}.pth", (stamp, stamp))
    assert find_checkpoint("auto", str(trained)) == str(trained / "iter_10.pth")
    (trained / "iter_10.pth").write_bytes((trained / "iter_10.pth").read_bytes()[:-100])
    assert find_checkpoint("auto", str(trained)) == str(trained / "iter_8.pth")


@pytest.mark.parametrize("content", ["", "/gone/iter_99.pth"])
def test_a_useless_text_file(trained, content):
    (trained / "last_checkpoint").write_text(content)
    assert find_checkpoint("auto", str(trained)) == str(trained / "iter_10.pth")


def test_a_renamed_checkpoint(trained):
    (trained / "last_checkpoint").unlink()
    (trained / "iter_10.pth").rename(trained / "mine.pth")
    assert find_checkpoint("auto", str(trained)) == str(trained / "mine.pth")


def test_a_folder_instead_of_a_file(trained, tmp_path):
    assert find_checkpoint(str(trained), str(tmp_path / "new")) == str(trained / "iter_10.pth")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="empty has no checkpoint to resume from"):
        find_checkpoint(str(tmp_path / "empty"), str(tmp_path / "new"))


def test_a_folder_with_weights_alone_is_refused(trained, tmp_path):
    """mmengine would resume them with a new optimizer, or start over."""
    (tmp_path / "b").mkdir()
    state = torch.load(trained / "iter_10.pth", weights_only=False)
    torch.save({key: value for key, value in state.items() if key != "optimizer"}, tmp_path / "b" / "best_x.pth")
    for source in ("auto", str(tmp_path / "b" / "best_x.pth")):
        with pytest.raises(CheckpointError, match=r"best_x\.pth holds no state of a run.*load_from"):
            find_checkpoint(source, str(tmp_path / "b"))


def test_a_run_without_a_checkpoint_starts_over_and_says_so(trained, log):
    assert find_checkpoint("auto", str(trained.with_name("new"))) is None
    assert not log
    for path in trained.glob("*.pth"):
        path.unlink()
    assert find_checkpoint("auto", str(trained)) is None
    assert "starts from the beginning" in log[-1][0]
    assert log[-1][1] >= 30


def test_resume_true_in_the_config(trained, watch):
    """Without the option of the command line; the folder was moved."""
    moved = trained.rename(trained.with_name("b"))
    watch.images.clear()
    runner = run(moved, option=None, **{"train_cfg.max_iters": 12, "resume": True})
    assert (len(watch.images), runner.iter) == (2, 12)


# D3: an epoch of 20 images, of which a checkpoint has seen `stop` batches


@pytest.fixture(scope="module")
def in_epochs(tmp_path_factory):
    """The images of a run of two epochs in order, and the folders of runs that stopped after 10 and 14 steps of 2."""
    folder = tmp_path_factory.mktemp("epochs")
    Watch.images = []
    run(folder / "whole", epochs=True)
    whole = [name for batch in Watch.images for name in batch]
    for stop in (10, 14):
        run(folder / str(stop), epochs=True, stop_after=stop)
    return whole, {stop: folder / str(stop) for stop in (10, 14)}


@pytest.mark.parametrize("batch_size", [1, 5, 8])
@pytest.mark.parametrize("stop", [10, 14])
def test_epochs_resume_by_samples(tmp_path, watch, in_epochs, stop, batch_size):
    whole, stopped = in_epochs
    shutil.copytree(stopped[stop], tmp_path / "part")
    runner = run(tmp_path / "part", epochs=True, option="auto", batch_size=batch_size)
    repeated = 2 * stop % 20 % batch_size  # images of a batch that was begun
    assert [name for batch in watch.images for name in batch] == whole[2 * stop - repeated :]
    assert runner.iter == runner.max_iters == 2 * len(runner.train_dataloader)


def test_iterations_resume_by_samples(tmp_path, watch):
    """Twice: the second checkpoint has seen steps of two sizes."""
    run(tmp_path / "whole", **{"train_cfg.max_iters": 20})
    whole = [name for batch in watch.images for name in batch]
    watch.images.clear()
    run(tmp_path / "part", stop_after=4)
    run(tmp_path / "part", stop_after=6, option="auto", batch_size=4)
    run(tmp_path / "part", option="auto", batch_size=8, **{"train_cfg.max_iters": 7})
    assert [len(batch) for batch in watch.images] == [2] * 4 + [4] * 2 + [8]
    assert [name for batch in watch.images for name in batch] == whole[:24]


def test_another_number_of_images(tmp_path, watch):
    """An epoch of ten images more: the second epoch begins with its first image."""
    run(tmp_path / "part", epochs=True, stop_after=10)
    watch.images.clear()
    runner = run(tmp_path / "part", epochs=True, option="auto", **{"train_dataloader.dataset.indices": 10})
    assert len({name for batch in watch.images for name in batch}) == 10
    assert runner.iter == 10


def test_a_schedule_in_steps_of_epochs_is_refused(tmp_path):
    """Its steps are counted in those of the old batch size."""
    schedule = [dict(type="CosineAnnealingLR", T_max=2, by_epoch=True, begin=0, end=2, convert_to_iter_based=True)]
    run(tmp_path, epochs=True, stop_after=10, param_scheduler=schedule)
    with pytest.raises(TrainingError, match=r"convert_to_iter_based.*2 samples in a step, now 4.*batch_size"):
        run(tmp_path, epochs=True, option="auto", batch_size=4, param_scheduler=schedule)
    assert run(tmp_path, epochs=True, option="auto", param_scheduler=schedule).iter == 20


# what a resumed run keeps of its checkpoint is said


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"optim_wrapper.optimizer.lr": 0.2}, r"optim_wrapper\.optimizer\.lr=0\.2 is ignored: .* 0\.1.*load_from"),
        ({"optim_wrapper.optimizer.weight_decay": 0.5}, r"weight_decay=0\.5 is ignored"),
        ({"optim_wrapper.optimizer.betas": (0.8, 0.9)}, r"betas=\(0\.8, 0\.9\) is ignored"),
        ({"param_scheduler": [dict(type="MultiStepLR", milestones=[9], by_epoch=False)]}, r"milestones"),
    ],
)
def test_options_that_a_resumed_run_ignores_are_said(tmp_path, warned, changes, said):
    schedule = [dict(type="MultiStepLR", milestones=[7], by_epoch=False)]
    run(tmp_path, stop_after=4, param_scheduler=schedule)
    warned.clear()
    run(tmp_path, option="auto", **{"param_scheduler": schedule, **changes})
    assert any(re.search(said, line) for line in warned), warned


def test_the_same_options_say_nothing(tmp_path, warned):
    schedule = [dict(type="MultiStepLR", milestones=[7], by_epoch=False)]
    run(tmp_path, stop_after=4, param_scheduler=schedule)
    warned.clear()
    run(tmp_path, option="auto", param_scheduler=schedule)
    assert not [line for line in warned if "ignored" in line]


def test_another_model_is_refused(trained):
    """D9: other classes, another resolution or variant."""
    with pytest.raises(CheckpointError, match=r"iter_10\.pth does not match the model of this config"):
        run(trained, option="auto", **{"model.width": 5})
