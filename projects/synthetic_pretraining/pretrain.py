"""Pretrain a small Perception Encoder on the synthetic world and save its weights.

At stride 4, every pixel predicts its category, the box of its object and its depth. See README.md beside this file.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn
from torchvision.ops import generalized_box_iou_loss

from pe_spatial import PerceptionEncoder, SimpleFeaturePyramid
from pe_spatial.encoder.variants import get_config
from pe_spatial.synthetic import CATEGORIES, write_dataset

STRIDE = 4  # stride of the predictions in pixels
CONFIG = get_config("pe_synthetic_xs8_192")
SIZE = CONFIG.img_size  # side of an image in pixels
BOX_UNIT = 16.0  # pixels: exp(prediction) times this is the distance to a side of the box


class DensePredictor(nn.Module):
    """The encoder, one pyramid level and three dense predictions."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = PerceptionEncoder(CONFIG, drop_path_rate=0.05)
        self.pyramid = SimpleFeaturePyramid(
            CONFIG.embed_dim, out_channels=96, strides=(STRIDE,), in_stride=CONFIG.patch_size
        )
        self.predict = nn.Conv2d(96, len(CATEGORIES) + 1 + 4 + 1, 1)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, 3, H, W) -> logits (B, 1 + categories, h, w), box sides (B, 4, h, w) in pixels, log meters (B, h, w)."""
        out = self.predict(F.gelu(self.pyramid(self.encoder(images))[0])).float()
        logits, sides, depth = out.split((len(CATEGORIES) + 1, 4, 1), dim=1)
        return logits, sides.clamp(-5, 5).exp() * BOX_UNIT, depth[:, 0]


def load(root: Path, split: str) -> tuple[Tensor, ...]:
    """Return images (n, 3, H, W) uint8, and at stride 4 categories (n, h, w) uint8, boxes (n, 4, h, w) int16 in pixels
    (x1, y1, x2, y2) and log meters (n, h, w) float16."""
    coco = json.loads((root / f"annotations/instances_{split}.json").read_text())
    objects: dict[int, list[dict]] = {}
    for annotation in coco["annotations"]:
        objects.setdefault(annotation["image_id"], []).append(annotation)
    rows = []
    for image in coco["images"]:
        name = Path(image["file_name"])
        rgb = np.asarray(Image.open(root / split / name))
        coarse = np.s_[STRIDE // 2 :: STRIDE, STRIDE // 2 :: STRIDE]
        depth = np.asarray(Image.open(root / "depth" / split / name.with_suffix(".png")))[coarse]
        ids = np.asarray(Image.open(root / "instances" / split / name.with_suffix(".png")))[coarse]
        category = np.zeros(ids.shape, np.uint8)
        boxes = np.zeros((4, *ids.shape), np.int16)
        for item in objects.get(image["id"], []):
            mask = ids == item["object_id"]
            x, y, w, h = item["bbox"]
            category[mask] = item["category_id"]
            boxes[:, mask] = np.array([x, y, x + w, y + h])[:, None]
        rows.append((rgb.transpose(2, 0, 1), category, boxes, np.log(depth / 1000).astype(np.float16)))
    return tuple(torch.from_numpy(np.stack(column)) for column in zip(*rows, strict=True))


def batch(data: tuple[Tensor, ...], index: Tensor, *, augment: bool) -> tuple[Tensor, ...]:
    """Normalize images to [-1, 1]; flip them and change their colors at random."""
    rgb, category, boxes, depth = (column[index] for column in data)
    images, boxes = rgb.float() / 255, boxes.float()
    if augment:
        if torch.rand(()) < 0.5:
            images, category, depth = images.flip(-1), category.flip(-1), depth.flip(-1)
            boxes = boxes.flip(-1)
            boxes = torch.stack((SIZE - boxes[:, 2], boxes[:, 1], SIZE - boxes[:, 0], boxes[:, 3]), dim=1)
        n = len(index)
        gain = torch.empty(n, 3, 1, 1).uniform_(0.7, 1.3) * torch.empty(n, 1, 1, 1).uniform_(0.8, 1.2)
        images = (images.pow(torch.empty(n, 1, 1, 1).uniform_(0.7, 1.4)) * gain).clamp(0, 1)
    return images * 2 - 1, category.long(), boxes, depth.float()


def losses(predictions: tuple[Tensor, ...], category: Tensor, boxes: Tensor, depth: Tensor) -> dict[str, Tensor]:
    logits, sides, log_depth = predictions
    center = torch.arange(sides.shape[-1], dtype=torch.float32) * STRIDE + STRIDE / 2 + 0.5
    x, y = center[None, None], center[None, :, None]
    predicted = torch.stack((x - sides[:, 0], y - sides[:, 1], x + sides[:, 2], y + sides[:, 3]), dim=-1)
    on_object = category > 0
    return {
        "category": F.cross_entropy(logits, category, label_smoothing=0.02),
        "box": generalized_box_iou_loss(predicted[on_object], boxes.movedim(1, -1)[on_object], reduction="mean"),
        "depth": (log_depth - depth).abs().mean(),
    }


@torch.no_grad()
def evaluate(model: DensePredictor, data: tuple[Tensor, ...]) -> dict[str, float]:
    model.eval()
    right, objects, sums, n = 0.0, 0.0, {"box": 0.0, "depth": 0.0}, 0
    for index in torch.arange(len(data[0])).split(32):
        images, category, boxes, depth = batch(data, index, augment=False)
        predictions = model(images)
        values = losses(predictions, category, boxes, depth)
        mask = category > 0
        right += float((predictions[0].argmax(1) == category)[mask].sum())
        objects += float(mask.sum())
        sums = {key: sums[key] + float(values[key]) * len(index) for key in sums}
        n += len(index)
    model.train()
    return {"object_pixel_accuracy": right / objects, **{f"{key}_loss": value / n for key, value in sums.items()}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("work_dirs/synthetic_pretraining/encoder.safetensors"))
    parser.add_argument("--data", type=Path, default=Path("work_dirs/synthetic_pretraining/world"))
    parser.add_argument("--scenes", type=int, default=5000, help="two images each")
    parser.add_argument("--steps", type=int, default=2400)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(args.threads)
    start = time.time()
    write_dataset(args.data, scenes={"pretrain": args.scenes, "val": 100}, size=(SIZE, SIZE), workers=args.threads)
    data, held_out = load(args.data, "pretrain"), load(args.data, "val")
    print(f"{len(data[0])} images, {len(held_out[0])} held out, after {time.time() - start:.0f} s", flush=True)

    model = DensePredictor().train()
    decayed = [p for p in model.parameters() if p.ndim > 1]
    rest = [p for p in model.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.05}, {"params": rest, "weight_decay": 0.0}],
        lr=args.lr,
        betas=(0.9, 0.98),
    )
    warmup = max(1, args.steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda s: min((s + 1) / warmup, 0.5 + 0.5 * math.cos(math.pi * s / args.steps))
    )
    order = torch.empty(0, dtype=torch.long)
    for step in range(1, args.steps + 1):
        if len(order) < args.batch_size:
            order = torch.randperm(len(data[0]))
        index, order = order[: args.batch_size], order[args.batch_size :]
        images, *targets = batch(data, index, augment=True)
        with torch.autocast("cpu", torch.bfloat16):
            values = losses(model(images), *targets)
        optimizer.zero_grad()
        (values["category"] + 0.5 * values["box"] + values["depth"]).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 0:
            figures = "  ".join(f"{key} {value.item():.3f}" for key, value in values.items())
            print(f"step {step}/{args.steps}  {time.time() - start:.0f} s  {figures}", flush=True)
        if step % 400 == 0 or step == args.steps:
            args.out.parent.mkdir(parents=True, exist_ok=True)
            save_file({name: value.half() for name, value in model.encoder.state_dict().items()}, args.out)
            print(f"held out: {evaluate(model, held_out)}", flush=True)


if __name__ == "__main__":
    main()
