"""Show the installed versions, which features work with them, and what to install for the others.

pe-spatial doctor
"""

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    pass


def run(_: argparse.Namespace) -> None:
    from pe_spatial.integrations.environment import report

    for line in report():
        print(line, flush=True)
