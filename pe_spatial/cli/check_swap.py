"""Swap the backbone of one config of every MMDetection and MMSegmentation family, train a step, predict, tabulate.

pe-spatial check_swap                               # all families; continues an interrupted sweep
pe-spatial check_swap --scope mmdet --family atss detr ssd
pe-spatial check_swap --write docs/swap.md          # the tables, from the results so far

Every family first runs with its own backbone, without pretrained weights, on two small images of noise. If that works,
it has to work with PE too, or be refused with a reason. The PE is small, because only the feature specs are checked.
"""

import argparse
import json
import signal
import sys
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--scope", choices=["mmdet", "mmseg", "all"], default="all", help="framework to check")
    parser.add_argument("--family", nargs="+", help="check only these families, even if they have results")
    results = "file of results, one line per family; it is extended"
    parser.add_argument("--results", default="work_dirs/check_swap.jsonl", help=results)
    parser.add_argument("--write", metavar="FILE", help="write the tables from the results instead of checking")


def run(args: argparse.Namespace) -> None:
    from pe_spatial.errors import ConfigError
    from pe_spatial.integrations.swap.check import check_in_process, families, format_report, verdict

    signal.signal(signal.SIGTERM, lambda *_: sys.exit("interrupted"))  # so that child processes end
    results = Path(args.results)
    results.parent.mkdir(parents=True, exist_ok=True)
    rows = [json.loads(line) for line in results.read_text().splitlines()] if results.is_file() else []
    scopes = ["mmdet", "mmseg"] if args.scope == "all" else [args.scope]
    wanted = [(s, family) for s in scopes for family in families(s) if not args.family or family in args.family]
    if args.family:
        unknown = set(args.family) - {family for _, family in wanted}
        if unknown:
            raise ConfigError(f"no family {', '.join(sorted(unknown))} in {args.scope}; docs/swap.md lists all of them")
        rows = [row for row in rows if (row["scope"], row["family"]) not in wanted]
        results.write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = {(row["scope"], row["family"]) for row in rows}
    for scope, family in wanted if args.family or not args.write else ():
        if (scope, family) in done:
            continue
        row = check_in_process(scope, family)
        rows.append(row)
        with results.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(f"{scope:6} {family:22} {verdict(row):22} {row['original']:.50} | {row.get('swapped', '')}", flush=True)
    if args.write:
        Path(args.write).write_text(format_report(rows))
    failed = sum(verdict(row) == "FAILS" for row in rows if (row["scope"], row["family"]) in wanted)
    if failed:
        sys.exit(f"{failed} families fail")
