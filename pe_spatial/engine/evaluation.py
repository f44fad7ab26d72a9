"""Evaluate a config: options that write or draw predictions, test-time augmentation."""

from pathlib import Path

from mmengine.config import Config, ConfigDict
from mmengine.logging import MMLogger

from pe_spatial.engine.checks import CheckClassesHook, check_files, empty_sets_as_errors
from pe_spatial.engine.nodes import use_checked
from pe_spatial.engine.runner import build_runner, explain_workers, start_processes
from pe_spatial.engine.summary import summarize
from pe_spatial.engine.weights import check_weights, load_weights_of_any_layout
from pe_spatial.errors import ConfigError


def draw_predictions(cfg: Config, *, folder: str | None = None, window: bool = False, seconds: float = 0) -> None:
    """Let the test draw predictions beside the ground truth: into a folder, or in a window for some seconds each."""
    hook = cfg.get("default_hooks", {}).get("visualization")
    if hook is None:
        raise ConfigError(f"{cfg.filename} has no default_hooks.visualization to draw with")
    if hook.type == "DetVisualizationHook":
        hook.type = "DrawDetectionsHook"
    hook.draw = True
    if window:
        hook.show, hook.wait_time = True, seconds
    if folder and cfg.default_scope == "mmseg":  # its hook leaves the folder to the visualizer
        cfg.visualizer.save_dir, hook.interval = str(Path(folder).resolve()), 1
    elif folder:
        hook.test_out_dir = str(Path(folder).resolve())


def augment_test(cfg: Config) -> None:
    """Test with the config's test-time augmentation."""
    missing = [name for name in ("tta_model", "tta_pipeline") if name not in cfg]
    if missing:
        raise ConfigError(f"{cfg.filename} has no {' and no '.join(missing)}, so it cannot be tested with --tta")
    cfg.model = ConfigDict(**cfg.tta_model, module=cfg.model)
    cfg.test_dataloader.dataset.pipeline = cfg.tta_pipeline
    if "tta_evaluator" in cfg:
        cfg.test_evaluator = cfg.tta_evaluator
        MMLogger.get_current_instance().info(f"--tta: evaluates {cfg.tta_evaluator.get('metric')} only")


def write_predictions(cfg: Config, path: str) -> None:
    """Let the test write its predictions: as a pickle, or as COCO's results json."""
    metrics = _checked_metrics(cfg)
    if path.endswith(".json"):
        writers = [metric for metric in metrics if metric.type in CHECKED_METRICS]
        if not writers:
            raise ConfigError(f"--out {path} needs an evaluator of COCO or LVIS; end the name in .pkl")
        writers[0].out_file = path
        return
    if not path.endswith((".pkl", ".pickle")):
        raise ConfigError(f"--out {path} must end in .pkl, or in .json for COCO's format")
    writer = dict(type="DumpDetResults" if cfg.default_scope == "mmdet" else "DumpResults", out_file_path=path)
    cfg.test_evaluator = [*metrics, writer]


def limit_test(cfg: Config, number: int) -> None:
    """Limit the test of a config to the first `number` images of its dataset."""
    dataset = cfg.test_dataloader.dataset
    if number < 1 or "dataset" in dataset or "datasets" in dataset:
        raise ConfigError(f"first {number} images of {dataset.get('type')}: give at least 1, and a set without wrapper")
    others = [m.type for m in _checked_metrics(cfg) if "ann_file" in m and m.type not in CHECKED_METRICS]
    if others:
        raise ConfigError(f"{others[0]} evaluates all images of its file; a limit needs {' or '.join(CHECKED_METRICS)}")
    dataset.indices = number


CHECKED_METRICS = ("CheckedCocoMetric", "FastLVISMetric")
"""Evaluators that evaluate the images that were tested, and write json."""


def _checked_metrics(cfg: Config) -> list[ConfigDict]:
    """Return the test's evaluators, mmdet's CocoMetric replaced by ours, after putting them into the config."""
    single = not isinstance(cfg.test_evaluator, list | tuple)
    cfg.test_evaluator = [cfg.test_evaluator] if single else list(cfg.test_evaluator)
    for metric in cfg.test_evaluator:
        use_checked(metric)
    return cfg.test_evaluator


def test(cfg: Config) -> dict[str, float]:
    """Evaluate the checkpoint `load_from` of a config; return its metrics."""
    start_processes(cfg)
    check_weights(cfg.load_from)
    check_files(cfg, "test")
    if cfg.filename:  # the runner writes the config under this name; that of a training in the same folder stays
        object.__setattr__(cfg, "_filename", str(Path(cfg.filename).with_name(f"test_{Path(cfg.filename).name}")))
    runner = build_runner(cfg)
    runner.register_hook(CheckClassesHook())
    load_weights_of_any_layout(runner)
    runner.logger.info(f"Evaluation\n{summarize(runner, training=False)}")
    try:
        with empty_sets_as_errors(cfg, "test"):
            return runner.test()
    except RuntimeError as error:
        explained = explain_workers("test_dataloader", cfg.test_dataloader, "the test", error)
        if explained is error:
            raise
        raise explained from error
