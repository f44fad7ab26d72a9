"""Score predicted object masks of videos: J, F and their mean J&F, by the rules of DAVIS or of vos-benchmark.

pe-spatial eval_vos DAVIS predictions --json scores.json --csv objects.csv
pe-spatial eval_vos sav_val predictions --protocol vos-benchmark --workers 8

GT_DIR is the root of DAVIS 2016 or 2017, YouTube-VOS (one split), MOSE (one split) or SA-V, or a folder of sequences.
PRED_DIR holds <sequence>/<frame>.png with object ids as pixels; for SA-V <video>/<object>/<frame>.png, binary.
Without --sequences, sequences without predictions are counted and not scored. Printed scores are in percent,
those in files are between 0 and 1. Nothing is cached between calls.
"""

import argparse
import os
from pathlib import Path

from pe_spatial.atomic import write_file
from pe_spatial.errors import ConfigError, DatasetError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("gt_dir", metavar="GT_DIR", help="ground truth")
    parser.add_argument("pred_dir", metavar="PRED_DIR", help="predicted masks")
    parser.add_argument("--sequences", nargs="+", metavar="NAME", help="sequences to score, or a .txt file of names")
    parser.add_argument(
        "--protocol", default="davis", metavar="davis|vos-benchmark", help="scoring rules"
    )
    parser.add_argument("--json", type=Path, metavar="OUT", help="write scores: global, per sequence, object, frame")
    parser.add_argument("--csv", type=Path, metavar="OUT", help="write the scores per object")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes (default: one per core)")
    parser.add_argument("--official-decay", action="store_true", help="DAVIS's own decay, wrong from 256 frames on")


def run(args: argparse.Namespace) -> None:
    from pe_spatial.tracking.vos.evaluation import divide_sequences, evaluate, read_sequences

    if args.workers < 1:
        raise ConfigError(f"--workers is {args.workers}; it must be at least 1")
    missing: list[str] = []
    if args.sequences:
        sequences = read_sequences(args.sequences)
    else:
        sequences, missing = divide_sequences(args.gt_dir, args.pred_dir, protocol=args.protocol)
    rules = {name: getattr(args, name) for name in ("protocol", "workers", "official_decay")}
    evaluation = evaluate(args.gt_dir, args.pred_dir, sequences=sequences, progress=True, **rules)
    for path, convert in ((args.json, evaluation.to_json), (args.csv, evaluation.to_csv)):
        if path:
            try:
                write_file(path, convert())
            except OSError as error:
                raise DatasetError(f"cannot write {path}: {error}") from error
    means = evaluation.global_results
    print(f"{len(evaluation.per_sequence)} sequences, {len(evaluation.per_object)} objects, protocol {args.protocol}")
    print(f"scores in percent\n\n| {' | '.join(means)} |\n|{'---|' * len(means)}")
    print(f"| {' | '.join(f'{100 * value:.1f}' for value in means.values())} |")
    print("".join(f"\n{rule}" for rule in evaluation.rules()))
    if missing:
        count = f"{len(missing)} of {len(missing) + len(sequences)}"
        print(f"{count} sequences have no predictions and are not scored: {', '.join(missing)}")
