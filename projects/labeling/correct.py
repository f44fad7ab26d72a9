"""J&F of the labels of a real video with one object: from the mask of its first frame, then after each correction.

python projects/labeling/correct.py TRACKER.pth DAVIS libby

A correction is the true mask of the frame that the project offers as the one most worth a look.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import pe_spatial
from pe_spatial.labeling.project import LabelProject
from pe_spatial.tracking.sam2.session import Drawn
from pe_spatial.tracking.vos.evaluation import evaluate
from pe_spatial.tracking.vos.masks import read_mask, write_mask


def score(project: LabelProject, masks: Path, folder: Path) -> str:
    """Write the labels as predictions, and return J&F, J and F by DAVIS' protocol, in percent."""
    for t, path in enumerate(sorted(masks.glob("*.png"))):
        write_mask(folder / masks.name / path.name, project.session.mask(t))
    found = evaluate(masks.parent, folder, sequences=[masks.name], protocol="davis", workers=1).global_results
    return ", ".join(f"{name} {100 * found[f'{name}-Mean']:.1f}" for name in ("J&F", "J", "F"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tracker")
    parser.add_argument("root", type=Path, help="videos in DAVIS' layout")
    parser.add_argument("sequence")
    parser.add_argument("--corrections", type=int, default=3)
    args = parser.parse_args()
    masks = args.root / "Annotations" / "480p" / args.sequence
    truth = sorted(masks.glob("*.png"))
    tracker = pe_spatial.load(args.tracker).start()
    with tempfile.TemporaryDirectory() as scratch:
        video = args.root / "JPEGImages" / "480p" / args.sequence
        project = LabelProject(Path(scratch, "labels"), video, tracker, max_frames=len(truth))
        frame = 0
        for number in range(args.corrections + 1):
            for _ in project.prompt(frame, Drawn(1, read_mask(truth[frame]) == 1)):
                pass
            for _ in project.track():
                pass
            what = f"after a correction on frame {frame}" if number else "from the first mask"
            print(f"{what}: {score(project, masks, Path(scratch, str(number)))}", flush=True)
            frame = project.keyframes(1)[0].frame
        project.session.close()


if __name__ == "__main__":
    main()
