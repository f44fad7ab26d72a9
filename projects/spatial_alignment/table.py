"""Print the paper's table (NeurIPS version, Tab. 36) for runs of this project: layers, and what each run made of them.

python projects/spatial_alignment/table.py work_dirs/core_only work_dirs/masks_only work_dirs/align_synthetic

The first column is the encoder before the alignment, the start of the first run; the others are the ends of the runs.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="work dirs of runs with AlignmentProgressHook")
    args = parser.parse_args()
    histories = [json.loads((run / "progress.json").read_text())["measured"] for run in args.runs]
    columns = {"start": histories[0][0], **{run.name: h[-1] for run, h in zip(args.runs, histories, strict=True)}}
    metrics = list(histories[0][0]["summary"])
    print(f"| layer | {' | '.join(f'{metric}: {name}' for metric in metrics for name in columns)} |")
    print("|---" * (1 + len(metrics) * len(columns)) + "|")
    for layer in reversed(histories[0][0]["layers"]):
        values = [entry["layers"][layer][metric] for metric in metrics for entry in columns.values()]
        print(f"| {layer} | {' | '.join(f'{value:.3g}' for value in values)} |")


if __name__ == "__main__":
    main()
