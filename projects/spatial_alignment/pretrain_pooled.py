"""Train a small encoder on the synthetic world with a pooled objective, as PE-Core is: nothing asks for its maps.

It starts as the encoder that the package ships, which has good maps (projects/synthetic_pretraining), with three new
blocks behind it; a pooled objective from random weights does not learn maps worth aligning in minutes. The class token
of the last layer, behind a linear map, finds the other frame of the same scene among the batch (contrastive), and says
which categories are in the image. Writes ROOT/NAME.pt for the configs beside this file, and renders their data.

--tokens makes an encoder whose last layers have thrown away where things are, as PE-Core's have: only the new blocks
learn, and each token of the last layer, not the class token, must find the other frame and name the categories.

--width W trains a narrower encoder from random weights instead, to compare a distilled one with.
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
from pe_spatial.encoder.variants import get_config
from pe_spatial.synthetic import CATEGORIES, write_dataset

SHIPPED = get_config("pe_synthetic_xs8_192")
CONFIG = replace(SHIPPED, depth=SHIPPED.depth + 3)
OLD_RATE = 0.1  # of the learning rate, for the shipped blocks
TEMPERATURE = 0.1
DRAWS = 4  # tokens of an image in a step of --tokens


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


class Pooled(nn.Module):
    """An encoder and what is read from its last class token."""

    def __init__(self, width: int | None, *, tokens: bool = False) -> None:
        super().__init__()
        self.tokens = tokens
        width, config = width or CONFIG.embed_dim, CONFIG
        if width != CONFIG.embed_dim:
            config = replace(CONFIG, embed_dim=width, depth=SHIPPED.depth)
        self.encoder = PerceptionEncoder(config)
        if config is CONFIG:
            self.encoder.load_state_dict(from_pretrained("pe_synthetic_xs8_192").state_dict(), strict=False)
        if tokens:
            self.encoder.requires_grad_(False)
            self.encoder.blocks[SHIPPED.depth :].requires_grad_(True)
        self.norm = nn.LayerNorm(width)
        self.embed = nn.Linear(width, 64)
        self.classify = nn.Linear(width, len(CATEGORIES))

    def groups(self, rate: float) -> list[dict]:
        """Return the parameters with their learning rates; the shipped ones, if there are any, learn slowly."""
        new = [f"encoder.blocks.{i}." for i in range(SHIPPED.depth, CONFIG.depth)] + ["norm.", "embed.", "classify."]
        slow = self.encoder.depth > SHIPPED.depth
        if self.tokens:
            return [dict(params=[p for p in self.parameters() if p.requires_grad], lr=rate)]
        old = [p for name, p in self.named_parameters() if slow and not name.startswith(tuple(new))]
        rest = [p for name, p in self.named_parameters() if not slow or name.startswith(tuple(new))]
        return [dict(params=old, lr=OLD_RATE * rate), dict(params=rest, lr=rate)]

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """(B, 3, H, W) -> embeddings (draws, B, D) of length 1, logits (draws, B, categories)."""
        if self.tokens:
            tokens = self.encoder(images)[0].flatten(2)  # (B, C, N)
            drawn = tokens[..., torch.randint(tokens.shape[-1], (DRAWS,))].movedim(-1, 0)
            return F.normalize(drawn.float(), dim=-1), self.classify(self.norm(drawn)).float()
        pooled = self.norm(self.encoder.forward_with_class_tokens(images)[1][0])
        return F.normalize(self.embed(pooled).float(), dim=-1)[None], self.classify(pooled).float()[None]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--root", type=Path, default=Path("work_dirs/spatial_alignment"))
    parser.add_argument("--scenes", type=int, default=1500)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--batch-size", type=int, default=16, help="scenes in a step, two frames each")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--tokens", action="store_true", help="make a gap between inner and last layers")
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
    model = Pooled(args.width, tokens=args.tokens).train()
    optimizer = torch.optim.AdamW(model.groups(args.lr), betas=(0.9, 0.98), weight_decay=0.05)
    warmup = max(1, args.steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda s: min((s + 1) / warmup, 0.5 + 0.5 * math.cos(math.pi * s / args.steps))
    )
    for step in range(1, args.steps + 1):
        index = torch.randint(len(images), (args.batch_size,))
        views, labels = augment(images[index].flatten(0, 1)), present[index].flatten(0, 1)
        with torch.autocast("cpu", torch.bfloat16):
            embeddings, logits = model(views)
        first, second = embeddings.unflatten(1, (-1, 2)).unbind(2)
        similar = first @ second.mT / TEMPERATURE  # (draws, B, B)
        target = torch.arange(similar.shape[-1]).expand(similar.shape[:2])
        contrast = (F.cross_entropy(similar, target) + F.cross_entropy(similar.mT, target)) / 2
        classes = F.binary_cross_entropy_with_logits(logits, labels.expand_as(logits))
        optimizer.zero_grad()
        (contrast + classes).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 0:
            right = (similar.argmax(-1) == target).float().mean()
            known = ((logits > 0) == (labels > 0)).float().mean()
            values = f"contrast {contrast.item():.3f} ({right:.0%})  categories {classes.item():.3f} ({known:.0%})"
            print(f"step {step}/{args.steps}  {time.time() - start:.0f} s  {values}", flush=True)
    torch.save(model.encoder.state_dict(), args.root / f"{args.name}.pt")


if __name__ == "__main__":
    main()
