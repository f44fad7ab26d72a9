"""Classify images and videos by the names of classes, retrieve them by captions, search them by a phrase: no training.

pe-spatial zero_shot PHOTOS --model PE-Core-B16-224                   # a folder for each class, called by its name
pe-spatial zero_shot PHOTOS --classes cat,dog,"red fox" --csv predictions.csv
pe-spatial zero_shot imagenet/val --classes imagenet --templates imagenet --model PE-Core-L14-336
pe-spatial zero_shot VIDEOS --classes-file names.txt                         # videos: 8 frames of each
pe-spatial zero_shot val2017 --captions captions_val2017.json                # recall at 1, 5, 10 in both directions
pe-spatial zero_shot PHOTOS --query "a red cone on the floor" --out found.jpg

DATA is a folder of images or videos, or the .tar files of a WebDataset. As released: images are squashed to the square
of the pretraining, templates are averaged, and a video has the mean of its frames. Classes are matched with folders by
name, or by order where no name matches. Features for --query are kept in --cache, by what files and weights hold.
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pe_spatial.cli.arguments import add_device, choose_device, refuse
from pe_spatial.errors import ConfigError, DatasetError, listed

if TYPE_CHECKING:
    from torch import Tensor

    from pe_spatial.language.model import PECore

TOP, SHEET, CACHE = 12, "found.jpg", "work_dirs/zero_shot"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("data", type=Path, metavar="DATA", help="folder of images or videos, or of .tar files")
    model = "released name (PE-Core-T16-384, ... G14-448), or a file of weights"
    parser.add_argument("--model", default="PE-Core-B16-224", help=model)
    group = parser.add_argument_group("classification")
    group.add_argument("--classes", metavar="a,b,c", help="names of the classes, or imagenet (default: the folders')")
    group.add_argument("--classes-file", type=Path, metavar="FILE", help="one name, or FOLDER,NAME, per line")
    templates = "imagenet (80), simple (7), or a file with one per line, {} for the name (default: a photo of a {}.)"
    group.add_argument("--templates", metavar="NAME|FILE", help=templates)
    group.add_argument("--csv", type=Path, metavar="FILE", help="write the prediction for each image or video")
    group = parser.add_argument_group("retrieval")
    group.add_argument("--captions", type=Path, metavar="FILE", help="captions as COCO or MSR-VTT write them")
    group = parser.add_argument_group("search")
    group.add_argument("--query", nargs="+", metavar="PHRASE", help="show the images that fit a phrase best")
    group.add_argument("--top", type=int, metavar="N", help=f"images for each phrase (default: {TOP})")
    group.add_argument("--out", type=Path, help=f"sheet to write, .jpg or .png (default: {SHEET})")
    group.add_argument("--cache", type=Path, help=f"folder of kept features (default: {CACHE})")
    parser.add_argument("--batch", type=int, default=32, metavar="N", help="images, or videos, per forward pass")
    half = "compute in bfloat16"
    parser.add_argument("--bfloat16", action="store_true", help=half)
    add_device(parser)


def run(args: argparse.Namespace) -> None:
    classify = [f"--{name.replace('_', '-')}" for name in ("classes", "classes_file", "templates", "csv")
                if getattr(args, name) is not None]  # fmt: skip
    other = [f"--{name}" for name in ("captions", "query") if getattr(args, name) is not None]
    if len(other) + bool(classify) > 1:
        raise ConfigError(f"{', '.join((*other, *classify))} do not go together: classify, retrieve or search")
    if args.classes is not None and args.classes_file is not None:
        raise ConfigError("--classes and --classes-file both name the classes; give one of them")
    if args.query is None:
        refuse(args, "top", "out", "cache", because="without --query there is no use of")
    if args.batch < 1 or (args.top is not None and args.top < 1):
        raise ConfigError("--batch and --top must be at least 1")
    if args.captions is not None:
        retrieve(args)
    elif args.query is not None:
        search(args)
    else:
        classify_samples(args)


def load_model(args: argparse.Namespace) -> PECore:
    import torch

    from pe_spatial.language.model import PECore

    dtype = torch.bfloat16 if args.bfloat16 else torch.float32
    return PECore.from_pretrained(args.model, dtype=dtype).to(choose_device(args))


def embed_samples(args: argparse.Namespace, model: PECore, samples: list[Any], *, normalize_frames: bool) -> Tensor:
    from tqdm import tqdm

    from pe_spatial.language.embedding import embed

    with tqdm(total=len(samples), unit="sample") as bar:
        return embed(model, [sample.read for sample in samples], batch_size=args.batch, done=bar.update,
                     normalize_frames=normalize_frames)  # fmt: skip


def classify_samples(args: argparse.Namespace) -> None:
    import torch

    from pe_spatial.language.protocol import DEFAULT_TEMPLATE, accuracy, class_embeddings
    from pe_spatial.language.samples import find_samples, read_classes, read_templates, targets

    samples = find_samples(args.data)
    classes = read_classes(args.classes, args.classes_file, args.data, samples)
    names = list(classes.values())
    labels = targets(samples, classes, args.data)
    templates = read_templates(args.templates) or (DEFAULT_TEMPLATE,)
    model = load_model(args)
    classifier = class_embeddings(model, names, templates).cpu()
    scores = embed_samples(args, model, samples, normalize_frames=False) @ classifier.T
    if args.csv is not None:
        write_csv(args.csv, samples, names, labels, scores * model.logit_scale.exp().float().cpu())
        print(f"wrote {args.csv}")
    print(f"{len(samples)} samples, {len(names)} classes, {len(templates)} templates")
    if labels is None:
        print("no accuracy: the data has no class folders")
        return
    found = accuracy(scores, torch.tensor(labels))
    print(f"acc1 {100 * found.acc1:.2f}")
    print("acc5 -" if found.acc5 is None else f"acc5 {100 * found.acc5:.2f}")
    print(f"mean per class {100 * found.mean_per_class:.2f}")


def write_csv(path: Path, samples: list[Any], names: list[str], labels: list[int] | None, logits: Tensor) -> None:
    """Write a row for each sample: its class if known, the best class and its probability, and the best five."""
    from pe_spatial.atomic import atomic_write

    best = logits.softmax(-1).topk(min(5, len(names)), dim=-1)
    with atomic_write(path) as unfinished, unfinished.open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(("file", "class", "predicted", "probability", "best five"))
        for i, sample in enumerate(samples):
            chosen = [names[k] for k in best.indices[i].tolist()]
            own = "" if labels is None else names[labels[i]]
            table.writerow((sample.name, own, chosen[0], f"{best.values[i, 0]:.4f}", "; ".join(chosen)))


def retrieve(args: argparse.Namespace) -> None:
    from pe_spatial.language.protocol import embed_texts, recalls
    from pe_spatial.language.samples import read_captions

    samples, texts, owners = read_captions(args.captions, args.data)
    model = load_model(args)
    features = embed_samples(args, model, samples, normalize_frames=True)
    found = recalls(embed_texts(model, texts).cpu() @ features.T, owners, texts)
    print(f"{len(samples)} samples, {len(texts)} captions")
    print(*(f"{name} {100 * value:.2f}" for name, value in found.items()), sep="\n")


def search(args: argparse.Namespace) -> None:
    """Write a sheet of the images that fit each phrase best."""
    from PIL import Image
    from tqdm import tqdm

    from pe_spatial.atomic import atomic_write
    from pe_spatial.errors import one_of
    from pe_spatial.features.sheet import Strip, draw_strips
    from pe_spatial.images import image_suffixes, is_hidden, read_rgb
    from pe_spatial.language.cache import EmbeddingCache
    from pe_spatial.language.protocol import embed_texts

    out = args.out or Path(SHEET)
    one_of("the suffix of --out", out.suffix.lower(), [".jpg", ".png"])
    if not all(phrase.strip() for phrase in args.query):
        raise ConfigError("--query has an empty phrase; write what to look for")
    if not args.data.is_dir():
        raise DatasetError(f"there is no folder {args.data}; check the path")
    paths = [path for path in sorted(args.data.rglob("*"))
             if path.suffix.lower() in image_suffixes() and not is_hidden(path, args.data)]  # fmt: skip
    if not paths:
        raise DatasetError(f"{args.data} has no images ({', '.join(image_suffixes())})")
    model = load_model(args)
    with tqdm(total=len(paths), unit="image") as bar:
        cache = EmbeddingCache(model, args.cache or Path(CACHE))
        found, features, unreadable, new = cache.features(paths, batch_size=args.batch, done=bar.update)
    if not found:
        raise DatasetError(f"no image of {args.data} can be read, for example: {unreadable[0]}")
    print(f"{len(found)} images, {new} of them new; features are kept in {cache.path}")
    print(*(f"omitted: {reason}" for reason in unreadable), sep="\n", end="\n" * bool(unreadable))
    strips = []
    for phrase, scores in zip(args.query, embed_texts(model, args.query).cpu() @ features.T, strict=True):
        best = scores.topk(min(args.top or TOP, len(found)))
        shown = [(found[i], f"{score:.3f}") for i, score in zip(best.indices, best.values, strict=True)]
        print(f"{phrase}: {listed([f'{file.relative_to(args.data)} ({score})' for file, score in shown])}")
        strips.append(Strip(phrase, [(f"{score} {file.name}"[:30], square(read_rgb(file))) for file, score in shown]))
    with atomic_write(out) as unfinished:
        Image.fromarray(draw_strips(strips, columns=6, width=224)).save(unfinished, quality=90)
    print(f"wrote {out}")


def square(rgb: Any) -> Any:
    """Return an image on a white square."""
    import numpy as np

    height, width = rgb.shape[:2]
    side = max(height, width)
    canvas = np.full((side, side, 3), 255, np.uint8)
    y, x = (side - height) // 2, (side - width) // 2
    canvas[y : y + height, x : x + width] = rgb
    return canvas
