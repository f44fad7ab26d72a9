"""tools/track.py: prompts from the command line, a video in and out, errors as one sentence."""

import os
import subprocess
import sys
from argparse import ArgumentTypeError, Namespace

import cv2
import numpy as np
import pytest
import torch
from helpers.repository import REPO
from PIL import Image

from pe_spatial.cli import track
from pe_spatial.cli.main import build_parser
from pe_spatial.encoder.files import CheckpointError
from pe_spatial.errors import ConfigError, DatasetError
from pe_spatial.tracking.sam2.model import build_pe_sam2
from pe_spatial.tracking.vos.masks import read_mask, write_mask

pytest.importorskip("sam2")

TRACKER = dict(
    variant=dict(img_size=64, patch_size=16, embed_dim=32, depth=1, num_heads=2),
    grid=4,
    d_model=32,
    mem_dim=8,
    layers=1,
    feedforward=32,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, randomize):
    """A config, the weights of its tracker, and a video as a folder and as a file."""
    path = tmp_path_factory.mktemp("track")
    (path / "config.py").write_text(f"model = dict(type='PESAM2', tracker={TRACKER!r})\n")
    model = randomize(build_pe_sam2(**TRACKER))
    model.sam_mask_decoder.pred_obj_score_head.layers[-1].bias.data.fill_(50)
    torch.save({"state_dict": {f"tracker.{k}": v for k, v in model.state_dict().items()}}, path / "tracker.pth")
    rng = np.random.default_rng(0)
    writer = cv2.VideoWriter(str(path / "clip.mp4"), cv2.VideoWriter_fourcc(*"mp4v"), 10, (64, 48))
    (path / "frames").mkdir()
    for t in range(4):
        frame = cv2.resize(rng.integers(0, 255, (4, 5, 3), np.uint8), (64, 48))
        Image.fromarray(frame).save(path / "frames" / f"{t:05d}.png")
        writer.write(frame)
    writer.release()
    mask = np.zeros((48, 64), np.uint8)
    mask[10:30, 10:30], mask[30:40, 40:60], mask[:2] = 3, 9, 255
    write_mask(path / "first.png", mask)
    return path


def arguments(folder, video, out, **prompts):
    """As the parser gives them."""
    given = dict(points=None, box=None, mask=None, masks=None) | prompts
    paths = dict(video=folder / video, config=str(folder / "config.py"), checkpoint=folder / "tracker.pth", out=out)
    return Namespace(**paths, **given, device="cpu")


def frames_of(path):
    capture = cv2.VideoCapture(str(path))
    frames = []
    while (frame := capture.read())[0]:
        frames.append(frame[1])
    return frames, capture.get(cv2.CAP_PROP_FPS)


def test_a_folder_from_masks_and_a_box_that_comes_later(folder, tmp_path, capsys):
    out = tmp_path / "new" / "out.mp4"
    prompts = dict(mask=[str(folder / "first.png")], box=[(2, 4, [5, 5, 40, 30])], masks=tmp_path / "m")
    track.run(arguments(folder, "frames", out, **prompts))
    assert "3 objects through 4 frames" in capsys.readouterr().out
    frames, fps = frames_of(out)
    assert (len(frames), frames[0].shape, fps) == (4, (48, 64, 3), 24)
    masks = [read_mask(tmp_path / "m" / f"{t:05d}.png") for t in range(4)]
    assert set(np.unique(masks[1])) <= {0, 3, 9}
    assert 4 in masks[2]
    assert list(out.parent.iterdir()) == [out]


def test_a_file_from_clicks(folder, tmp_path):
    out = tmp_path / "out.mp4"
    track.run(arguments(folder, "clip.mp4", out, points=[(0, 1, [20, 20]), (0, 1, [50, 40, 0])]))
    frames, fps = frames_of(out)
    assert (len(frames), fps) == (4, 10)


@pytest.mark.parametrize(
    ("points", "message"),
    [
        ([(0, 1, [70, 20])], r"point at \[70.0, 20.0\], outside the frame of 64x48"),
        ([(0, 1, [20, 20]), (7, 1, [20, 20])], "has 4 frames, so there is no frame 7"),
    ],
)
def test_an_error_leaves_no_file(folder, tmp_path, points, message):
    with pytest.raises(DatasetError, match=message):
        track.run(arguments(folder, "frames", tmp_path / "out.mp4", points=points))
    assert not list(tmp_path.iterdir())


def test_an_error_is_one_sentence_on_the_command_line(tmp_path):
    options = ["--config", "none.py", "--checkpoint", "none.pth", "--out", tmp_path / "out.mp4", "--box", "1@2:0,1,2,3"]
    done = subprocess.run(
        [sys.executable, REPO / "tools" / "track.py", tmp_path, *options],
        env={**os.environ, "PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr.startswith("error: none.py: No such file or directory")


def test_prompts_of_the_command_line(folder):
    numbered = track.numbered
    args = Namespace(
        points=[numbered(text, (2, 3)) for text in ("1:20,30.5", "1:50,40,0", "2@7:1,2,1")],
        box=[numbered("2@7:1,2,30,40", (4,))],
        mask=[f"5:{folder / 'first.png'}"],
    )
    prompts = track.read_prompts(args)
    assert {t: sorted(given) for t, given in prompts.items()} == {0: [1], 7: [2], 5: [3, 9]}
    assert (prompts[0][1].points, prompts[0][1].labels) == ([(20, 30.5), (50, 40)], [1, 0])
    assert (prompts[7][2].points, prompts[7][2].box) == ([(1, 2)], [1, 2, 30, 40])
    assert prompts[5][3].mask.sum() == 400


@pytest.mark.parametrize("text", ["20,30", "1:20", "1:20,30,1,1", "0:1,2", "255:1,2", "1@:1,2", "a:1,2", "1:1,b"])
def test_numbers_that_are_no_click(text):
    with pytest.raises(ArgumentTypeError, match="is not ID"):
        track.numbered(text, (2, 3))


def test_prompts_that_contradict_or_lack(tmp_path):
    empty = Namespace(points=None, box=None, mask=None)
    with pytest.raises(ConfigError, match="no object to track"):
        track.read_prompts(empty)
    twice = Namespace(points=None, box=[(0, 1, [1, 2, 3, 4])] * 2, mask=None)
    with pytest.raises(ConfigError, match="two prompts --box on frame 0"):
        track.read_prompts(twice)
    write_mask(tmp_path / "none.png", np.full((4, 4), 255, np.uint8))
    with pytest.raises(DatasetError, match=r"none\.png shows no object"):
        track.read_prompts(Namespace(points=None, box=None, mask=[str(tmp_path / "none.png")]))


@pytest.mark.parametrize("mode", ["P", "L", "1"])
def test_a_mask_of_0_and_255_is_object_1(tmp_path, mode):
    white = np.zeros((48, 64), np.uint8)
    white[10:30, 10:30] = 255
    image = Image.fromarray(white)
    if mode == "P":
        image.putpalette(bytes(range(256)) * 3)
    (image.convert("1") if mode == "1" else image).save(tmp_path / "m.png")
    prompts = track.read_prompts(Namespace(points=None, box=None, mask=[str(tmp_path / "m.png")]))
    assert np.array_equal(prompts[0][1].mask, white > 0)
    assert list(prompts[0]) == [1]


def test_a_smoothed_mask_is_refused(tmp_path):
    white = np.zeros((48, 64), np.uint8)
    white[10:30, 10:30] = 255
    Image.fromarray(cv2.GaussianBlur(white, (0, 0), 2)).save(tmp_path / "m.png")
    with pytest.raises(DatasetError, match=r"m\.png has \d+ gray values .* smoothed"):
        track.read_prompts(Namespace(points=None, box=None, mask=[str(tmp_path / "m.png")]))


def test_a_container_longer_than_its_frames_leaves_the_result(folder, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("pe_spatial.tracking.vos.clip.count_frames", lambda _: 12)
    capture = cv2.VideoCapture
    monkeypatch.setattr(
        "pe_spatial.video.cv2.VideoCapture",
        lambda path: Announcing(capture(path)) if path.endswith("clip.mp4") else capture(path),
    )
    out = tmp_path / "out.mp4"
    track.run(arguments(folder, "clip.mp4", out, points=[(0, 1, [20, 20]), (9, 1, [20, 20])]))
    assert len(frames_of(out)[0]) == 4
    assert any("announces 12" in message for message in caplog.messages)
    assert any("no frame 9" in message for message in caplog.messages)


class Announcing:
    """A video whose container announces 12 frames."""

    def __init__(self, capture):
        self.isOpened, self.read = capture.isOpened, capture.read
        self.get = lambda name: 12 if name == cv2.CAP_PROP_FRAME_COUNT else capture.get(name)


def test_the_config_comes_from_the_checkpoint(folder, tmp_path):
    file = torch.load(folder / "tracker.pth")
    torch.save({**file, "meta": dict(cfg=(folder / "config.py").read_text())}, tmp_path / "trained.pth")
    args = arguments(folder, "frames", tmp_path / "out.mp4", points=[(0, 1, [20, 20])])
    args.config, args.checkpoint = None, tmp_path / "trained.pth"
    track.run(args)
    assert len(frames_of(tmp_path / "out.mp4")[0]) == 4
    parser = build_parser("track")
    assert parser.parse_args(["cat.mp4", "--checkpoint", "a.pth", "--out", "o.mp4"]).config is None
    torch.save({**file, "meta": dict(cfg="model = dict(type='CascadeRCNN')")}, tmp_path / "detector.pth")
    args.checkpoint = tmp_path / "detector.pth"
    with pytest.raises(ConfigError, match=r"the config in .*detector\.pth has no model\.tracker"):
        track.run(args)
    args.checkpoint = folder / "tracker.pth"
    with pytest.raises(CheckpointError, match=r"tracker\.pth holds no config; .*--config"):
        track.run(args)


@pytest.mark.parametrize(
    ("changed", "error"),
    [
        (dict(video="absent.mp4"), "no video at .*absent.mp4"),
        (dict(checkpoint="absent.pth"), "no checkpoint at .*absent.pth"),
        (dict(device="cuda:99"), "--device is cuda:99, .* give cpu"),
        (dict(device="gpu"), "--device is gpu, .* give cpu"),
    ],
)
def test_what_is_missing_is_said_before_the_model_is_built(folder, tmp_path, monkeypatch, changed, error):
    monkeypatch.setattr("pe_spatial.tracking.sam2.model.build_pe_sam2", None)
    args = arguments(folder, "clip.mp4", tmp_path / "out.mp4", points=[(0, 1, [20, 20])])
    for name, value in changed.items():
        setattr(args, name, folder / value if name != "device" else value)
    with pytest.raises((DatasetError, CheckpointError, ConfigError), match=error):
        track.run(args)


def test_a_config_without_a_tracker(tmp_path):
    (tmp_path / "config.py").write_text("model = dict()\n")
    options = dict(config=str(tmp_path / "config.py"), checkpoint="none.pth")
    args = Namespace(points=[(0, 1, [1, 2])], box=None, mask=None, **options)
    with pytest.raises(ConfigError, match=r"has no model\.tracker"):
        track.run(args)
