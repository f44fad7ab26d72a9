"""Clicks in any order give the masks of a tracker that gets them in the order of the frames."""

from zipfile import ZipFile

import numpy as np
import pytest
import torch
from helpers.videos import moving
from PIL import Image

from pe_spatial import EncoderConfig
from pe_spatial.errors import DatasetError
from pe_spatial.images import read_rgb
from pe_spatial.tracking.sam2.model import build_pe_sam2
from pe_spatial.tracking.sam2.session import Click, ClickSession
from pe_spatial.tracking.sam2.streaming import StreamingTracker
from pe_spatial.tracking.vos.masks import join_masks, read_mask
from pe_spatial.video import decode_video

pytest.importorskip("sam2")

TINY = EncoderConfig(img_size=64, patch_size=8, embed_dim=32, depth=1, num_heads=2)
FRAMES, SIZE = 12, (48, 64)
A, B, C = Click(1, 20, 20), Click(2, 50, 30), Click(1, 5, 40, on_object=False)


@pytest.fixture(scope="module")
def model(randomize):
    torch.manual_seed(0)
    model = randomize(build_pe_sam2(TINY, 4, d_model=32, mem_dim=8, layers=1, feedforward=32))
    model.sam_mask_decoder.pred_obj_score_head.layers[-1].bias.data.fill_(50)
    return model.eval()


@pytest.fixture(scope="module")
def video(tmp_path_factory):
    folder = tmp_path_factory.mktemp("video") / "discs"
    folder.mkdir()
    for name, rgb, _ in moving(FRAMES, SIZE):
        Image.fromarray(rgb).save(folder / f"{name}.png")
    return folder


def session(model, video, max_frames=100):
    return ClickSession(StreamingTracker(model, non_overlapping=True), video, max_frames=max_frames)


def expected(model, video, clicks):
    """Index masks of a plain pass over the video, each click a call of `refine`."""
    tracker, masks = StreamingTracker(model, non_overlapping=True), []
    for t, path in enumerate(sorted(video.iterdir())):
        found = tracker.step(read_rgb(path))
        for click in clicks.get(t, ()):
            found = tracker.refine(click.prompt)
        masks.append(join_masks({i: m.numpy() for i, m in found.items()}, SIZE))
    return masks


def assert_masks(work, masks):
    assert work.tracked == len(masks)
    for t, mask in enumerate(masks):
        assert np.array_equal(work.mask(t), mask), f"frame {t}"


def test_clicks_in_any_order_give_the_masks_of_one_pass(model, video):
    work = session(model, video)
    assert (len(work), work.tracked, work.mask(0)) == (FRAMES, 0, None)
    assert list(work.go_to(3)) == [0, 1, 2, 3]
    work.click(A)
    assert list(work.track(FRAMES - 1)) == list(range(4, FRAMES))
    before = expected(model, video, {3: [A]})
    assert_masks(work, before)
    assert not before[2].any()
    assert before[3].any()

    assert list(work.go_to(9)) == [8, 9]  # back to the snapshot after frame 7
    work.click(C)
    work.click(B)
    list(work.go_to(5))  # back; the clicks on frame 9 stay
    work.click(C)
    list(work.track(FRAMES - 1))
    after = expected(model, video, {3: [A], 5: [C], 9: [C, B]})
    assert_masks(work, after)
    assert work.objects == [1, 2]
    assert work.clicks(9) == [C, B]
    assert not all(np.array_equal(a, b) for a, b in zip(before, after, strict=True))


def test_undo_takes_clicks_back_in_the_order_they_were_made(model, video):
    work = session(model, video)
    for frame, click in ((3, A), (10, B), (6, C)):
        list(work.go_to(frame))
        work.click(click)
    assert list(work.undo()) == list(range(7))  # of the click on frame 6
    list(work.track(FRAMES - 1))
    assert_masks(work, expected(model, video, {3: [A], 10: [B]}))
    list(work.undo())
    assert (work.tracked, work.objects) == (11, [1])
    assert_masks(work, expected(model, video, {3: [A]})[:11])
    list(work.undo())
    assert work.objects == []
    with pytest.raises(DatasetError, match="no click to take back"):
        list(work.undo())


def test_downloads(model, video, tmp_path):
    work = session(model, video)
    with pytest.raises(DatasetError, match="no masks yet; click on an object"):
        work.write_masks(tmp_path / "m.zip")
    list(work.go_to(1))
    work.click(A)
    work.write_masks(tmp_path / "m.zip")
    work.write_video(tmp_path / "v.mp4")
    with ZipFile(tmp_path / "m.zip") as archive:
        assert archive.namelist() == ["discs/00000.png", "discs/00001.png"]
        archive.extractall(tmp_path)
    assert np.array_equal(read_mask(tmp_path / "discs/00001.png"), work.mask(1))
    assert len(list(decode_video(tmp_path / "v.mp4"))) == 2
    drawn = work.draw(1)
    assert drawn.shape == (*SIZE, 3)
    assert not np.array_equal(drawn, read_rgb(work.video.frames[1]))
    assert np.array_equal(work.draw(2), read_rgb(work.video.frames[2]))


def test_bad_input_changes_nothing(model, video, tmp_path):
    with pytest.raises(DatasetError, match="discs has 12 frames, and at most 5 are tracked; cut it"):
        session(model, video, max_frames=5)
    (tmp_path / "broken.mp4").write_bytes(b"no video")
    with pytest.raises(DatasetError, match="cannot open the video"):
        session(model, tmp_path / "broken.mp4")
    work = session(model, video)
    with pytest.raises(DatasetError, match="has 12 frames, so there is no frame 12"):
        list(work.go_to(12))
    list(work.go_to(2))
    with pytest.raises(DatasetError, match="outside the frame of 64x48"):
        work.click(Click(1, 70, 10))
    with pytest.raises(DatasetError, match="the object is 255; its number must be 1 to 254"):
        work.click(Click(255, 10, 10))
    assert (work.objects, work.clicks(2), work.tracked) == ([], [], 3)
    assert not work.mask(2).any()
