"""What is installed, what works with it, and what to install for the rest; imports only what it tries, one by one."""

import importlib
import importlib.util
import platform
import warnings
from collections.abc import Iterator
from importlib import metadata

OPENMMLAB = {
    "mmengine": ("mmengine", "onedl-mmengine"),
    "mmcv": ("mmcv", "onedl-mmcv", "mmcv-lite"),
    "mmdet": ("mmdet", "onedl-mmdetection"),
    "mmseg": ("mmsegmentation", "onedl-mmsegmentation"),
}
"""Module -> the distributions that install it; two of them overwrite each other's files."""

OTHERS = {
    "torch": ("torch",),
    "torchvision": ("torchvision",),
    "timm": ("timm",),
    "detectron2": ("detectron2",),
    "sam2": ("sam2",),
    "cv2": ("opencv-python-headless", "opencv-python"),
}

DETECTRON2 = "docs/swap_how_to.md shows how to build Detectron2"
FEATURES = {
    "encoder, pyramids, checkpoints": ((), "pip install pe_spatial"),
    "timm models": (("timm",), "pip install 'pe_spatial[timm]'"),
    "detection, segmentation, depth, swap": ((*OPENMMLAB, "mmcv.ops", "cv2"), ""),
    "SAM 2-style tracker": ((*OPENMMLAB, "mmcv.ops", "cv2", "sam2"), "pip install --no-build-isolation sam2==1.1.0"),
    "Detectron2 backbone": (("detectron2",), DETECTRON2),
    "sharded training": ((*OPENMMLAB, "torch.distributed.fsdp:fully_shard", "torch.utils.serialization"), ""),
}
"""Feature -> the modules (or module:name) that it needs, and what to do if they are missing."""


def installed(distributions: tuple[str, ...]) -> dict[str, str]:
    """Return the version of each distribution that is installed."""
    found = {}
    for name in distributions:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def conflicts() -> list[str]:
    """Return one sentence for each OpenMMLab module that two installed distributions own."""
    owners = {module: sorted(installed(names)) for module, names in OPENMMLAB.items()}
    return [
        f"{' and '.join(names)} both install the module {module}: uninstall both, then install the one that you want"
        for module, names in owners.items()
        if len(names) > 1
    ]


def warn_of_conflicts() -> None:
    """Warn if two distributions own the same OpenMMLab module."""
    for sentence in conflicts():
        warnings.warn(sentence, stacklevel=2)


def install_openmmlab() -> str:
    """Return the command that installs what is missing, without replacing a distribution that is there."""
    missing = [module for module, names in OPENMMLAB.items() if not installed(names)]
    if len(missing) == len(OPENMMLAB):
        return "pip install --no-build-isolation 'pe_spatial[openmmlab]'"
    of_upstream = any(installed(names[:1]) for names in OPENMMLAB.values())
    names = [OPENMMLAB[module][0 if of_upstream else 1] for module in missing]
    names = ["'mmcv>=2.1,<2.2'" if name == "mmcv" else name for name in names]  # MMDetection 3.3 refuses mmcv 2.2
    return f"pip install --no-build-isolation {' '.join(names)}" if names else "see docs/environments.md"


def problem_of(module: str) -> str:
    """Import `module` or `module:name`; return why that fails, '' if it works."""
    module, _, name = module.partition(":")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            imported = importlib.import_module(module)
    except Exception as error:  # a broken package may raise anything
        if isinstance(error, ModuleNotFoundError) and error.name == module:
            return f"{module} is not installed"
        return f"{module} does not load ({(str(error).splitlines() or [type(error).__name__])[0]:.100})"
    return "" if not name or hasattr(imported, name) else f"{module} has no {name}: torch is too old"


def report() -> Iterator[str]:
    """Yield the lines of `pe-spatial doctor`; problems become lines, never exceptions."""
    yield f"{'python':12} {platform.python_version()} on {platform.system()} {platform.machine()}"
    for module, names in {**OTHERS, **OPENMMLAB}.items():
        versions = ", ".join(f"{name} {version}" for name, version in installed(names).items())
        yield f"{module:12} {versions or '-'}"
    yield f"{'mmcv ops':12} {_ops()}"
    yield f"{'device':12} {_device()}"
    yield ""
    for feature, (modules, remedy) in FEATURES.items():
        problem = next(filter(None, map(problem_of, ("torch", "pe_spatial.encoder.vit", *modules))), "")
        if not problem:
            yield f"works    {feature}"
            continue
        yield f"missing  {feature}: {problem}"
        yield f"         {_remedy(problem, remedy)}"
    for sentence in conflicts():
        yield f"warning  {sentence}"


def _remedy(problem: str, remedy: str) -> str:
    if problem.startswith(("torch.distributed", "torch.utils")):
        return "pip install 'torch>=2.7'"
    if problem.startswith("cv2"):
        return "pip install opencv-python-headless"
    return install_openmmlab() if problem.startswith(tuple(OPENMMLAB)) else remedy


def _ops() -> str:
    problem = problem_of("mmcv.ops")
    if problem:
        return f"none: {problem}"
    try:
        cuda = importlib.import_module("mmcv.ops").get_compiling_cuda_version()
    except Exception as error:
        return f"compiled, but {error}"
    return f"compiled; CUDA: {cuda}"


def _device() -> str:
    try:
        torch = importlib.import_module("torch")
        if torch.cuda.is_available():
            facts = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
            return ", ".join(f"{one.name} ({one.total_memory / 2**30:.0f} GiB)" for one in facts)
        return "MPS" if torch.backends.mps.is_available() else "CPU only"
    except Exception as error:
        return f"unknown ({type(error).__name__}: {error})"
