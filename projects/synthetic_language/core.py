"""Train a small PE-Core on crops and captions of the synthetic world, and test it on unseen scenes.

python projects/synthetic_language/core.py work_dirs/words/world --out work_dirs/words/core.safetensors
"""

import argparse
import random
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from words import CLASSES, COLORS, LEFT_OUT, SHAPES, Thing, crop_of, read_world

from pe_spatial import PECore, from_pretrained
from pe_spatial.encoder.resize import resize_pos_embed
from pe_spatial.encoder.variants import DEMO_VARIANTS
from pe_spatial.language.checkpoint import save_core
from pe_spatial.language.embedding import squash
from pe_spatial.language.protocol import accuracy, class_embeddings, embed_texts, recalls
from pe_spatial.language.regions import RegionClassifier
from pe_spatial.language.variants import CoreConfig, TextConfig

SIDE = 64
CONFIG = CoreConfig(
    vision=replace(DEMO_VARIANTS["pe_synthetic_xs8_192"], img_size=SIDE),
    text=TextConfig(context_length=32, width=128, depth=2, num_heads=2),
    output_dim=64,
)
World = list[tuple[np.ndarray, list[Thing]]]


def build() -> PECore:
    """Return a PE-Core whose trunk is the encoder that ships."""
    model = PECore(CONFIG)
    state = from_pretrained("pe_synthetic_xs8_192").state_dict()
    positions, grid = state["pos_embed"], CONFIG.vision.grid_size
    patches = resize_pos_embed(positions[:, 1:].unflatten(1, (24, 24)), (grid, grid), mode="bilinear")
    state["pos_embed"] = torch.cat((positions[:, :1], patches.flatten(1, 2)), dim=1)
    model.visual.encoder.load_state_dict(state)
    return model


def sample(world: World, rng: random.Random) -> tuple[Tensor, str]:
    """Return a random crop (3, S, S) of one object or two, none of which is left out, and its caption."""
    while True:
        rgb, things = rng.choice(world)
        chosen = rng.sample(things, min(len(things), 1 if rng.random() < 0.65 else 2))
        if chosen and not any(thing.name in LEFT_OUT for thing in chosen):
            pixels, text = crop_of(rgb, chosen, rng.uniform(1.0, 1.6), rng.random() < 0.5)
            return squash(pixels, CONFIG.vision), text


def train(model: PECore, world: World, *, steps: int, batch: int, lr: float) -> None:
    rng = random.Random(0)
    trunk = {id(parameter) for parameter in model.visual.encoder.parameters()}
    rest = [parameter for parameter in model.parameters() if id(parameter) not in trunk]
    groups = [dict(params=list(model.visual.encoder.parameters()), lr=0.3 * lr), dict(params=rest, lr=lr)]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.05, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, [0.3 * lr, lr], total_steps=steps, pct_start=0.1)
    start = time.process_time()
    for step in range(steps):
        images, texts = zip(*(sample(world, rng) for _ in range(batch)), strict=True)
        ids = model.tokenizer(texts)
        with torch.autocast("cpu", torch.bfloat16):
            image_features, text_features, scale = model(torch.stack(images), ids[:, : int(ids.argmax(1).max()) + 1])
        logits = scale.float() * image_features.float() @ text_features.float().T
        same = torch.tensor([[a == b for b in texts] for a in texts]).float()
        targets = same / same.sum(1, keepdim=True)
        loss = (F.cross_entropy(logits, targets) + F.cross_entropy(logits.T, targets)) / 2
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        model.logit_scale.data.clamp_(max=4.6)  # 100
        if step % 50 == 49:
            seconds = time.process_time() - start
            print(f"{step + 1}/{steps} loss {loss.item():.3f} scale {scale.item():.1f} {seconds:.0f} s", flush=True)


@torch.inference_mode()
def test(model: PECore, world: World) -> None:
    """Print accuracies and recalls on unseen scenes, and chance beside them."""
    objects = [(rgb, thing) for rgb, things in world for thing in things]
    images = torch.stack([squash(crop_of(rgb, [thing], 1.2, False)[0], CONFIG.vision) for rgb, thing in objects])
    features = F.normalize(torch.cat([model.encode_image(part) for part in images.split(64)]), dim=-1)
    names = [thing.name for _, thing in objects]
    report(model, features, names, "objects of unseen scenes")
    unseen = [i for i, name in enumerate(names) if name in LEFT_OUT]
    report(model, features[unseen], [names[i] for i in unseen], "of them pairs that were never seen")
    templates = [f"a {color} {{}}" for color in COLORS]
    for by in ("tokens", "crops"):
        regions, right, number = RegionClassifier(model, SHAPES, templates=templates, by=by, side=192), 0, 0
        for rgb, things in world:
            boxes = np.array([thing.box for thing in things], np.float32).reshape(-1, 4)
            labels = [SHAPES.index(thing.name.split()[1]) for thing in things]
            right += int((regions(rgb, boxes).argmax(1) == labels).sum())
            number += len(things)
        print(f"shape of a true box in the complete image, by {by}: {100 * right / number:.1f} (chance 20.0)")
    rng = random.Random(1)
    pairs = [(rgb, rng.sample(things, 2)) for rgb, things in world if len(things) > 1]
    crops, texts = zip(*(crop_of(rgb, two, 1.2, False) for rgb, two in pairs), strict=True)
    images = torch.stack([squash(pixels, CONFIG.vision) for pixels in crops])
    features = F.normalize(torch.cat([model.encode_image(part) for part in images.split(64)]), dim=-1)
    found = recalls(embed_texts(model, texts) @ features.T, range(len(texts)), texts)
    chance = [100 * k / len(texts) for k in (1, 5, 10)]
    print(f"{len(texts)} crops of two objects and their captions (chance R@1, 5, 10: {chance})")
    print(*(f"  {name} {100 * value:.1f}" for name, value in found.items()), sep="\n")


def report(model: PECore, features: Tensor, names: list[str], title: str) -> None:
    shapes = [name.split()[1] for name in names]
    parts = [("color and shape", CLASSES, names, ["a {}"]), ("shape", SHAPES, shapes, [f"a {c} {{}}" for c in COLORS])]
    for what, classes, truth, templates in parts:
        scores = features @ class_embeddings(model, classes, templates).T
        found = accuracy(scores, torch.tensor([classes.index(name) for name in truth]))
        print(f"{len(names)} {title}, {what}: acc1 {100 * found.acc1:.1f} (chance {100 / len(classes):.1f})")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("world", type=Path)
    parser.add_argument("--out", type=Path, required=True, help="weights to write, or to test if they exist")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--batch", type=int, default=96)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    if args.out.exists():
        model = PECore.from_pretrained(args.out)
    else:
        model = build()
        train(model.train(), read_world(args.world, "train"), steps=args.steps, batch=args.batch, lr=1e-3)
        save_core(model.eval(), args.out)
    test(model, read_world(args.world, "val"))


if __name__ == "__main__":
    main()
