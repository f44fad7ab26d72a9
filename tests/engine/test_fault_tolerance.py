"""Runs that are killed, stopped, or fed nonsense."""

import logging
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import ClassVar

import pytest
import torch

pytest.importorskip("mmengine")
from helpers.repository import REPO
from helpers.tiny_run import build, losses, tiny_config
from mmengine.evaluator import BaseMetric
from mmengine.hooks import Hook
from mmengine.logging import MMLogger
from mmengine.registry import METRICS
from mmengine.runner import find_latest_checkpoint
from torch.testing import assert_close

from pe_spatial.encoder.files import CheckpointError
from pe_spatial.engine.checkpoints import AtomicLocalBackend, check_complete, find_checkpoint
from pe_spatial.engine.fault_tolerance import EXIT_RETRY
from pe_spatial.errors import TrainingError


def weights(path):
    return torch.load(path, weights_only=False)["state_dict"]


class SignalAt(Hook):
    def __init__(self, step, number):
        self.step, self.number = step, number

    def after_train_iter(self, runner, **_):
        if runner.iter + 1 == self.step:
            processes = [*multiprocessing.active_children(), multiprocessing.current_process()]
            subprocess.run(["kill", f"-{int(self.number)}", *(str(one.pid) for one in processes)], check=True)
            time.sleep(0.2)


@pytest.mark.parametrize(("epochs", "workers"), [(False, 0), (True, 0), (False, 2), (True, 2)])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_stopped_run_goes_on_where_it_was(tmp_path, epochs, workers, number):
    """Also in the middle of an epoch: the same samples, as without the stop. All processes get the signal."""
    whole = build(tiny_config(tmp_path / "whole", epochs=epochs))
    drawn, seen = [], []
    watch(whole, drawn)
    whole.train()
    stopped = build(tiny_config(tmp_path / "part", epochs=epochs, workers=workers))
    watch(stopped, seen)
    stopped.register_hook(SignalAt(6, number))
    with pytest.raises(SystemExit) as end:
        stopped.train()
    assert end.value.code == EXIT_RETRY == 75
    assert find_latest_checkpoint(str(tmp_path / "part")).endswith("iter_6.pth")
    resumed = build(tiny_config(tmp_path / "part", epochs=epochs, resume=True))
    watch(resumed, seen)
    resumed.train()
    assert seen == drawn
    assert resumed.iter == whole.iter == (20 if epochs else 10)
    assert resumed.optim_wrapper.optimizer.state_dict()["state"][0]["step"] == whole.iter


@pytest.mark.parametrize("step", [4, 10])
def test_a_stopped_validation_is_repeated(tmp_path, step, capfd):
    """Also the last one, and with the trained weights in the checkpoint, not the averages that are validated."""
    changes = dict(
        val_dataloader=dict(batch_size=5, sampler=dict(type="DefaultSampler"), dataset=dict(type="Numbers")),
        val_evaluator=dict(type="CountSamples"),
        val_cfg=dict(type="ValLoop"),
        custom_hooks=[dict(type="EMAHook")],
        **{"train_cfg.val_interval": 2, "default_hooks.checkpoint.interval": 100},
    )
    changes["val_dataloader"]["dataset"]["pipeline"] = [dict(type="Jitter")]
    stopped = build(tiny_config(tmp_path, **changes))
    trained = {}

    class Stop(Hook):
        def before_val(self, runner):
            trained.update({name: p.clone() for name, p in runner.model.state_dict().items()})

        def after_val_iter(self, runner, batch_idx, **_):
            if (runner.iter, batch_idx) == (step, 1):
                os.kill(os.getpid(), signal.SIGTERM)

    stopped.register_hook(Stop())
    with pytest.raises(SystemExit) as end:
        stopped.train()
    assert end.value.code == EXIT_RETRY
    notice = "SIGTERM received: the run stops after the current batch, saves, and exits with code 75"
    assert notice in capfd.readouterr().err
    saved = torch.load(tmp_path / f"iter_{step}.pth", weights_only=False)
    assert_close({name[7:]: p for name, p in saved["ema_state_dict"].items() if name != "steps"}, trained)
    CountSamples.counts.clear()
    build(tiny_config(tmp_path, **changes, resume=True)).train()
    assert CountSamples.counts == [20] * (1 + (10 - step) // 2)


@METRICS.register_module()
class CountSamples(BaseMetric):
    counts: ClassVar[list[int]] = []

    def process(self, _, data_samples):
        self.results += data_samples

    def compute_metrics(self, results):
        self.counts.append(len(results))
        return dict(count=len(results))


def watch(runner, draws):
    step = runner.model.train_step

    def record(data, optim_wrapper):
        draws.append([sample.img_path for sample in data["data_samples"]])
        return step(data, optim_wrapper)

    runner.model.train_step = record


def test_signals_are_given_back_after_the_run(tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    build(tiny_config(tmp_path)).train()
    assert signal.getsignal(signal.SIGTERM) is before


def test_old_checkpoints_go_only_after_the_new_one_has_its_name(tmp_path, monkeypatch):
    """Whatever dies while the third is written, the two before it and the name of the second are there."""
    runner = build(tiny_config(tmp_path, **{"default_hooks.checkpoint.interval": 2}))
    put = AtomicLocalBackend.put

    def fail(self, data, path):
        if Path(path).name == "iter_6.pth":
            assert sorted(p.name for p in tmp_path.glob("iter_*")) == ["iter_2.pth", "iter_4.pth"]
            raise OSError("disk full")
        put(self, data, path)

    monkeypatch.setattr(AtomicLocalBackend, "put", fail)
    with pytest.raises(OSError, match="disk full"):
        runner.train()
    assert sorted(p.name for p in tmp_path.glob("iter_*")) == ["iter_2.pth", "iter_4.pth"]
    assert find_latest_checkpoint(str(tmp_path)) == str(tmp_path / "iter_4.pth")


def test_only_so_many_are_kept_and_leftovers_of_killed_writes_go(tmp_path):
    (tmp_path / ".iter_4.pth.123").write_bytes(b"half a file")
    (tmp_path / "mine.pth").write_bytes(b"not ours")
    build(tiny_config(tmp_path, **{"default_hooks.checkpoint.interval": 2})).train()
    assert {p.name for p in tmp_path.glob("*.pth")} == {"iter_8.pth", "iter_10.pth", "mine.pth"}
    assert not list(tmp_path.glob(".iter*"))


def test_a_write_that_fails_leaves_the_old_file_and_no_other(tmp_path, monkeypatch):
    backend = AtomicLocalBackend()
    backend.put_text("old", tmp_path / "sub" / "file")
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        backend.put(b"new", tmp_path / "sub" / "file")
    assert [(p.name, p.read_text()) for p in (tmp_path / "sub").iterdir()] == [("file", "old")]


def test_a_loss_that_is_no_number_stops_before_it_is_saved(tmp_path):
    cfg = tiny_config(tmp_path, **{"default_hooks.checkpoint.interval": 1})
    cfg.train_dataloader.dataset.pipeline = [dict(type="Jitter", poisoned=7)]
    runner = build(cfg)
    with pytest.raises(TrainingError, match=r"loss of step \d+ is nan; images: .*\b7\.png"):
        runner.train()
    saved = weights(find_latest_checkpoint(str(tmp_path)))
    assert all(value.isfinite().all() for value in saved.values())


def test_steps_are_skipped_and_counted(tmp_path):
    cfg = tiny_config(tmp_path, **{"train_cfg.max_iters": 20})
    cfg.train_dataloader.dataset.pipeline = [dict(type="Jitter", poisoned=7)]
    runner = build(cfg, non_finite_steps=0)
    found = losses(runner)
    runner.train()
    bad = [step for step, loss in found.items() if loss != loss]
    assert bad
    assert all(p.isfinite().all() for p in runner.model.parameters())
    state = runner.optim_wrapper.optimizer.state_dict()["state"]
    assert state[0]["step"] == 20 - len(bad)  # moments and their count stayed as they were
    watch = next(hook for hook in runner.hooks if type(hook).__name__ == "NonFiniteLossHook")
    assert watch.skipped == len(bad)


def test_patience_counts_steps_in_a_row(tmp_path):
    cfg = tiny_config(tmp_path, **{"train_cfg.max_iters": 20})
    cfg.train_dataloader.dataset.pipeline = [dict(type="Jitter", poisoned=7)]
    build(cfg, non_finite_steps=2).train()  # never two in a row
    runner = build(tiny_config(tmp_path / "again"), non_finite_steps=2)
    runner.model.linear.weight.data.fill_(float("inf"))
    with pytest.raises(TrainingError, match="2 such steps in a row"):
        runner.train()
    assert runner.iter == 1


def test_hooks_of_the_config_itself_are_kept(tmp_path):
    cfg = tiny_config(tmp_path, custom_hooks=[dict(type="NonFiniteLossHook", patience=5)])
    runner = build(cfg)
    assert [hook.patience for hook in runner.hooks if type(hook).__name__ == "NonFiniteLossHook"] == [5]
    assert cfg.train_dataloader.get("timeout") is None
    assert build(tiny_config(tmp_path, workers=1)).cfg.train_dataloader.timeout == 600


def flip(path, place):
    """Change one bit of a file."""
    with open(path, "r+b") as file:
        file.seek(place)
        (byte,) = file.read(1)
        file.seek(place)
        file.write(bytes([byte ^ 4]))


def a_weight(path):
    """Where in the file a weight of the model lies."""
    data = weights(path)["linear.weight"].numpy().tobytes()
    place = path.read_bytes().index(data)
    return place + len(data) // 2


@pytest.fixture
def trained(tmp_path):
    """The folder of a run that kept iter_4.pth, iter_8.pth and iter_10.pth."""
    build(tiny_config(tmp_path, **{"default_hooks.checkpoint.max_keep_ckpts": -1})).train()
    for step in (4, 8, 10):  # the disk's clock may be too coarse to order files written in milliseconds
        os.utime(tmp_path / f"iter_{step}.pth", (step, step))
    return tmp_path


def test_torch_loads_flipped_bits_and_the_check_does_not(trained):
    path = trained / "iter_10.pth"
    check_complete(path)
    before = weights(path)["linear.weight"].clone()
    flip(path, a_weight(path))
    assert not weights(path)["linear.weight"].equal(before)
    with pytest.raises(CheckpointError, match=r"iter_10.pth is damaged.*\(.*/data/\d+\)\. Use an older") as error:
        check_complete(path)
    assert "\n" not in str(error.value)


def test_files_without_checksums_pass_and_every_cut_is_seen(trained):
    path = trained / "iter_10.pth"
    torch.save({"x": torch.ones(3)}, trained / "old.pth", _use_new_zipfile_serialization=False)
    check_complete(trained / "old.pth")
    whole = path.read_bytes()
    for length in (5, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match=r"iter_10.pth is damaged"):
            check_complete(path)


def test_auto_goes_back_to_the_newest_whole_one_and_says_so(trained):
    work_dir, warned = str(trained), []
    assert find_checkpoint("auto", work_dir) == str(trained / "iter_10.pth")
    assert find_checkpoint("auto", str(trained / "empty")) is None
    flip(trained / "iter_10.pth", a_weight(trained / "iter_10.pth"))
    (trained / "best_x_iter_9.pth").write_bytes((trained / "iter_8.pth").read_bytes())  # weights of another kind
    handler = logging.Handler()
    handler.emit = lambda record: warned.append((record.levelno, record.getMessage()))
    logger = MMLogger.get_current_instance()
    logger.addHandler(handler)
    assert find_checkpoint("auto", work_dir) == str(trained / "iter_8.pth")
    (trained / "iter_8.pth").write_bytes(b"")
    assert find_checkpoint("auto", work_dir) == str(trained / "iter_4.pth")
    logger.removeHandler(handler)
    assert [level for level, _ in warned] == [logging.WARNING] * 3
    assert "iter_10.pth is damaged" in warned[0][1]
    assert warned[0][1].endswith(f"resumes from {trained / 'iter_8.pth'}.")
    (trained / "iter_4.pth").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"iter_10.pth is damaged.*The 2 others beside it cannot be used"):
        find_checkpoint("auto", work_dir)


def test_a_named_checkpoint_is_not_replaced_by_another(trained):
    path = trained / "iter_8.pth"
    assert find_checkpoint(str(path), "nowhere") == str(path)
    flip(path, a_weight(path))
    with pytest.raises(CheckpointError, match=r"iter_8.pth is damaged"):
        find_checkpoint(str(path), str(trained))
    torch.save({"state_dict": {"x": torch.ones(1)}}, trained / "iter_3.pth")
    with pytest.raises(CheckpointError, match="holds no state of a run"):
        find_checkpoint(str(trained / "iter_3.pth"), str(trained))


@pytest.mark.parametrize("damaged", [False, True])
def test_all_processes_take_the_checkpoint_of_the_first_or_fail_with_it(trained, damaged):
    path = trained / "iter_10.pth"
    if damaged:
        flip(path, a_weight(path))
    children = []
    for rank in range(2):
        children.append(os.fork())
        if children[-1] == 0:
            try:
                torch.distributed.init_process_group(
                    "gloo", init_method=f"file://{trained}/meet", rank=rank, world_size=2
                )
                own = {0: str(path), 1: str(trained / "iter_4.pth")}[rank]
                found = find_checkpoint(own, str(trained))
            except CheckpointError as error:
                found = str(error)
            finally:
                (trained / f"found_{rank}").write_text(found)
                os._exit(0)
    for child in children:
        os.waitpid(child, 0)
    found = [(trained / f"found_{rank}").read_text() for rank in range(2)]
    assert found[0] == found[1]
    assert (found[0] == str(path)) is not damaged
    assert ("iter_10.pth is damaged" in found[0]) is damaged


class Saving:
    """A run that keeps one checkpoint and saves in forked processes, which are killed."""

    def __init__(self, folder, width):
        options = {"model.width": width, "default_hooks.checkpoint.max_keep_ckpts": 1}
        self.folder, self.runner = folder, build(tiny_config(folder, **options))
        self.hook = next(hook for hook in self.runner.hooks if type(hook).__name__ == "AtomicCheckpointHook")
        self.runner.train()
        self.step = 10

    def fork(self, work):
        child = os.fork()
        if child == 0:
            try:
                work()
                os._exit(0)
            finally:
                os._exit(1)
        return child

    def save(self):
        self.step += 1
        self.hook._save_checkpoint_with_step(self.runner, self.step, meta=dict(epoch=0, iter=self.step))

    def resume(self):
        """Check that the latest checkpoint is complete, go on from it, and return the step and what was left over."""
        leftovers = list(self.folder.glob(".*"))
        content = torch.load(find_latest_checkpoint(str(self.folder)), weights_only=False)
        assert_close(content["state_dict"], self.runner.model.state_dict())
        self.step = content["meta"]["iter"]
        self.hook.keep_ckpt_ids.clear()
        self.hook.keep_ckpt_ids.append(self.step)
        for leftover in leftovers:
            leftover.unlink()
        return self.step, leftovers


def test_kills_before_each_operation_on_files(tmp_path):
    """Python announces every open, rename, removal and change of permissions; the process dies before each of them."""
    saving, names, left = Saving(tmp_path, width=4), [], []
    while True:
        said, say = os.pipe()

        number = len(names)

        def save(number=number, say=say):
            seen = []

            def kill(name, args):
                if name in ("open", "os.rename", "os.remove", "os.chmod") and str(tmp_path) in str(args[:2]):
                    if len(seen) == number:
                        os.write(say, name.encode())
                        os.kill(os.getpid(), signal.SIGKILL)
                    seen.append(name)

            sys.addaudithook(kill)
            saving.save()

        before = saving.step
        _, status = os.waitpid(saving.fork(save), 0)
        os.close(say)
        names.append(os.read(said, 99).decode())
        os.close(said)
        step, leftovers = saving.resume()
        left += leftovers
        assert step - before in (0, 1)
        if os.WIFEXITED(status):
            break
    assert os.WEXITSTATUS(status) == 0
    assert step - before == 1
    assert names[-1] == ""
    assert names.count("os.rename") == 2  # the checkpoint and the name of the latest one
    assert names.count("open") >= 4
    assert "os.remove" in names
    assert {path.name[1:5] for path in left} == {"iter", "last"}


@pytest.mark.long
def test_kills_while_checkpoints_are_written(tmp_path, monkeypatch):
    """Forked processes write one checkpoint after the other; a kill hits each fortieth of the time of a write."""
    monkeypatch.setattr("mmengine.config.Config.pretty_text", "", raising=True)  # formatting it takes most of the time
    saving, duration, unfinished = Saving(tmp_path, width=100_000), 0.0, 0
    for moment in range(40):
        said, say = os.pipe()

        def save(say=say):
            while True:
                saving.save()
                os.write(say, b".")

        before, start = saving.step, time.perf_counter()
        child = saving.fork(save)
        os.read(said, 1)  # its first one is written
        duration = max(duration, time.perf_counter() - start)
        time.sleep((moment + random.random()) / 40 * duration)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(said)
        os.close(say)
        step, leftovers = saving.resume()
        assert step > before
        unfinished += bool(leftovers)
    assert unfinished  # some kills did hit a write


@pytest.mark.parametrize(("epochs", "when"), [(True, "end"), (False, "signal")])
def test_workers_end_without_a_word(tmp_path, epochs, when):
    """Persistent workers of training and validation: nothing else on stderr, whether a run ends or is told to stop."""
    script = (
        "import os, signal, sys; from helpers.tiny_run import *\n"
        "from mmengine.hooks import Hook\n"
        "class Stop(Hook):\n"
        "    def after_train_iter(self, runner, **_):\n"
        "        if runner.iter == 5: os.killpg(0, signal.SIGTERM)\n"
        f"cfg = tiny_config('run', epochs={epochs}, workers=2)\n"
        "cfg.train_dataloader.persistent_workers = True\n"
        "loader = dict(cfg.train_dataloader.to_dict(), sampler=dict(type='DefaultSampler', shuffle=False))\n"
        "runner = build(cfg)\n"
        f"if {when == 'signal'}: runner.register_hook(Stop())\n"
        "workers = iter(Runner.build_dataloader({**loader, 'worker_init_fn': dict(type='init_worker', rank=0)}))\n"
        "next(workers); runner.train()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": f"{REPO}:{REPO / 'tests'}"},
        capture_output=True,
        text=True,
        timeout=60,
        start_new_session=True,
        check=False,
    )
    notice = "SIGTERM received: the run stops after the current batch, saves, and exits with code 75\n"
    assert done.stderr == (notice if when == "signal" else "")
    assert done.returncode == (0 if when == "end" else EXIT_RETRY)
