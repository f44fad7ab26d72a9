r"""Show models in the browser: detect, depth, track, label, several tasks together, features, compare.

pe-spatial app
pe-spatial app --demo                   # with the detector of `make demo`, which is trained first if there is none
pe-spatial app --words PE-Core-B16-224  # where a phrase is, in the tab Features
pe-spatial app --detector work_dirs/demo/iter_350.pth --depth DEPTH.pth --tracker TRACKER.pth
pe-spatial app --together DETECTOR.pth DEPTH.pth TRACKER.pth --size 512      # on one encoder (docs/multitask.md)
pe-spatial app --encoder pe_spatial_s16_512 timm:vit_small_patch14_dinov2.lvd142m work_dirs/NAME/iter_100.pth

Without options it shows the features of the encoder in the package. The page is served to this machine alone unless
--host says otherwise; it has no password, and asks no other server for anything. One job runs at a time.
"""

from __future__ import annotations

import argparse
import os
import socket
import threading
from pathlib import Path

from pe_spatial.cli.arguments import add_device, choose_device, without_prints
from pe_spatial.cli.main import run_command
from pe_spatial.errors import ConfigError

TASKS = {"detector": "detection", "depth": "depth", "tracker": "tracking"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    for name in TASKS:
        parser.add_argument(f"--{name}", metavar="CHECKPOINT", help=f"checkpoint of a {name} that `train` wrote")
    together = "checkpoints on one frozen encoder, which runs once for all"
    parser.add_argument("--together", nargs="+", default=[], metavar="CHECKPOINT", help=together)
    parser.add_argument("--size", type=int, metavar="PIXELS", help="side of the square that they all get")
    encoders = "encoders to look at: a variant, timm:NAME, or a checkpoint (default: the one in the package)"
    parser.add_argument("--encoder", nargs="+", default=["pe_synthetic_xs8_192"], metavar="ENCODER", help=encoders)
    demo = "show the detector of the demo, work_dirs/demo; without one, train it first: about ten minutes"
    parser.add_argument("--demo", action="store_true", help=demo)
    words = "PE-Core that shows where a phrase is: a name such as PE-Core-B16-224, or a file"
    parser.add_argument("--words", metavar="MODEL", help=words)
    labels = "folder of the projects of the tab Label (default: labels)"
    parser.add_argument("--labels", type=Path, default=Path("labels"), metavar="FOLDER", help=labels)
    parser.add_argument("--host", default="127.0.0.1", help="address to serve at; 0.0.0.0 is for everyone")
    parser.add_argument("--port", type=int, default=7860)
    parser.add_argument("--max-upload", type=float, default=50, metavar="MB", help="largest file")
    parser.add_argument("--max-frames", type=int, default=300, metavar="FRAMES", help="longest video")
    add_device(parser)


def check_address(host: str, port: int) -> None:
    """Raise ConfigError if nothing can be served there."""
    try:
        family = socket.getaddrinfo(host, port)[0][0]
        socket.create_server((host, port), family=family).close()
    except (OSError, OverflowError) as error:
        reason = str(getattr(error, "strerror", None) or error).partition(" (")[0].rstrip(".")
        raise ConfigError(f"cannot serve at {host}:{port} ({reason}); give another --host or --port") from error


def demo_detector() -> str:
    """Return the checkpoint of the demo in its folder; the demo runs if there is none."""
    folder = Path("work_dirs/demo")
    if not any(folder.glob("iter_*.pth")):
        run_command("demo", ["--work-dir", str(folder)])
    print(f"images to upload: {folder / 'world' / 'val'}")
    return str(max(folder.glob("iter_*.pth"), key=lambda path: path.stat().st_mtime))


def run(args: argparse.Namespace) -> None:
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    check_address(args.host, args.port)
    if args.demo:
        if args.detector:
            raise ConfigError("--demo shows its own detector; omit --detector")
        args.detector = demo_detector()
    with without_prints():
        from pe_spatial.app.models import Limits, load_models
        from pe_spatial.app.page import build_page, serve

        limits = Limits(megabytes=args.max_upload, max_frames=args.max_frames)
        checkpoints = {task: getattr(args, name) for name, task in TASKS.items()}
        models = load_models(checkpoints, args.encoder, device=choose_device(args), limits=limits,
                             labels=args.labels, together=args.together, size=args.size, words=args.words)  # fmt: skip
    page = build_page(models)
    address = serve(page, models, host=args.host, port=args.port)
    print(f"{address}  (Ctrl-C ends it)", flush=True)
    try:
        threading.Event().wait()
    finally:
        page.close(verbose=False)
