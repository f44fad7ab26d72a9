"""Build the runner of a config."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.dist import init_dist, is_distributed, master_only
from mmengine.optim import OptimWrapper
from mmengine.registry import RUNNERS
from mmengine.runner import Runner

import pe_spatial.integrations.openmmlab  # noqa: F401  (registers)
from pe_spatial.encoder.lora_files import add_base, describe_adapters, omit_base
from pe_spatial.encoder.vit import PerceptionEncoder
from pe_spatial.engine.configs import as_config_error
from pe_spatial.engine.console import QuietStartMixin
from pe_spatial.engine.weights import plain_model, read_safely
from pe_spatial.errors import ConfigError, TrainingError


class RunnerMixin(QuietStartMixin):
    """What runners of this package share: quiet start, learning rates for all images of an update, kept configs.

    Checkpoints of encoders with `lora` hold their adapters without the frozen base, which loading puts back.
    """

    _adapters: Mapping[str, Any] | None = None  # of `describe_adapters`, in training

    def call_hook(self, fn_name: str, **options: Any) -> None:
        """As in Runner; hooks see complete checkpoints."""
        checkpoint = options.get("checkpoint", {})
        if fn_name == "before_train":
            self._adapters = describe_adapters(plain_model(self.model))  # type: ignore[attr-defined]
            self._tell_of_adapters()
        if fn_name == "after_load_checkpoint":
            states = {prefix: checkpoint[key] for prefix, key in _STATES.items() if key in checkpoint}
            add_base(plain_model(self.model), checkpoint.get("meta"), states, self._load_from)  # type: ignore[attr-defined]
        super().call_hook(fn_name, **options)
        if fn_name == "before_save_checkpoint":
            self.omit_base(checkpoint)

    def omit_base(self, checkpoint: dict[str, Any]) -> None:
        """Remove the base of adapters from a checkpoint, if it can be restored, and describe them in its 'meta'."""
        if self._adapters:
            checkpoint.setdefault("meta", {})["lora"] = dict(self._adapters)
            states = [checkpoint[key] for key in _STATES.values() if key in checkpoint]
            omit_base(plain_model(self.model), self._adapters, states)  # type: ignore[attr-defined]

    def _tell_of_adapters(self) -> None:
        logger = self.logger  # type: ignore[attr-defined]
        for place, about in (self._adapters or {}).items():
            if about["base"] is None:
                logger.warning(
                    f"{place} trains LoRA adapters; checkpoints hold the complete encoder, because no file gives its "
                    "weights again: they are random, or load_from has replaced those of init_cfg"
                )
            else:
                logger.info(
                    f"{place} trains LoRA adapters; checkpoints do not hold its weights, but name them: "
                    f"{about['source']}, SHA-256 {about['base'][:12]}"
                )

    def scale_lr(self, optim_wrapper: OptimWrapper, auto_scale_lr: dict[str, Any] | None = None) -> None:
        """As in Runner, which leaves out of account that an update may accumulate several batches."""
        if auto_scale_lr and auto_scale_lr.get("enable") and isinstance(optim_wrapper, OptimWrapper):
            batches = optim_wrapper._accumulative_counts
            auto_scale_lr = {**auto_scale_lr, "base_batch_size": auto_scale_lr["base_batch_size"] / batches}
        super().scale_lr(optim_wrapper, auto_scale_lr)  # type: ignore[misc]

    def _maybe_compile(self, target: str) -> None:  # noqa: ARG002
        """Compile the encoders, in place, where the config has `compile=True` or options of `torch.compile`.

        Runner would compile the complete step, whose lists of boxes compilers do not follow. Names of weights stay, so
        that checkpoints are the same with and without; a second image size is compiled once more, for all sizes.
        """
        options: Any = self.cfg.get("compile") or False  # type: ignore[attr-defined]
        encoders = [m for m in plain_model(self.model).modules() if isinstance(m, PerceptionEncoder)]  # type: ignore[attr-defined]
        if options and not encoders:
            raise ConfigError("compile is set, but the model has no PerceptionEncoder to compile; remove it")
        for encoder in encoders if options else ():
            if encoder._compiled_call_impl is None:
                encoder.compile(**({} if options is True else options))

    @master_only
    def dump_config(self) -> None:
        """As in Runner, but keep the file that this run was started from, if it lies in the work dir."""
        cfg: Config = self.cfg  # type: ignore[attr-defined]
        path = Path(self.work_dir, Path(cfg.filename or "").name)  # type: ignore[attr-defined]
        if cfg.filename and path.is_file() and path.resolve() == Path(cfg.filename).resolve():
            cfg.dump(path.with_name(f"complete_{path.name}"))
        else:
            super().dump_config()  # type: ignore[misc]


_STATES = {"": "state_dict", "module.": "ema_state_dict"}
"""The state dicts of a checkpoint, by the prefix of their names."""


class QuietRunner(RunnerMixin, Runner):
    """mmengine's Runner with `RunnerMixin`."""


def prepare_loaders(cfg: Config) -> None:
    """Remove the options of data workers from loaders that have none: torch refuses them."""
    for name in ("train_dataloader", "val_dataloader", "test_dataloader"):
        loader = cfg.get(name) or {}
        if not loader.get("num_workers"):
            for option in ("persistent_workers", "prefetch_factor", "timeout", "multiprocessing_context"):
                loader.pop(option, None)


def start_processes(cfg: Config) -> None:
    """Connect the processes of a launcher unless they are connected; without a GPU they communicate through gloo."""
    launcher = cfg.get("launcher", "none")
    if launcher == "none" or is_distributed():
        return
    needed = dict(pytorch="RANK", slurm="SLURM_PROCID", mpi="OMPI_COMM_WORLD_LOCAL_RANK").get(launcher)
    if needed and needed not in os.environ:
        raise ConfigError(
            f"--launcher {launcher}, but no launcher started this process ({needed} is not set). Start with "
            "tools/dist_train.sh or tools/dist_test.sh, or omit --launcher."
        )
    if launcher == "pytorch" and not torch.cuda.is_available():  # where mmengine would ask for a driver
        torch.distributed.init_process_group("gloo")
    else:
        init_dist(launcher, **cfg.get("env_cfg", {}).get("dist_cfg", {}))


def build_runner(cfg: Config) -> Runner:
    """Build the runner of a config."""
    start_processes(cfg)
    prepare_loaders(cfg)
    read_safely()
    object.__setattr__(cfg, "_format_python_code", False)  # a run prints it four times; yapf takes seconds for each
    if is_distributed() and not torch.cuda.is_available() and "runner_type" not in cfg:
        unused = cfg.get("find_unused_parameters", False)
        wrapper = dict(device_ids=None, broadcast_buffers=False, find_unused_parameters=unused)
        cfg.setdefault("model_wrapper_cfg", dict(type="MMDistributedDataParallel", **wrapper))
    if cfg.get("runner_type") == "ShardedRunner":
        import pe_spatial.engine.fsdp  # noqa: F401  (registers)
    elif cfg.get("sharded_checkpoints"):
        raise ConfigError("sharded_checkpoints=True needs runner_type=ShardedRunner. Set it, or remove this option.")
    with as_config_error(cfg.filename):
        return RUNNERS.build(cfg) if "runner_type" in cfg else QuietRunner.from_cfg(cfg)


def explain_workers(name: str, loader: Mapping[str, Any], where: str, error: RuntimeError) -> RuntimeError:
    """Return an error of data workers as a sentence with the options that fix it; other errors as they are."""
    text, workers = str(error), f"{name}.num_workers (now {loader.get('num_workers')})"
    if "DataLoader timed out" in text:
        return TrainingError(
            f"{where} waited {loader.get('timeout')} s for a data worker: the storage hangs, or images take "
            f"longer than that. Check the storage, raise {name}.timeout, or set num_workers=0 to see where."
        )
    if "Too many open files" in text or "ancdata" in text:
        return TrainingError(
            f"the data workers ran out of open files in {where}: raise the limit (ulimit -n 65536) or lower {workers}"
        )
    if "DataLoader worker" in text or ("torch_" in text and "No space left on device" in text):
        return TrainingError(
            f"a data worker was killed in {where}, most likely because memory or shared memory (/dev/shm) was full. "
            f"Lower {workers} or {name}.batch_size, or enlarge /dev/shm (docker run --shm-size=16g)."
        )
    return error
