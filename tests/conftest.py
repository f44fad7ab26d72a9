"""Fixtures of all tests, one thread for each process, and the report on skipped tests."""

import gc
import importlib.util
import logging
import os
import signal
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import encoders
from helpers.repository import REPO, shared_folder

from pe_spatial import PerceptionEncoder

# One thread, also in the processes that tests start: numbers are the same with pytest -n 2, which fills two cores.
torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say in one line for each reason how many tests were skipped."""
    reports = terminalreporter.stats.get("skipped", ())
    reasons = Counter(report.longrepr[2].removeprefix("Skipped: ") for report in reports if report.longrepr)
    for reason, count in reasons.most_common():
        terminalreporter.write_line(f"SKIPPED [{count}] {reason}")


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """In CI a skip is a failure; only a GPU, Detectron2, which no package index has, and a browser may be missing.

    A job that has one of them names it in `PE_SPATIAL_REQUIRE`, and then it may not be missing either.
    """
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if reporter is None:  # a worker of pytest -n
        return
    optional = {"gpu", "detectron2", "browser"} - set(os.environ.get("PE_SPATIAL_REQUIRE", "").split())
    skipped = [r.nodeid for r in reporter.stats.get("skipped", ()) if not optional & set(getattr(r, "keywords", ()))]
    if os.environ.get("CI") and skipped:
        allowed = " or ".join(sorted(optional)) or "nothing"
        reporter.write_line(f"skipped in CI, where only {allowed} may be missing: {', '.join(skipped)}", red=True)
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


@pytest.fixture(scope="session", autouse=True)
def no_waiting() -> Iterator[None]:
    """Let mmengine write configs without yapf, and begin epochs without 2 s of sleep: a tiny run takes less.

    And let torch not wait 5 s for workers: those that ignore SIGTERM, as ours do, outlast an endless sampler. What is
    imported by now is no garbage, and mmengine looks for some with every dataset: half a second, if not told.
    """
    gc.collect()
    gc.freeze()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.utils.data._utils, "MP_STATUS_CHECK_INTERVAL", 0.2)
        if importlib.util.find_spec("yapf"):
            patch.setattr("yapf.yapflib.yapf_api.FormatCode", lambda text, **_: (text, True))
        if "mmengine.runner.loops" in sys.modules:
            patch.setattr("mmengine.runner.loops.time", SimpleNamespace(sleep=lambda _: None))
        yield


@pytest.fixture(autouse=True)
def own_settings() -> Iterator[None]:
    """Put back what a test, or a run in it that ended early, has set: signal handlers, deterministic algorithms."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real images and videos, which licenses keep out of the repository."""
    return shared_folder(os.environ)


@pytest.fixture(scope="session")
def golden() -> Path:
    """The folder of reference values computed with the released code; `helpers.golden` reads them."""
    return REPO / "tests" / "golden"


@pytest.fixture(scope="session")
def randomize() -> Callable[[torch.nn.Module], torch.nn.Module]:
    """Return `helpers.encoders.randomize`, which fills every parameter."""
    return encoders.randomize


@pytest.fixture(scope="session")
def tiny(randomize) -> Callable[..., PerceptionEncoder]:
    """Return `tiny(class_token=True, **options)`: a small encoder in eval mode, always with the same weights."""

    def build(class_token: bool = True, **options: object) -> PerceptionEncoder:
        return randomize(PerceptionEncoder(encoders.TINY if class_token else encoders.TINY_NO_CLASS, **options)).eval()

    return build


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """What mmengine's current logger gets, as (message, level)."""
    from mmengine.logging import MMLogger

    lines: list[tuple[str, int]] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append((record.getMessage(), record.levelno))
    logger = MMLogger.get_current_instance()
    monkeypatch.setattr(logger, "level", logging.INFO)
    monkeypatch.setattr(logger, "handlers", [handler])
    return lines
