"""Write text embeddings of class names, which an open-vocabulary detector has as its classifier.

pe-spatial embed_classes annotations/lvis_v1_val.json lvis.safetensors --model PE-Core-L14-336 --templates imagenet
pe-spatial embed_classes "red cone,blue box" other.safetensors --model MY_CORE.safetensors

CLASSES is a COCO or LVIS json (its categories, by id), a text file with one name per line, or names with commas. The
order is that of the labels. Train with model.roi_head.bbox_head.cls_predictor_cfg.embeddings=FILE; test a trained
detector on other classes with another FILE.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from pe_spatial.cli.arguments import add_device, choose_device


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("classes", metavar="CLASSES", help="annotations, a file with one name per line, or a,b,c")
    parser.add_argument("out", type=Path, metavar="OUT", help="file to write, .safetensors")
    parser.add_argument("--model", default="PE-Core-B16-224", help="released name, or a file of weights")
    templates = "imagenet (80), simple (7), or a file with one per line, {} for the name (default: a photo of a {}.)"
    parser.add_argument("--templates", metavar="NAME|FILE", help=templates)
    add_device(parser)


def run(args: argparse.Namespace) -> None:
    from pe_spatial.language.model import PECore
    from pe_spatial.language.protocol import DEFAULT_TEMPLATE
    from pe_spatial.language.samples import read_templates
    from pe_spatial.language.vocabulary import names_of, write_vocabulary

    names = names_of(args.classes)
    templates = read_templates(args.templates) or (DEFAULT_TEMPLATE,)
    model = PECore.from_pretrained(args.model).to(choose_device(args))
    write_vocabulary(args.out, model, names, templates, source=args.model)
    print(f"wrote {args.out}: {len(names)} classes, {len(templates)} templates, width {model.config.output_dim}")
