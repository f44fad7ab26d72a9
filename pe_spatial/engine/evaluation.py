"""Evaluate a config: options that write or draw predictions, test-time augmentation."""

from pathlib import Path

from mmengine.config import Config, ConfigDict
from mmengine.logging import MMLogger

from pe_spatial.engine.runner import build_runner, explain_workers, load_weights_of_any_layout
from pe_spatial.engine.summary import summarize
from pe_spatial.errors import ConfigError


def draw_predictions(cfg: Config, *, folder: str | None = None, window: bool = False, seconds: float = 0) -> None:
    """Let the test draw predictions beside the ground truth: into a folder, or in a window for some seconds each."""
    hook = cfg.get("default_hooks", {}).get("visualization")
    if hook is None:
        raise ConfigError(f"{cfg.filename} has no default_hooks.visualization to draw with")
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
    """Let the test write its predictions as a pickle."""
    if not path.endswith((".pkl", ".pickle")):
        raise ConfigError(f"--out {path} must end in .pkl")
    writer = dict(type="DumpDetResults" if cfg.default_scope == "mmdet" else "DumpResults", out_file_path=path)
    metrics = cfg.test_evaluator if isinstance(cfg.test_evaluator, list) else [cfg.test_evaluator]
    cfg.test_evaluator = [*metrics, writer]


def test(cfg: Config) -> dict[str, float]:
    """Evaluate the checkpoint `load_from` of a config; return its metrics."""
    runner = build_runner(cfg)
    load_weights_of_any_layout(runner)
    runner.logger.info(f"Evaluation\n{summarize(runner, training=False)}")
    try:
        return runner.test()
    except RuntimeError as error:
        explained = explain_workers("test_dataloader", cfg.test_dataloader, "the test", error)
        if explained is error:
            raise
        raise explained from error
