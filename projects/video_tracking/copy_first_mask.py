"""Score the baseline for every tracker: the first mask of each video, copied to all of its frames.

python projects/video_tracking/copy_first_mask.py work_dirs/video_world/instances/val
"""

import argparse
import shutil
import tempfile
from pathlib import Path

from pe_spatial.cli.main import errors_as_sentences
from pe_spatial.tracking.vos.evaluation import PROTOCOLS, evaluate, find_tracks


def main(args: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as copies:
        for track in find_tracks(args.gt_dir, sequences=None, protocol=args.protocol):
            folder = Path(copies, track.sequence, track.part or "")
            folder.mkdir(parents=True)
            for frame in track.frames:
                shutil.copy(track.folder / f"{track.frames[0]}.png", folder / f"{frame}.png")
        for name, value in evaluate(args.gt_dir, copies, protocol=args.protocol).global_results.items():
            print(f"{name} {100 * value:.1f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("gt_dir", help="annotations, as tools/eval_vos.py takes them")
    parser.add_argument("--protocol", choices=PROTOCOLS, default="davis")
    with errors_as_sentences(traceback=False):
        main(parser.parse_args())
