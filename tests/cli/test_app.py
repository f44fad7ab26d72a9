"""The page of the demo shows its newest detector, and trains one if there is none."""

import os
from pathlib import Path

import pytest

from pe_spatial.cli import app
from pe_spatial.cli.main import main


def test_demo_takes_the_newest_detector_and_trains_where_there_is_none(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    calls = []

    def demo(*words):
        calls.append(words)
        Path("work_dirs/demo").mkdir(parents=True)
        for time, name in enumerate(("iter_50.pth", "iter_350.pth")):
            path = Path("work_dirs/demo", name)
            path.touch()
            os.utime(path, (time, time))

    monkeypatch.setattr(app, "run_command", demo)
    for _ in range(2):
        assert app.demo_detector() == "work_dirs/demo/iter_350.pth"
    assert calls == [("demo", ["--work-dir", "work_dirs/demo"])]
    assert "work_dirs/demo/world/val" in capsys.readouterr().out


def test_demo_has_its_own_detector(capsys):
    with pytest.raises(SystemExit) as error:
        main(["--demo", "--detector", "iter_1.pth", "--port", "0"], command="app")
    assert "--demo shows its own detector; omit --detector" in f"{error.value}{capsys.readouterr().err}"
