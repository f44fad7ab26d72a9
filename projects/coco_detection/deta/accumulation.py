"""Print the number of steps over which a stage must accumulate gradients on some GPUs to keep its total batch.

python projects/coco_detection/deta/accumulation.py CONFIG GPUS
"""

import sys

from mmengine.config import Config

config, gpus = sys.argv[1], int(sys.argv[2])
cfg = Config.fromfile(config, import_custom_modules=False)
total, each = cfg.auto_scale_lr.base_batch_size, cfg.train_dataloader.batch_size
steps, rest = divmod(total, gpus * each)
if not steps or rest:
    sys.exit(f"error: a batch of {total} images is not a multiple of {gpus} GPUs x {each}; use another number of GPUs")
print(steps)
