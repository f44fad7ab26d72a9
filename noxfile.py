"""The environments of docs/environments.md: `make test-matrix ENV=d` makes one in .nox/ and runs what applies to it."""

import nox

nox.options.sessions = ["d"]
nox.options.error_on_missing_interpreters = True
TOOLS = ("pytest", "pytest-xdist", "hypothesis", "pillow", "safetensors", "huggingface_hub", "timm")
CORE = (
    "tests/encoder",
    "tests/convert",
    "tests/tracking/vos",
    "tests/cli/test_main.py",
    "tests/test_imports.py",
    "tests/test_atomic.py",
    "tests/test_images.py",
    "tests/integrations/test_environment.py",
)
OPENMMLAB = ("tests/integrations", "tests/detection", "tests/depth", "tests/engine")


def run(session: nox.Session, *tests: str) -> None:
    session.run("pytest", "-q", *(session.posargs or tests), env={"OMP_NUM_THREADS": "1"})


@nox.session(python="3.10")
def a(session: nox.Session) -> None:
    """Upstream OpenMMLab: mmcv is compiled, which takes up to an hour on one core."""
    session.install("setuptools<70", "wheel", "ninja", "psutil", "numpy<2", "torch==2.2.2", "torchvision==0.17.2")
    session.install("--no-build-isolation", "mmcv==2.1.0", env={"MMCV_WITH_OPS": "1"})
    session.install("mmengine==0.10.7", "mmdet==3.3.0", "mmsegmentation==1.2.2", "ftfy", "regex", "faster-coco-eval")
    session.install("numpy<2", "opencv-python-headless<4.12", *TOOLS)
    session.install("--no-deps", "--no-build-isolation", "-e", ".")
    run(session, *CORE, *OPENMMLAB)


def pinned(session: nox.Session) -> None:
    with_pins = ("-c", "constraints.txt")
    session.install(*with_pins, "torch", "torchvision", "ninja", "psutil", "setuptools", "wheel", "numpy")
    session.install(*with_pins, "--no-build-isolation", "-e", ".[openmmlab,sam2,export,language,alignment,torchao,dev]")
    session.install(*with_pins, "--force-reinstall", "--no-deps", "opencv-python-headless")
    run(session, "tests")


@nox.session(python="3.11")
def b(session: nox.Session) -> None:
    """The pinned set, as `make setup` installs it."""
    pinned(session)


@nox.session(python="3.12")
def c(session: nox.Session) -> None:
    """The pinned set."""
    pinned(session)


@nox.session(python="3.13")
def d(session: nox.Session) -> None:
    """The newest torch, core and timm: wheels alone."""
    session.install("torch", "numpy", *TOOLS)
    session.install("--no-deps", "-e", ".")
    run(session, *CORE)


@nox.session(python="3.13")
def e(session: nox.Session) -> None:
    """The newest torch with onedl-*, without pins."""
    session.install("torch", "torchvision", "ninja", "psutil", "setuptools<82", "wheel", "numpy", *TOOLS)
    session.install("--no-build-isolation", "-e", ".[openmmlab]")
    run(session, *CORE, *OPENMMLAB)
