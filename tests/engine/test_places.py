"""Other platforms, threads, folders that cannot be written: one sentence, and no work lost."""

import errno
import os
import resource
import signal
import subprocess
import sys
import threading

import pytest
import torch

pytest.importorskip("mmengine")
from helpers.repository import REPO
from helpers.tiny_run import tiny_config
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import find_latest_checkpoint

from pe_spatial.atomic import atomic_folder, atomic_write
from pe_spatial.cli.main import errors_as_sentences
from pe_spatial.engine.fault_tolerance import EXIT_RETRY
from pe_spatial.engine.training import prepare_training, train


@pytest.fixture(autouse=True)
def fast(monkeypatch):
    """Formatting the config takes most of the time of a run this small."""
    monkeypatch.setattr("mmengine.config.Config.pretty_text", "", raising=True)


@HOOKS.register_module()
class PressCtrlC(Hook):
    def __init__(self, steps):
        self.steps = steps

    def after_train_iter(self, runner, **_):
        for _ in range(self.steps.count(runner.iter + 1)):
            os.kill(os.getpid(), signal.SIGINT)


def prepared(folder, *, steps=(), **changes):
    cfg = tiny_config(folder, **changes)
    prepare_training(cfg)
    cfg.custom_hooks = [*cfg.custom_hooks, dict(type="PressCtrlC", steps=steps)]
    return cfg


def sentence(error, *, traceback=False):
    """What a command prints when `error` stops it."""
    with pytest.raises(SystemExit) as end, errors_as_sentences(traceback=traceback):
        raise error
    assert end.value.code.startswith("error: ")
    assert "\n" not in end.value.code
    return end.value.code


# signals


def test_platforms_without_posix_signals():
    """K1: as on Windows, every command can be imported, and the hook installs the signals that there are."""
    script = (
        "import signal\n"
        "for name in ('SIGUSR1', 'SIGUSR2', 'SIGHUP', 'SIGKILL', 'SIGALRM'): delattr(signal, name)\n"
        "import importlib, pe_spatial.engine.training, pe_spatial.engine.evaluation\n"
        "from pe_spatial.cli.main import COMMANDS\n"
        "for name in COMMANDS: importlib.import_module(f'pe_spatial.cli.{name}')\n"
        "from pe_spatial.engine.fault_tolerance import StopOnSignalHook\n"
        "hook = StopOnSignalHook(); hook.before_train(None); hook.after_train(None)\n"
    )
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", script], cwd=REPO, capture_output=True, text=True)
    assert (done.stderr, done.returncode) == ("", 0)


@pytest.mark.parametrize("workers", [0, 1])
def test_ctrl_c_saves_and_exits(tmp_path, workers):
    cfg, before = prepared(tmp_path, steps=(6,), workers=workers), signal.getsignal(signal.SIGINT)
    with pytest.raises(SystemExit) as end:
        train(cfg)
    assert end.value.code == EXIT_RETRY
    assert find_latest_checkpoint(str(tmp_path)).endswith("iter_6.pth")
    assert signal.getsignal(signal.SIGINT) is before


def test_a_second_ctrl_c_stops_at_once(tmp_path):
    cfg, before = prepared(tmp_path, steps=(6, 6)), signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        train(cfg)
    assert signal.getsignal(signal.SIGINT) is before


def test_ctrl_c_in_other_commands_has_no_traceback(capsys):
    with pytest.raises(SystemExit) as end, errors_as_sentences(traceback=False):
        raise KeyboardInterrupt
    assert end.value.code == 130
    assert "Traceback" not in capsys.readouterr().err


def test_a_closed_pipe_has_no_traceback():
    """pe-spatial ... | head"""
    with pytest.raises(SystemExit) as end, errors_as_sentences(traceback=False):
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")
    assert isinstance(end.value.code, int)


def test_training_in_a_thread(tmp_path):
    """Of a notebook or a server, where Python lets nobody install handlers."""
    cfg, steps = prepared(tmp_path, **{"train_cfg.max_iters": 2}), []
    thread = threading.Thread(target=lambda: steps.append(train(cfg).iter))
    thread.start()
    thread.join()
    assert steps == [2]


# files


@pytest.mark.parametrize("write", [atomic_write, atomic_folder])
@pytest.mark.parametrize("path", ["/dev/null/x/out.json", "/proc/nope/out.json"])
def test_folders_that_cannot_be_made(write, path):
    """H5"""
    with pytest.raises(OSError, match=path) as error, write(path):
        pass
    assert path in sentence(error.value)
    assert "another" in sentence(error.value)


@pytest.mark.parametrize(
    ("number", "said"),
    [
        (errno.ENOSPC, "free some space"),
        (errno.EDQUOT, "free some space"),
        (errno.EROFS, "another folder"),
        (errno.EACCES, "another folder"),
        (errno.ENAMETOOLONG, "x.pth"),
        (errno.EMFILE, "ulimit -n"),
        (errno.EIO, "x.pth"),
    ],
)
def test_failed_writes_name_the_file_and_the_remedy(tmp_path, number, said):
    with pytest.raises(OSError, match=r"x\.pth") as error, atomic_write(tmp_path / "x.pth"):
        raise OSError(number, os.strerror(number))
    text = sentence(error.value)
    assert f"{tmp_path / 'x.pth'}" in text
    assert said in text
    assert not list(tmp_path.iterdir())


def test_a_full_disk_under_a_checkpoint(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        for write in (
            lambda unfinished: unfinished.write_bytes(bytes(10_000)),
            lambda unfinished: torch.save(torch.ones(10_000), unfinished),
        ):
            with pytest.raises(OSError, match=r"x\.pth") as error, atomic_write(tmp_path / "x.pth") as unfinished:
                write(unfinished)
            assert f"{tmp_path / 'x.pth'}: " in sentence(error.value)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("folder", ["/dev/null/run", "/proc/nope/run"])
def test_a_work_dir_that_cannot_be_made(folder):
    with pytest.raises(OSError, match=folder[:10]) as error:
        train(prepared(folder))
    assert folder[:10] in sentence(error.value)


def test_errors_of_workers_are_their_last_line():
    """torch hands them over with the traceback in the text, and without a number."""
    last = 'OSError: [Errno 5] Input/output error: "a.png"'
    assert sentence(OSError(f"Caught OSError in DataLoader worker process 0.\nTraceback ...\n{last}")).endswith(last)


def test_traceback_shows_everything():
    with pytest.raises(OSError), errors_as_sentences(traceback=True):  # noqa: PT011
        raise OSError(errno.ENOSPC, "No space left on device", "x")
