"""Draw docs/images/overview.png: detections, depth, tracks and features of several layers, on the synthetic dataset.

make demo
pe-spatial render_synthetic work_dirs/depth_world --train 400 --val 60 --size 192 192
pe-spatial train projects/nyu_depth/synthetic_dpt.py
python docs/make_overview.py --detector work_dirs/demo/iter_350.pth --depth work_dirs/synthetic_dpt/iter_200.pth

The scenes belong to the split `test`, which nothing was trained on.
"""

import argparse
from pathlib import Path

import cv2
import matplotlib
import numpy as np
import torch
from matplotlib.font_manager import FontProperties, findfont
from mmdet.structures import DetDataSample
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from PIL import Image, ImageDraw, ImageFont

import pe_spatial.depth  # noqa: F401  (registers)
from pe_spatial.depth.inference import DepthPredictor
from pe_spatial.features.extract import FeatureExtractor, load_encoder
from pe_spatial.features.show import Colors
from pe_spatial.synthetic import CATEGORIES, SPLITS, render_frame, sample_scene
from pe_spatial.tracking.zero_shot import ZeroShotTracker

ROOT = Path(__file__).resolve().parents[1]
VARIANT = "pe_synthetic_xs8_192"
SCENES, FILM, TIMES = (13, 26, 19), 22, (0, 6, 11)  # numbers in the split; frames shown of twelve
LAYERS = (0, 2, 4)
SEEN, DRAWN, CELL, GAP, MIDDLE, HEAD = 192, 472, 236, 8, 28, 46  # pixels
COLORS = [(230, 57, 70), (255, 183, 3), (33, 158, 188), (106, 76, 147), (82, 183, 136), (244, 132, 95)]


def font(size, weight="normal"):
    return ImageFont.truetype(findfont(FontProperties(family="DejaVu Sans", weight=weight)), size)


def resized(image, side):
    return np.array(Image.fromarray(image).resize((side, side), Image.Resampling.BICUBIC))


def shot(number, time=0.0):
    return render_frame(sample_scene((0, SPLITS.index("test"), number)), time, (DRAWN, DRAWN))


def blend(rgb, mask, color):
    """Color the pixels of `mask`, with an outline."""
    rgb[mask] = (0.45 * rgb[mask] + 0.55 * np.array(color)).astype(np.uint8)
    inner = np.logical_and.reduce([np.roll(mask, shift, axis) for shift in (-3, 3) for axis in (0, 1)])
    rgb[mask & ~inner] = color


def detect(images, checkpoint):
    """Return the images with boxes, masks and categories from the detector of the demo."""
    init_default_scope("mmdet")
    model = MODELS.build(Config.fromfile(ROOT / "configs/pe_demo_cascade_synthetic.py").model).eval()
    model.load_state_dict(torch.load(checkpoint, map_location="cpu", weights_only=False)["state_dict"])
    meta = dict(ori_shape=(DRAWN, DRAWN), img_shape=(SEEN, SEEN), scale_factor=(SEEN / DRAWN, SEEN / DRAWN))
    for image in images:
        bgr = torch.from_numpy(resized(image, SEEN)[..., ::-1].copy()).permute(2, 0, 1)
        with torch.no_grad():
            (result,) = model.test_step(dict(inputs=[bgr], data_samples=[DetDataSample(metainfo=meta)]))
        objects = result.pred_instances[result.pred_instances.scores > 0.4]
        rgb, labels = image.copy(), objects.labels.tolist()
        for label, mask in zip(labels, objects.masks.numpy(), strict=True):
            blend(rgb, mask, COLORS[label])
        canvas = Image.fromarray(rgb)
        pen = ImageDraw.Draw(canvas)
        boxes = list(zip(labels, objects.bboxes.tolist(), strict=True))
        for label, box in boxes:
            pen.rectangle(box, outline=COLORS[label], width=4)
        for label, box in boxes:
            place, text = (box[0] + 6, max(box[1] - 32, 0)), CATEGORIES[label]
            pen.text(place, text, "white", font(26), stroke_width=5, stroke_fill=COLORS[label])
        yield np.asarray(canvas)


def depths(images, checkpoint):
    """Return color maps of the predicted depth."""
    predict = DepthPredictor(Config.fromfile(ROOT / "projects/nyu_depth/synthetic_dpt.py"), checkpoint)
    for depth in predict([resized(image, SEEN) for image in images]):
        smooth = resized(depth.squeeze(), DRAWN)
        low, high = np.percentile(smooth, (1, 99))
        yield (matplotlib.colormaps["Spectral"]((smooth - low) / (high - low))[..., :3] * 255).astype(np.uint8)


def tracks():
    """Return frames of a film with the masks that label propagation carries over from the first."""
    frames = [shot(FILM, 2.0 * t / TIMES[-1]) for t in range(TIMES[-1] + 1)]
    backbone = dict(type="PerceptionEncoder", variant=VARIANT, init_cfg=dict(type="Pretrained", checkpoint="released"))
    tracker = ZeroShotTracker(backbone, protocol="aligned", size=2 * SEEN)
    film = (("", frame.rgb) for frame in frames)
    for t, (_, (mask,)) in enumerate(tracker.track(film, frames[0].instances.astype(np.uint8))):
        if t in TIMES:
            for i in np.unique(mask[mask > 0]):
                blend(frames[t].rgb, mask == i, COLORS[i % len(COLORS)])
            yield frames[t].rgb


def features(image):
    """Return the first three principal components of the map of each layer, as colors."""
    encoder = load_encoder(VARIANT, "released", layers=LAYERS, geometry="timm")
    maps = FeatureExtractor(encoder, long_side=2 * SEEN).maps(image, "the scene")
    for colors in Colors([maps], "images")(maps):
        yield resized(colors, DRAWN)


def main(args):
    images = [shot(number).rgb for number in SCENES]
    groups = [
        ("Detection", "Cascade Mask R-CNN", detect(images, args.detector)),
        ("Depth", "DPT on the frozen encoder; red is near", depths(images, args.depth)),
        ("Tracking", "label propagation, no training; first, middle, last frame", tracks()),
        ("Features", f"PCA of layers {', '.join(map(str, LAYERS))} of the first image", features(images[0])),
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
    cv2.imwrite(str(args.out), np.asarray(canvas)[..., ::-1], [cv2.IMWRITE_PNG_COMPRESSION, 9])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--detector", required=True, help="checkpoint of make demo")
    parser.add_argument("--depth", required=True, help="checkpoint of projects/nyu_depth/synthetic_dpt.py")
    parser.add_argument("--out", default=ROOT / "docs/images/overview.png")
    main(parser.parse_args())
