"""Train a small encoder on the synthetic world with a pooled objective, as PE-Core is: nothing asks for its maps.

It starts as the encoder that the package ships, which has good maps (projects/synthetic_pretraining), with three new
blocks behind it, which alone learn: every token of the last layer has to point where the mean of the scene's tokens in
front of them points, over places and both frames (negative cosine; the mean is standardized over scenes). So the last
layers give up places for what the scene is. PE-Core's do this by themselves; here it is asked for, because a pooled
objective of minutes does not touch what the residual stream carries. Writes ROOT/NAME.pt for the configs beside this
file, and renders their data.

--width W trains a narrower encoder of five blocks from random weights instead, to compare a distilled one with: its
class token finds the other frame of the scene among the batch (contrastive), and says which categories are there.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from pe_spatial import PerceptionEncoder, from_pretrained
from pe_spatial.alignment.losses import token_cosine
from pe_spatial.encoder.variants import get_config
from pe_spatial.synthetic import CATEGORIES, write_dataset

SHIPPED = get_config("pe_synthetic_xs8_192")
NEW = 3  # blocks behind those of the shipped encoder
TEMPERATURE = 0.1


def load(root: Path) -> tuple[Tensor, Tensor]:
    """Return images (scenes, 2, 3, H, W) uint8 and the categories in them (scenes, 2, categories), 0 or 1."""
    coco = json.loads((root / "annotations/instances_pretrain.json").read_text())
    images = [np.asarray(Image.open(root / "pretrain" / image["file_name"])) for image in coco["images"]]
    present = np.zeros((len(images), len(CATEGORIES)), np.float32)
    for annotation in coco["annotations"]:
        present[annotation["image_id"] - 1, annotation["category_id"] - 1] = 1
    pixels = torch.from_numpy(np.stack(images).transpose(0, 3, 1, 2))
    return pixels.unflatten(0, (-1, 2)), torch.from_numpy(present).unflatten(0, (-1, 2))


def augment(images: Tensor) -> Tensor:
    """Crop to a random part of at least 60 %, flip and change the colors of each image; normalize to [-1, 1]."""
    n, side = len(images), images.shape[-1]
    scale = torch.empty(n).uniform_(0.75, 1.0)
    shift = (1 - scale)[:, None] * torch.empty(n, 2).uniform_(-1, 1)
    theta = torch.zeros(n, 2, 3)
    theta[:, 0, 0] = scale * (torch.rand(n) < 0.5).float().mul(2).sub(1)
    theta[:, 1, 1] = scale
    theta[:, :, 2] = shift
    grid = F.affine_grid(theta, [n, 3, side, side], align_corners=False)
    views = F.grid_sample(images.float() / 255, grid, align_corners=False, padding_mode="reflection")
    gain = torch.empty(n, 3, 1, 1).uniform_(0.85, 1.15) * torch.empty(n, 1, 1, 1).uniform_(0.7, 1.3)
    return (views * gain).clamp(0, 1) * 2 - 1


class GlobalTokens(nn.Module):
    """The shipped encoder, frozen, and new blocks whose every token predicts the mean of the scene."""

    def __init__(self, images: Tensor) -> None:
        super().__init__()
        self.encoder = PerceptionEncoder(
            replace(SHIPPED, depth=SHIPPED.depth + NEW), out_indices=(SHIPPED.depth - 1, -1)
        )
        self.encoder.load_state_dict(from_pretrained("pe_synthetic_xs8_192").state_dict(), strict=False)
        self.encoder.requires_grad_(False)
        self.encoder.blocks[SHIPPED.depth :].requires_grad_(True)
        with torch.no_grad():
            means = torch.cat([self(augment(part))[0].mean(1) for part in images.flatten(0, 1).split(30)])
        self.mean, self.std = means.mean(0), means.std(0)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """(B, 3, H, W) -> tokens (B, N, C) in front of the new blocks, and of the last layer."""
        return tuple(maps.flatten(2).mT for maps in self.encoder(images))

    def loss(self, views: Tensor, _: Tensor) -> Tensor:
        """Return the loss of views (2 scenes, 3, H, W), in pairs of a scene."""
        inner, last = self(views)
        scene = ((inner.mean(1) - self.mean) / self.std).unflatten(0, (-1, 2)).mean(1).repeat_interleave(2, 0)
        return token_cosine(last, scene[:, None].expand_as(last))


class ClassToken(nn.Module):
    """A narrow encoder and what is read from its last class token."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.encoder = PerceptionEncoder(replace(SHIPPED, embed_dim=width))
        self.norm = nn.LayerNorm(width)
        self.embed = nn.Linear(width, 64)
        self.classify = nn.Linear(width, len(CATEGORIES))

    def loss(self, views: Tensor, labels: Tensor) -> Tensor:
        """Return the loss of views (2 scenes, 3, H, W), in pairs of a scene, with the categories in them."""
        pooled = self.norm(self.encoder.forward_with_class_tokens(views)[1][0])
        first, second = F.normalize(self.embed(pooled).float(), dim=-1).unflatten(0, (-1, 2)).unbind(1)
        similar, target = first @ second.T / TEMPERATURE, torch.arange(len(first))
        contrast = (F.cross_entropy(similar, target) + F.cross_entropy(similar.T, target)) / 2
        return contrast + F.binary_cross_entropy_with_logits(self.classify(pooled).float(), labels)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--root", type=Path, default=Path("work_dirs/spatial_alignment"))
    parser.add_argument("--scenes", type=int, default=1500)
    parser.add_argument("--steps", type=int, default=240)
    parser.add_argument("--batch-size", type=int, default=8, help="scenes in a step, two frames each")
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--width", type=int, help="of a narrower encoder")
    parser.add_argument("--name", default="core", help="name of the file of weights")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    torch.set_num_threads(1)
    start = time.time()
    write_dataset(args.root / "world", scenes={"train": 150, "val": 50, "pretrain": args.scenes}, size=(96, 96))
    write_dataset(args.root / "clips", scenes={"val": 12}, frames_per_scene=8, size=(96, 96))
    images, present = load(args.root / "world")
    print(f"{len(images)} scenes after {time.time() - start:.0f} s", flush=True)
    model = (ClassToken(args.width) if args.width else GlobalTokens(images[:120])).train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=args.lr, betas=(0.9, 0.98), weight_decay=0.05)
    warmup = max(1, args.steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda s: min((s + 1) / warmup, 0.5 + 0.5 * math.cos(math.pi * s / args.steps))
    )
    for step in range(1, args.steps + 1):
        index = torch.randint(len(images), (args.batch_size,))
        loss = model.loss(augment(images[index].flatten(0, 1)), present[index].flatten(0, 1))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 0:
            print(f"step {step}/{args.steps}  {time.time() - start:.0f} s  loss {loss.item():.3f}", flush=True)
    torch.save(model.encoder.state_dict(), args.root / f"{args.name}.pt")


if __name__ == "__main__":
    main()
