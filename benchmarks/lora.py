"""Train the demo's detector with all of the encoder, and with LoRA adapters alone; print AP, memory and time.

Both sides see the same images in the same order with the same schedule, one after the other, each in a process of its
own. Time is CPU time of the training steps, without evaluation; memory is the largest resident size of the process.

    pe-spatial render_synthetic WORLD --train 100 --val 60 --size 192 192
    python benchmarks/lora.py WORLD
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import mmdet
import torch
from mmengine.hooks import Hook
from mmengine.registry import HOOKS

from pe_spatial.engine.configs import move_data_root, read_config
from pe_spatial.engine.options import set_options
from pe_spatial.engine.schedule import set_length
from pe_spatial.engine.training import prepare_training, train

CONFIG = Path(__file__).parents[1] / "configs" / "pe_demo_cascade_synthetic.py"
SIDES: dict[str, dict[str, str]] = {
    "all of the encoder trains": {},
    "LoRA, rank 8": {"model.backbone.lora": "dict(rank=8)"},
}


@HOOKS.register_module()
class Watch(Hook):
    """Notes the CPU time of training and the results of the evaluation."""

    def before_train(self, _: Any) -> None:
        self.seconds = -time.process_time()

    def before_val(self, _: Any) -> None:
        self.seconds += time.process_time()

    def after_val_epoch(self, _: Any, metrics: dict[str, float]) -> None:
        self.metrics = metrics


def measure(side: str, world: str, iterations: int, folder: str) -> dict[str, float]:
    cfg = read_config(str(CONFIG))
    cfg.work_dir = folder
    move_data_root(cfg, world)
    set_options(cfg, SIDES[side])
    set_length(cfg, iterations=iterations, steps=None)
    cfg.train_cfg.val_interval = iterations
    cfg.default_hooks.checkpoint.interval = iterations
    cfg.custom_hooks = [*cfg.get("custom_hooks", ()), dict(type="Watch")]
    prepare_training(cfg)
    runner = train(cfg)
    watch = next(hook for hook in runner.hooks if isinstance(hook, Watch))
    optimizer = runner.optim_wrapper.optimizer
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    states = [x for state in optimizer.state.values() for x in state.values()]
    return {
        "box AP": watch.metrics["coco/bbox_mAP"],
        "mask AP": watch.metrics["coco/segm_mAP"],
        "gradients, MB": sum(p.nbytes for p in trained) / 1e6,
        "optimizer, MB": sum(x.nbytes for x in states) / 1e6,
        "checkpoint, MB": Path(folder, f"iter_{iterations}.pth").stat().st_size / 1e6,
        "peak of the process, MiB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10,
        "CPU s a step": watch.seconds / iterations,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("world", help="folder of `pe-spatial render_synthetic`")
    parser.add_argument("--iterations", type=int, default=150, help="steps of 8 images (default: 150)")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--out", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        with tempfile.TemporaryDirectory() as folder:
            Path(args.out).write_text(json.dumps(measure(args.side, args.world, args.iterations, folder)))
        return
    rows = {}
    for side in SIDES:
        with tempfile.NamedTemporaryFile() as out:
            options = [f"--iterations={args.iterations}", f"--side={side}", f"--out={out.name}"]
            subprocess.run([sys.executable, __file__, args.world, *options], check=True, stdout=subprocess.DEVNULL)
            rows[side] = json.loads(Path(out.name).read_text())
    print(f"torch {torch.__version__}, mmdet {mmdet.__version__}, {args.iterations} steps of 8 images\n")
    names = next(iter(rows.values()))
    print(f"| | {' | '.join(names)} |\n|{'---|' * (len(names) + 1)}")
    for side, values in rows.items():
        print(f"| {side} | {' | '.join(f'{values[name]:.4g}' for name in names)} |")


if __name__ == "__main__":
    main()
