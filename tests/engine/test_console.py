"""A quiet start: the console shows a summary, warnings and progress; the log file has everything."""

import logging
import sys
import warnings
from functools import partial

import pytest

pytest.importorskip("mmengine")
from helpers.tiny_run import tiny_config
from mmengine.hooks import Hook
from mmengine.logging import MMLogger, print_log
from tqdm import tqdm

from pe_spatial.engine.console import QuietStart
from pe_spatial.engine.training import prepare_training, train


class Talkative(Hook):
    """What libraries do at the start of a run."""

    def after_train(self, runner):
        runner.logger.info("Exp name: tiny")
        runner.logger.info("bbox_mAP_copypaste: 0.1 0.2")

    def before_run(self, _):
        print("loading annotations into memory...")  # noqa: T201
        warnings.warn("a library's warning", stacklevel=1)
        print_log("a parameter is skipped since its requires_grad=False", "current", logging.WARNING)
        print_log("a setting was ignored", "current", logging.WARNING)
        logging.getLogger("pe_spatial.encoder.checkpoint").info("position embedding resized")
        logging.getLogger("pe_spatial.encoder.checkpoint").warning("geometry far from pretraining")


def test_only_summary_warnings_and_progress_are_shown(tmp_path, capsys):
    options = dict(log_level="INFO", log_processor=dict(by_epoch=False))
    cfg = tiny_config(tmp_path, custom_hooks=[dict(type=Talkative)], **options)
    stdout = sys.stdout
    with QuietStart():
        print("imported without an extra")  # noqa: T201
        prepare_training(cfg)
        runner = train(cfg)
    assert sys.stdout is stdout
    shown = capsys.readouterr()
    start, _, progress = shown.out.partition("Iter(train)")
    assert "Line, 0.00 M parameters" in start
    assert "Numbers" in start
    assert "10 iterations" in start
    assert str(tmp_path) in start
    assert "a setting was ignored" in start
    assert len(start.splitlines()) <= 15
    assert progress.count("Iter(train)") == 9
    assert "copypaste" not in shown.out
    assert "Exp name" not in shown.out
    assert shown.err == "geometry far from pretraining\n"

    log = (tmp_path / runner.timestamp / f"{runner.timestamp}.log").read_text()
    for text in ("imported without", "loading annotations", "a library's warning", "is skipped since", "was ignored",
                 "position embedding resized", "Exp name: tiny", "mAP_copypaste",
                 "geometry far", "Hooks will be executed", "train_dataloader",
                 "Iter(train) [10/10]"):  # fmt: skip
        assert text in log, text
    assert log.count("Iter(train) [10/10]") == log.count("loading annotations") == 1


def test_loggers_are_as_before(capsys):
    before = [list(logging.getLogger(name).handlers) for name in ("stdout", "py.warnings", "pe_spatial")]
    with QuietStart(), pytest.raises(KeyboardInterrupt):
        raise KeyboardInterrupt
    assert [logging.getLogger(name).handlers for name in ("stdout", "py.warnings", "pe_spatial")] == before
    MMLogger.get_current_instance().info("shown again")
    assert "shown again" in capsys.readouterr().out


@pytest.mark.parametrize("terminal", [True, False])
def test_a_terminal_shows_one_line_of_progress(tmp_path, capsys, monkeypatch, terminal):
    options = dict(log_level="INFO", log_processor=dict(by_epoch=False))
    with QuietStart():
        monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
        monkeypatch.setattr("pe_spatial.engine.console.tqdm", partial(tqdm, mininterval=0))
        cfg = tiny_config(tmp_path, **options)
        prepare_training(cfg)
        train(cfg)
    shown = capsys.readouterr()
    if terminal:
        assert "training" in shown.err
        assert "/10 [" in shown.err
        assert "loss=" in shown.err
        assert "\n" not in shown.err
        assert "Iter(train)" not in shown.out
    else:
        assert shown.err == ""
        assert "Iter(train)" in shown.out
