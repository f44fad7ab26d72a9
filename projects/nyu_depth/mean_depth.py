"""The baseline of depth networks: the mean depth of the training set, predicted for every pixel.

python projects/nyu_depth/mean_depth.py configs/pe_spatial_dpt_nyu.py --limit 2000
python projects/nyu_depth/mean_depth.py projects/nyu_depth/synthetic_dpt.py
"""

import argparse

import numpy as np
import torch
from mmengine.registry import DATASETS, METRICS, init_default_scope
from mmengine.structures import PixelData
from mmengine.utils import import_modules_from_strings
from tqdm import tqdm

from pe_spatial.cli.arguments import add_config_arguments, load_config
from pe_spatial.cli.main import errors_as_sentences


def main(args: argparse.Namespace) -> None:
    cfg = load_config(args)
    init_default_scope(cfg.default_scope)
    import_modules_from_strings(**cfg.custom_imports)
    loaders = ("pe_spatial.LoadImageFromFile", "LoadDepth")
    load = [step for step in cfg.train_dataloader.dataset.pipeline if step.type in loaders]
    train = DATASETS.build({**cfg.train_dataloader.dataset, "pipeline": load})
    test = DATASETS.build(cfg.test_dataloader.dataset)
    metric = METRICS.build(cfg.test_evaluator)

    chosen = np.linspace(0, len(train) - 1, min(args.limit or len(train), len(train))).astype(int)
    maps = (train[i]["gt_depth_map"] for i in tqdm(chosen, desc="training depth"))
    total, pixels = np.sum([(depth.sum(dtype=np.float64), np.count_nonzero(depth)) for depth in maps], axis=0)
    mean = total / pixels
    for item in tqdm(test, desc="evaluation"):
        sample = item["data_samples"]
        sample.pred_depth_map = PixelData(data=torch.full_like(sample.gt_depth_map.data, mean))
        metric.process(None, [sample.to_dict()])
    print(f"mean depth of {len(chosen)} training images: {mean:.3f} m")
    print("  ".join(f"{name} {value:.4f}" for name, value in metric.evaluate(len(test)).items()))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_config_arguments(parser)
    parser.add_argument("--limit", type=int, metavar="N", help="take the mean over N of the training images")
    with errors_as_sentences(traceback=False):
        main(parser.parse_args())
