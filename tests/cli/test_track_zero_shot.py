"""tools/track_zero_shot.py as a user runs it: results, scores, the sweep, and runs that break off."""

import json
import os
import re
import runpy
import subprocess
import sys
import time

import cv2
import numpy as np
import pytest
import torch
from helpers.repository import REPO
from PIL import Image

pytest.importorskip("mmengine")
from helpers.videos import SIZE, TINY, moving, write_davis

from pe_spatial import PerceptionEncoder
from pe_spatial.tracking.vos.clip import Clip
from pe_spatial.tracking.vos.evaluation import evaluate
from pe_spatial.tracking.vos.masks import read_mask, write_mask
from pe_spatial.tracking.zero_shot import ZeroShotTracker

TOOL = str(REPO / "tools" / "track_zero_shot.py")
VARIANT = json.dumps(TINY)


@pytest.fixture
def davis(tmp_path):
    return write_davis(tmp_path / "davis")


@pytest.fixture
def track(monkeypatch, tmp_path, capsys):
    """Return `track(*options) -> what it prints`; an error is SystemExit with its sentence."""

    def call(*options, checkpoint="none"):
        common = ["--variant", VARIANT, "--checkpoint", checkpoint, "--size", "96", "--out", tmp_path / "out"]
        monkeypatch.setattr(sys, "argv", [TOOL, *map(str, common), *map(str, options)])
        runpy.run_path(TOOL, run_name="__main__")
        return capsys.readouterr().out

    return call


def masks_in(folder):
    return {str(path.relative_to(folder)): read_mask(path) for path in sorted(folder.rglob("*.png"))}


def same(a, b):
    return a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a)


def test_davis_is_tracked_and_scored(track, davis, tmp_path):
    torch.manual_seed(5)
    torch.save(PerceptionEncoder(TINY).state_dict(), tmp_path / "encoder.pt")
    mask = read_mask(davis / "Annotations" / "480p" / "cat" / "00003.png")
    mask[:4, :4], mask[4:8, 4:8] = 9, 255  # appears late; void
    write_mask(davis / "Annotations" / "480p" / "cat" / "00003.png", mask)
    printed = track("--davis", davis, checkpoint=tmp_path / "encoder.pt")
    out = tmp_path / "out"
    assert sorted(p.name for p in out.iterdir()) == ["cat", "dog", "settings.json"]
    assert list(masks_in(out)) == [f"{name}/{i:05d}.png" for name in ("cat", "dog") for i in range(5)]
    assert Image.open(out / "cat" / "00002.png").mode == "P"
    encoder = dict(
        type="PerceptionEncoder", variant=TINY, init_cfg=dict(type="Pretrained", checkpoint=tmp_path / "encoder.pt")
    )
    folder = davis / "JPEGImages" / "480p" / "dog"
    first, frames = Clip.open(folder, davis / "Annotations/480p/dog/00000.png").load()
    for name, (mask,) in ZeroShotTracker(encoder, size=96).track(frames, first):
        assert np.array_equal(read_mask(out / "dog" / f"{name}.png"), mask)
    scores = evaluate(davis, out).global_results
    assert "2 of 2 sequences have masks of all frames" in printed
    assert f"J&F-Mean {100 * scores['J&F-Mean']:.1f}" in printed
    assert "1 objects that appear after the first frame" in printed
    assert "1 frames with void pixels" in printed


def test_sequences_without_ground_truth_are_tracked_and_not_scored(track, davis, tmp_path):
    (davis / "Annotations" / "480p" / "dog" / "00002.png").unlink()
    assert "1 of 2 sequences have masks of all frames" in track("--davis", davis)
    (davis / "Annotations" / "480p" / "cat" / "00004.png").unlink()
    (davis / "some.txt").write_text("cat\n")
    assert "0 of 1 sequences" in track("--davis", davis, "--sequences", "cat", "--out", tmp_path / "named")
    printed = track("--davis", davis, "--sequences", davis / "some.txt", "--out", tmp_path / "other")
    assert "0 of 1 sequences" in printed
    assert "J&F" not in printed
    assert len(masks_in(tmp_path / "other")) == 5


def test_sweep_reads_all_layers_in_one_pass(track, davis, tmp_path):
    printed = track("--davis", davis, "--layers", "all")
    out = tmp_path / "out"
    report = json.loads((out / "layers.json").read_text())
    assert list(report["layers"]) == ["0", "1", "2", "3"]
    for layer, scores in report["layers"].items():
        assert scores == evaluate(davis, out / f"layer_0{layer}").global_results
        assert re.search(rf"layer +{layer}  J&F-Mean {100 * scores['J&F-Mean']:.1f}", printed)
    means = {int(layer): scores["J&F-Mean"] for layer, scores in report["layers"].items()}
    assert report["best"] == max(means, key=means.get)
    assert report["last"] == 3
    assert Image.open(out / "layers.png").size > (100, 100)
    track("--davis", davis, "--layer", "1", "--out", tmp_path / "alone")
    assert len(masks_in(tmp_path / "alone")) == 10
    some = track("--davis", davis, "--layers", "0,-1", "--out", tmp_path / "some")
    assert "layer  0" in some
    assert "layer  3" in some
    assert "layer  1" not in some


def test_one_video_file_with_an_overlay(track, tmp_path):
    video = list(moving())
    writer = cv2.VideoWriter(str(tmp_path / "cat.mp4"), cv2.VideoWriter_fourcc(*"mp4v"), 10, SIZE[::-1])
    for _, rgb, _ in video:
        writer.write(np.ascontiguousarray(rgb[..., ::-1]))
    writer.release()
    write_mask(tmp_path / "first.png", video[0][2])
    track("--video", tmp_path / "cat.mp4", "--mask", tmp_path / "first.png", "--overlay", "--protocol", "aligned")
    out = tmp_path / "out"
    assert list(masks_in(out)) == [f"cat/{i:05d}.png" for i in range(5)]
    capture = cv2.VideoCapture(str(out / "cat.mp4"))
    assert (capture.get(cv2.CAP_PROP_FRAME_COUNT), capture.get(cv2.CAP_PROP_FPS)) == (5, 10)


def test_a_folder_of_frames(track, davis, tmp_path):
    folder, mask = (davis / name / "480p" / "cat" for name in ("JPEGImages", "Annotations"))
    printed = track("--video", folder, "--mask", mask / "00000.png")
    assert "J&F" not in printed
    assert len(masks_in(tmp_path / "out" / "cat")) == 5


def test_a_broken_sequence_is_absent_and_the_next_call_goes_on_with_it(track, davis, tmp_path):
    frame = davis / "JPEGImages" / "480p" / "dog" / "00003.jpg"
    data = frame.read_bytes()
    frame.write_bytes(data[:300])
    with pytest.raises(SystemExit, match=r"^error: .*dog/00003\.jpg cannot be decoded"):
        track("--davis", davis)
    out = tmp_path / "out"
    assert sorted(p.name for p in out.iterdir()) == ["cat", "settings.json"]
    before = (out / "cat" / "00001.png").stat().st_mtime_ns
    frame.write_bytes(data)
    assert "1 of 2 sequences are complete already" in track("--davis", davis)
    assert (out / "cat" / "00001.png").stat().st_mtime_ns == before
    assert len(masks_in(out)) == 10
    track("--davis", davis, "--out", tmp_path / "whole")
    assert same(masks_in(out), masks_in(tmp_path / "whole"))


def test_a_killed_run_resumes_at_the_next_sequence(track, tmp_path):
    davis = write_davis(tmp_path / "davis", count=20)
    command = [sys.executable, TOOL, "--variant", VARIANT, "--checkpoint", "none", "--size", "96", "--davis", davis]
    command += ["--out", tmp_path / "out", "--layers", "0,1"]
    environ = {**os.environ, "PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=environ, stderr=subprocess.DEVNULL)
    root = tmp_path / "out" / "layer_00"
    try:
        while not list(root.glob(".dog.*/*.png")):
            assert process.poll() is None
            time.sleep(0.005)
    finally:
        process.kill()  # SIGKILL
        process.wait()
    for layer in ("layer_00", "layer_01"):
        assert (tmp_path / "out" / layer / "cat").is_dir()
        assert not (tmp_path / "out" / layer / "dog").exists()
    assert "1 of 2 sequences are complete already" in track("--davis", davis, "--layers", "0,1")
    assert not list(root.glob(".*"))
    (tmp_path / "out" / "layer_01" / "dog").rename(tmp_path / "dog")  # a kill between two layers
    assert "1 of 2 sequences are complete already" in track("--davis", davis, "--layers", "0,1")
    assert same(masks_in(tmp_path / "dog"), masks_in(tmp_path / "out" / "layer_01" / "dog"))
    assert sorted(path.name for path in (tmp_path / "out" / "layer_00").iterdir()) == ["cat", "dog"]


def test_results_of_other_settings_are_not_mixed(track, davis, tmp_path):
    track("--davis", davis)
    with pytest.raises(SystemExit, match=r"^error: .*out holds results with another radius \(12\), topk \(5\); choose"):
        track("--davis", davis, "--radius", "0", "--topk", "3")
    with pytest.raises(SystemExit, match=r"another davis \(.*davis\);"):
        track("--davis", write_davis(tmp_path / "moved"))
    track("--davis", davis, "--radius", "0", "--out", tmp_path / "free")
    assert json.loads((tmp_path / "free" / "settings.json").read_text())["radius"] is None


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--video", "absent.mp4"], "--video needs --mask"),
        (["--video", "absent.mp4", "--mask", "first.png"], r"no video at absent\.mp4"),
        (["--video", "a.mp4", "--mask", "first.png", "--sequences", "val.txt"], "--sequences selects from --davis"),
        (["--davis", "absent"], r"no folder absent/JPEGImages"),
        (["--davis", "DAVIS", "--layers", "all", "--overlay"], "--overlay draws the masks of one layer"),
        (["--davis", "DAVIS", "--layer", "9"], "out_indices"),
        (["--davis", "DAVIS", "--sequences", "absent.txt"], r"cannot read the list of sequences absent\.txt"),
        (["--davis", "DAVIS", "--protocol", "davis"], "protocol is 'davis'; allowed are 'dino', 'aligned'"),
        (["--davis", "DAVIS", "--topk", "0"], "topk is 0"),
        (["--davis", "DAVIS", "--size", "10"], "raise size, which is 10"),
    ],
)
def test_what_cannot_work_is_one_sentence(track, davis, options, words):
    with pytest.raises(SystemExit, match=rf"^error: .*{words}"):
        track(*(davis if option == "DAVIS" else option for option in options))


def test_small_objects_are_named(track, davis):
    path = davis / "Annotations" / "480p" / "cat" / "00000.png"
    mask = read_mask(path)
    mask[0, 0] = 3
    write_mask(path, mask)
    assert "cat: objects 3 are too small for a patch" in track("--davis", davis)
