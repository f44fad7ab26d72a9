"""Draw docs/images/overview.png: detections, depth, tracks and features of several layers, on the embedded world.

make demo
pe-spatial render_synthetic work_dirs/depth_world --train 400 --val 60 --size 192 192
pe-spatial train projects/nyu_depth/synthetic_dpt.py
python docs/make_overview.py --detector work_dirs/demo/iter_350.pth --depth work_dirs/synthetic_dpt/iter_200.pth

The scenes belong to the split `test`, which nothing was trained on. Tracks and features need no training at all.
"""

import argparse
from pathlib import Path

import matplotlib
import numpy as np
import torch
from matplotlib.font_manager import FontProperties, findfont
from mmdet.structures import DetDataSample
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from PIL import Image, ImageDraw, ImageFont
from torch.nn.functional import interpolate

import pe_spatial.depth  # noqa: F401  (registers)
from pe_spatial import from_pretrained
from pe_spatial.depth.inference import DepthPredictor
from pe_spatial.synthetic import CATEGORIES, SPLITS, render_frame, sample_scene
from pe_spatial.tracking.zero_shot import ZeroShotTracker

ROOT = Path(__file__).resolve().parents[1]
VARIANT = "pe_synthetic_xs8_192"
SCENES, FILM, TIMES = (4, 11, 20), 8, (0, 6, 11)  # numbers in the split; frames shown of twelve
LAYERS = (0, 2, 4)
SEEN, DRAWN, CELL = 192, 504, 252  # sides in pixels: of the networks' images, of drawings, in the figure
GAP, MIDDLE, HEAD = 8, 28, 46
COLORS = [(230, 57, 70), (255, 183, 3), (33, 158, 188), (106, 76, 147), (82, 183, 136), (244, 132, 95)]


def font(size, weight="normal"):
    return ImageFont.truetype(findfont(FontProperties(family="DejaVu Sans", weight=weight)), size)


def resized(image, side):
    return np.asarray(Image.fromarray(image).resize((side, side), Image.Resampling.LANCZOS))


def blend(rgb, mask, color):
    """Color the pixels of `mask`, with a light outline."""
    rgb[mask] = (0.45 * rgb[mask] + 0.55 * np.array(color)).astype(np.uint8)
    inner = mask.copy()
    for axis in (0, 1):
        inner &= np.roll(mask, 3, axis) & np.roll(mask, -3, axis)
    rgb[mask & ~inner] = color


def detect(images, checkpoint):
    """Return the images with boxes, masks and categories of the demo's Cascade Mask R-CNN."""
    cfg = Config.fromfile(ROOT / "configs/pe_demo_cascade_synthetic.py")
    init_default_scope("mmdet")
    model = MODELS.build(cfg.model).eval()
    model.load_state_dict(torch.load(checkpoint, map_location="cpu", weights_only=False)["state_dict"])
    scale = SEEN / DRAWN
    meta = dict(ori_shape=(DRAWN, DRAWN), img_shape=(SEEN, SEEN), scale_factor=(scale, scale))
    drawn = []
    for image in images:
        bgr = torch.from_numpy(resized(image, SEEN)[..., ::-1].copy()).permute(2, 0, 1)
        with torch.no_grad():
            (result,) = model.test_step(dict(inputs=[bgr], data_samples=[DetDataSample(metainfo=meta)]))
        found = result.pred_instances[result.pred_instances.scores > 0.5]
        rgb = image.copy()
        for label, mask in zip(found.labels.tolist(), found.masks.numpy(), strict=True):
            blend(rgb, mask, COLORS[label])
        canvas = Image.fromarray(rgb)
        pen = ImageDraw.Draw(canvas)
        for label, box in zip(found.labels.tolist(), found.bboxes.tolist(), strict=True):
            pen.rectangle(box, outline=COLORS[label], width=4)
            place = (box[0] + 4, max(box[1] - 32, 0))
            pen.rectangle(pen.textbbox(place, CATEGORIES[label], font(28)), fill=COLORS[label])
            pen.text(place, CATEGORIES[label], "white", font(28))
        drawn.append(np.asarray(canvas))
    return drawn


def depths(images, checkpoint):
    """Return color maps of the predicted depth, red is near."""
    predict = DepthPredictor(Config.fromfile(ROOT / "projects/nyu_depth/synthetic_dpt.py"), checkpoint)
    maps = predict([resized(image, SEEN) for image in images])
    colors = matplotlib.colormaps["Spectral"]
    drawn = []
    for depth in maps:
        smooth = np.asarray(Image.fromarray(depth.squeeze().astype(np.float32)).resize((DRAWN, DRAWN), Image.BICUBIC))
        low, high = np.percentile(smooth, (1, 99))
        drawn.append((colors((smooth - low) / (high - low))[..., :3] * 255).astype(np.uint8))
    return drawn


def tracks():
    """Return frames of a film with the masks that label propagation carries on from the first."""
    scene = sample_scene((0, SPLITS.index("test"), FILM), duration=2.0)
    frames = [render_frame(scene, 2.0 * t / (TIMES[-1] or 1), (DRAWN, DRAWN)) for t in range(TIMES[-1] + 1)]
    backbone = dict(type="PerceptionEncoder", variant=VARIANT, init_cfg=dict(type="Pretrained", checkpoint="released"))
    tracker = ZeroShotTracker(backbone, protocol="aligned", size=2 * SEEN)
    film = [(str(t), frame.rgb) for t, frame in enumerate(frames)]
    drawn = []
    for name, (mask,) in tracker.track(film, frames[0].instances.astype(np.uint8)):
        rgb = frames[int(name)].rgb.copy()
        for i in np.unique(mask[mask > 0]):
            blend(rgb, mask == i, COLORS[i % len(COLORS)])
        drawn.append(rgb)
    return [drawn[t] for t in TIMES]


def features(image):
    """Return the first three principal components of each layer's map, as colors."""
    encoder = from_pretrained(VARIANT, geometry="timm", out_indices=LAYERS)
    pixels = torch.from_numpy(resized(image, 2 * SEEN).copy()).permute(2, 0, 1)[None] / 127.5 - 1
    drawn = []
    for one in encoder.float()(pixels):
        tokens = one[0].flatten(1).T.detach()
        tokens = tokens - tokens.mean(0)
        three = tokens @ torch.linalg.svd(tokens, full_matrices=False).Vh[:3].T  # (N, 3)
        low, high = (three.quantile(q, dim=0) for q in (0.02, 0.98))
        colors = ((three - low) / (high - low)).clamp(0, 1).T.reshape(1, 3, *one.shape[-2:])
        smooth = interpolate(colors, (DRAWN, DRAWN), mode="bicubic").clamp(0, 1)[0]
        drawn.append((smooth.permute(1, 2, 0).numpy() * 255).astype(np.uint8))
    return drawn


def main(args):
    images = [render_frame(sample_scene((0, SPLITS.index("test"), i)), 0.0, (DRAWN, DRAWN)).rgb for i in SCENES]
    layers = ", ".join(str(i + 1) for i in LAYERS)
    groups = [
        ("Detection", "Cascade Mask R-CNN", detect(images, args.detector)),
        ("Depth", "DPT on the frozen encoder", depths(images, args.depth)),
        ("Tracking", "label propagation, no training; first, middle and last frame", tracks()),
        ("Features", f"PCA of blocks {layers} of the first image", features(images[0])),
    ]
    half = 3 * CELL + 2 * GAP
    canvas = Image.new("RGB", (2 * half + MIDDLE, 2 * (HEAD + CELL) + GAP), "white")
    pen = ImageDraw.Draw(canvas)
    for n, (title, subtitle, cells) in enumerate(groups):
        x, y = n % 2 * (half + MIDDLE), n // 2 * (HEAD + CELL + GAP)
        pen.text((x, y + 12), title, "black", font(22, "bold"))
        pen.text((x + pen.textlength(title, font(22, "bold")) + 12, y + 16), subtitle, (110, 110, 110), font(18))
        for k, cell in enumerate(cells):
            canvas.paste(Image.fromarray(resized(cell, CELL)), (x + k * (CELL + GAP), y + HEAD))
    canvas.save(args.out, optimize=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--detector", type=Path, required=True, help="checkpoint of make demo")
    parser.add_argument("--depth", type=Path, required=True, help="checkpoint of projects/nyu_depth/synthetic_dpt.py")
    parser.add_argument("--out", type=Path, default=ROOT / "docs/images/overview.png")
    main(parser.parse_args())
