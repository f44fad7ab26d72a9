"""Score predicted object masks of videos: J, F and their mean J&F, as DAVIS's evaluator or as vos-benchmark does.

python tools/eval_vos.py DAVIS predictions --json scores.json --csv objects.csv
python tools/eval_vos.py sav_val predictions --protocol vos-benchmark --workers 8

GT_DIR is a root of DAVIS 2016 or 2017, YouTube-VOS (one split), MOSE (one split) or SA-V, or a folder of sequences.
PRED_DIR holds <sequence>/<frame>.png, object ids as pixels; for SA-V <video>/<object>/<frame>.png, binary.
Scores are fractions. Nothing is reused from an earlier run.
"""

import argparse
import csv
import dataclasses
import io
import json
import math
import os
from pathlib import Path
from typing import Any

from pe_spatial.atomic import atomic_write
from pe_spatial.errors import ConfigError, DatasetError
from pe_spatial.tracking.vos.evaluation import COUNTS, PROTOCOLS, Evaluation, evaluate, read_sequences


def as_json(evaluation: Evaluation) -> str:
    """Return every field of the result; a decay that is not a number becomes null."""

    def finite(node: Any) -> Any:
        if isinstance(node, dict):
            return {key: finite(value) for key, value in node.items()}
        return None if isinstance(node, float) and math.isnan(node) else node

    return json.dumps(finite(dataclasses.asdict(evaluation)), indent=1, allow_nan=False)


def as_csv(evaluation: Evaluation) -> str:
    """Return one line for each object."""
    text = io.StringIO()
    columns = list(next(iter(evaluation.per_object.values())))
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["Sequence", *columns])
    for name, values in evaluation.per_object.items():
        writer.writerow([name, *(f"{values[key]:.6f}" for key in columns)])
    return text.getvalue()


def write(path: Path, text: str) -> None:
    try:
        with atomic_write(path) as unfinished:
            unfinished.write_text(text)
    except OSError as error:
        raise DatasetError(f"cannot write {path}: {error}") from error


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("gt_dir", metavar="GT_DIR")
    parser.add_argument("pred_dir", metavar="PRED_DIR")
    parser.add_argument("--sequences", type=Path, metavar="FILE", help="names of the sequences to score, one a line")
    parser.add_argument("--protocol", choices=PROTOCOLS, default="davis", help="default davis")
    parser.add_argument("--json", type=Path, metavar="OUT", help="scores globally, per sequence, object and frame")
    parser.add_argument("--csv", type=Path, metavar="OUT", help="scores per object")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes (default: one for each core)")
    parser.add_argument(
        "--official-decay", action="store_true", help="the decay as DAVIS's evaluator has it: wrong from 256 frames on"
    )


def run(args: argparse.Namespace) -> None:
    if args.workers < 1:
        raise ConfigError(f"--workers {args.workers} must be at least 1")
    evaluation = evaluate(
        args.gt_dir,
        args.pred_dir,
        sequences=read_sequences(args.sequences) if args.sequences else None,
        protocol=args.protocol,
        workers=args.workers,
        official_decay=args.official_decay,
        progress=True,
    )
    if args.json:
        write(args.json, as_json(evaluation))
    if args.csv:
        write(args.csv, as_csv(evaluation))
    names = evaluation.global_results
    print(f"{len(evaluation.per_sequence)} sequences, {len(evaluation.per_object)} objects, protocol {args.protocol}\n")
    print(f"| {' | '.join(names)} |\n|{'---|' * len(names)}")
    print(f"| {' | '.join(f'{value:.3f}' for value in names.values())} |")
    rules = [f"{count} {COUNTS[name]}" for name, count in evaluation.counts.items() if count]
    print("".join(f"\n{rule}" for rule in rules))
