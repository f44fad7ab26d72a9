"""Clips: objects where they begin, frames one by one, errors that name the file, and overlays."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("cv2")
import cv2

from pe_spatial.errors import DatasetError
from pe_spatial.tracking.vos.clip import Clip, overlay, write_overlay
from pe_spatial.tracking.vos.masks import PALETTE, write_mask
from pe_spatial.video import list_frames

SIZE = (48, 64)


def image(i, size=SIZE):
    """A smooth image, so that codecs keep it."""
    y, x = np.mgrid[: size[0], : size[1]]
    return np.stack([2 * y + 20, 2 * x + 10, np.full(size, 10 * i)], -1).astype(np.uint8)


def save_frames(folder, names, size=SIZE):
    folder.mkdir(parents=True, exist_ok=True)
    for i, name in enumerate(names):
        Image.fromarray(image(i, size)).save(folder / name)
    return folder


def save_video(path, count, size=SIZE, fps=12):
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"mp4v"), fps, size[::-1])
    for i in range(count):
        writer.write(image(i, size)[..., ::-1])
    writer.release()
    return path


def read_video(path):
    capture, frames = cv2.VideoCapture(str(path)), []
    while (one := capture.read())[0]:
        frames.append(one[1][..., ::-1])
    return frames, capture.get(cv2.CAP_PROP_FPS)


@pytest.fixture
def mask(tmp_path):
    ids = np.zeros(SIZE, np.uint8)
    ids[8:24, 8:40] = 3
    ids[30:40, 50:] = 255
    write_mask(tmp_path / "mask.png", ids)
    return tmp_path / "mask.png"


def test_a_folder_is_read_one_frame_at_a_time(tmp_path, mask):
    frames = list_frames(save_frames(tmp_path / "cat", ["00000.png", "00001.png", "00002.png"]))
    clip = Clip("cat", frames, mask)
    first, stream = clip.load()
    assert (len(clip), clip.fps) == (3, 24)
    assert np.unique(first).tolist() == [0, 3]  # void is background
    frames[2].write_bytes(b"broken")  # not read yet
    for i in range(2):
        name, rgb = next(stream)
        assert name == f"{i:05d}"
        assert np.array_equal(rgb, image(i))
    with pytest.raises(DatasetError, match=r"00002\.png is not a readable image"):
        next(stream)


def test_a_truncated_frame_is_named(tmp_path, mask):
    folder = save_frames(tmp_path / "cat", ["00000.jpg", "00001.jpg"])
    data = (folder / "00001.jpg").read_bytes()
    (folder / "00001.jpg").write_bytes(data[: len(data) // 2])
    with pytest.raises(DatasetError, match=r"00001\.jpg cannot be decoded"):
        list(Clip("cat", list_frames(folder), mask).load()[1])


def squares(*ids):
    """A mask with a square for each id."""
    mask = np.zeros(SIZE, np.uint8)
    for i in ids:
        mask[8:16, 10 * (i % 6) : 10 * (i % 6) + 8] = i
    return mask


def same(prompts, expected):
    assert list(prompts) == list(expected)
    for frame, objects in expected.items():
        assert list(prompts[frame]) == list(objects)
        for i, mask in objects.items():
            assert prompts[frame][i].dtype == bool
            assert np.array_equal(prompts[frame][i], mask)


def test_objects_begin_in_one_mask_or_where_they_are_first_seen(tmp_path):
    """With annotations of some frames, as in YouTube-VOS, in the order of the frames and not of the names."""
    frames = list_frames(save_frames(tmp_path / "cat", ["8.png", "9.png", "10.png", "11.png"]))
    for name, ids in {"8": (2,), "10": (1, 2, 4), "11": (4, 5, 1)}.items():
        write_mask(tmp_path / f"masks/{name}.png", squares(*ids))
    (tmp_path / "masks/._8.png").touch()
    first = Clip("cat", frames, tmp_path / "masks/8.png")
    same(first.prompts(), {"8": {2: squares(2) == 2}})
    late = Clip("cat", frames, tmp_path / "masks")
    alone = {i: squares(i) == i for i in (1, 2, 4, 5)}
    same(late.prompts(), {"8": {2: alone[2]}, "10": {1: alone[1], 4: alone[4]}, "11": {5: alone[5]}})
    assert not late.overlapping
    with pytest.raises(DatasetError, match=r"may overlap or begin after the first frame"):
        late.load()
    for name in ("10", "11"):
        (tmp_path / f"masks/{name}.png").unlink()
    assert np.array_equal(late.load()[0], squares(2))
    (tmp_path / "masks/8.png").rename(tmp_path / "masks/9.png")  # nothing begins on the first frame
    same(late.prompts(), {"9": {2: squares(2) == 2}})
    with pytest.raises(DatasetError, match="may overlap or begin after"):
        late.load()


def test_objects_with_masks_of_their_own_may_overlap(tmp_path):
    """SA-V: ids from 0, annotations of every fourth frame, an object that is not in its first ones."""
    frames = list_frames(save_frames(tmp_path / "cat", [f"{t:05d}.jpg" for t in range(9)]))
    a, b, none = squares(1, 2) > 0, squares(2, 3) > 0, np.zeros(SIZE, bool)
    for i, masks in {0: [b, a, a], 7: [none, b, a], 12: [none, none, none], 3: [a, none, b]}.items():
        for t, mask in zip((0, 4, 8), masks, strict=True):
            write_mask(tmp_path / f"masks/{i:03d}/{t:05d}.png", mask.astype(np.uint8) * 255)
    clip = Clip("cat", frames, tmp_path / "masks", overlapping=True)
    same(clip.prompts(), {"00000": {0: b, 3: a}, "00004": {7: b}})
    assert [name for name, _ in clip.read()] == [path.stem for path in frames]
    with pytest.raises(DatasetError, match="may overlap"):
        clip.load()
    (tmp_path / "masks/012").rename(tmp_path / "masks/dog")
    write_mask(tmp_path / "masks/dog/00000.png", squares(1))
    with pytest.raises(DatasetError, match="masks/dog is not named by a number"):
        clip.prompts()


def test_annotations_that_do_not_fit_are_named(tmp_path):
    frames = list_frames(save_frames(tmp_path / "cat", ["00000.png", "00001.png"]))
    clip = Clip("cat", frames, tmp_path / "masks")
    write_mask(tmp_path / "masks/00000.png", squares(1))
    write_mask(tmp_path / "masks/1.png", squares(2))
    with pytest.raises(DatasetError, match=r"masks/1\.png matches no frame of cat"):
        clip.prompts()
    (tmp_path / "masks/1.png").unlink()
    write_mask(tmp_path / "masks/00001.png", squares(2)[:40])
    with pytest.raises(DatasetError, match=r"masks of the sizes \[\(40, 64\), \(48, 64\)\]"):
        clip.prompts()
    write_mask(tmp_path / "masks/00001.png", squares(0))
    write_mask(tmp_path / "masks/00000.png", squares(0))
    with pytest.raises(DatasetError, match="masks shows no object to track"):
        clip.prompts()
    film = Clip("cat", save_video(tmp_path / "cat.mp4", 3), tmp_path / "masks")
    write_mask(tmp_path / "masks/00001.png", squares(5))
    same(film.prompts(), {"00001": {5: squares(5) == 5}})


def test_a_video_file_is_read(tmp_path, mask):
    clip = Clip("cat", save_video(tmp_path / "cat.mp4", 5), mask)
    assert (len(clip), clip.fps) == (5, 12)
    frames = list(clip.load()[1])
    assert [name for name, _ in frames] == ["00000", "00001", "00002", "00003", "00004"]
    for i, (_, rgb) in enumerate(frames):
        assert np.abs(rgb.astype(int) - image(i)).mean() < 8  # red is red


def test_masks_and_frames_must_fit(tmp_path, mask):
    folder = save_frames(tmp_path / "cat", ["00000.png", "00001.png"])
    Image.fromarray(image(1, (48, 60))).save(folder / "00001.png")
    frames = Clip("cat", list_frames(folder), mask).load()[1]
    next(frames)
    with pytest.raises(DatasetError, match=r"00001\.png is 48x60 \(height x width\) but .*mask\.png is 48x64"):
        next(frames)
    frames = Clip("cat", list_frames(folder)).read()
    next(frames)
    with pytest.raises(DatasetError, match=r"00001\.png is 48x60 \(height x width\) but the first frame is 48x64"):
        next(frames)
    video = Clip("cat", save_video(tmp_path / "cat.mp4", 2, (32, 64)), mask)
    with pytest.raises(DatasetError, match=r"frame 0 of .*cat\.mp4 is 32x64"):
        next(video.load()[1])


def test_a_binary_mask_holds_object_1(tmp_path):
    """DAVIS 2016 writes 255."""
    ids = np.zeros(SIZE, np.uint8)
    ids[:9] = 255
    write_mask(tmp_path / "binary.png", ids)
    assert np.array_equal(Clip("cat", (Path("0.jpg"),), tmp_path / "binary.png").load()[0], ids > 0)


def test_a_mask_without_objects_is_refused(tmp_path):
    write_mask(tmp_path / "empty.png", np.zeros(SIZE, np.uint8))
    with pytest.raises(DatasetError, match=r"empty\.png shows no object to track"):
        Clip("cat", (Path("0.jpg"),), tmp_path / "empty.png").load()
    with pytest.raises(DatasetError, match="cat has no mask"):
        Clip("cat", (Path("0.jpg"),)).prompts()


def test_a_mask_in_colors_is_refused(tmp_path):
    Image.fromarray(image(0)).save(tmp_path / "rgb.png")
    with pytest.raises(DatasetError, match=r"rgb\.png is a 8-bit RGB image, not an index mask"):
        Clip("cat", (), tmp_path / "rgb.png").load()


def test_overlay_colors_objects_and_leaves_the_rest():
    rgb = image(3)
    ids = np.zeros(SIZE, np.uint8)
    ids[8:24, 8:40] = 3
    drawn = overlay(rgb, ids)
    assert drawn.dtype == np.uint8
    assert np.array_equal(drawn[ids == 0], rgb[ids == 0])
    assert np.array_equal(drawn[8, 8], PALETTE[3])  # the outline
    assert np.array_equal(drawn[15, 20], rgb[15, 20] // 2 + PALETTE[3] // 2)


@pytest.mark.parametrize("size", [SIZE, (47, 63)])
def test_overlay_videos_have_every_frame(tmp_path, size):
    frames = [f"{i:05d}.png" for i in range(4)]
    folder = save_frames(tmp_path / "cat", frames, size)
    ids = np.zeros(size, np.uint8)
    ids[8:40, 8:40] = 1
    for frame in frames:
        write_mask(tmp_path / "masks" / frame, ids)
    clip = Clip("cat", list_frames(folder), tmp_path / "masks" / frames[0])
    write_overlay(clip, tmp_path / "masks", tmp_path / "out" / "cat.mp4")
    drawn, fps = read_video(tmp_path / "out" / "cat.mp4")
    assert (len(drawn), fps) == (4, 24)
    assert abs(int(drawn[2][20, 20, 0]) - int(overlay(image(2, size), ids)[20, 20, 0])) < 20
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["cat.mp4"]


def test_an_overlay_that_fails_leaves_nothing(tmp_path, mask):
    folder = save_frames(tmp_path / "cat", ["00000.png", "00001.png"])
    write_mask(tmp_path / "masks" / "00000.png", np.zeros(SIZE, np.uint8))
    with pytest.raises(DatasetError, match=r"cannot open .*00001\.png"):
        write_overlay(Clip("cat", list_frames(folder), mask), tmp_path / "masks", tmp_path / "out" / "cat.mp4")
    assert not list((tmp_path / "out").iterdir())


def disc(blur=0, scale=1):
    """A filled circle of 255 on 0, blurred or with anti-aliased edges."""
    big = np.zeros((SIZE[0] * scale, SIZE[1] * scale), np.uint8)
    cv2.circle(big, (32 * scale, 24 * scale), 15 * scale, 255, -1)
    big = cv2.GaussianBlur(big, (0, 0), blur) if blur else big
    return cv2.resize(big, SIZE[::-1], interpolation=cv2.INTER_AREA)


@pytest.mark.parametrize(
    "soft",
    [disc(blur=3), disc(blur=1), disc(scale=4), disc(blur=9), disc()],
    ids=["blurred", "slightly blurred", "anti-aliased", "heavily blurred", "hard"],
)
def test_smoothed_masks_are_refused_and_hard_ones_are_one_object(tmp_path, soft):
    Image.fromarray(soft).save(tmp_path / "m.png")
    clip = Clip("cat", (Path("0.jpg"),), tmp_path / "m.png")
    if set(np.unique(soft)) == {0, 255}:
        assert list(clip.prompts()["0"]) == [1]
        return
    with pytest.raises(DatasetError, match=r"m\.png has \d+ gray values .* smoothed"):
        clip.prompts()


def test_masks_with_many_objects_or_some_void_are_not_smoothed(tmp_path):
    many = np.arange(SIZE[0] * SIZE[1]).reshape(SIZE) // 16 % 200
    write_mask(tmp_path / "palette.png", many.astype(np.uint8))
    assert len(Clip("cat", (Path("0.jpg"),), tmp_path / "palette.png").prompts()["0"]) == 191
    gray = squares(1, 2, 3)
    gray[20:22] = 255
    Image.fromarray(gray).save(tmp_path / "gray.png")
    assert list(Clip("cat", (Path("0.jpg"),), tmp_path / "gray.png").prompts()["0"]) == [1, 2, 3]


def test_a_folder_of_binary_masks_holds_object_1(tmp_path):
    """DAVIS 2016 with objects that may begin later; a later mask of void alone in an index set stays void."""
    frames = list_frames(save_frames(tmp_path / "cat", ["0.png", "1.png"]))
    white = (squares(1) > 0).astype(np.uint8) * 255
    for name in ("0", "1"):
        write_mask(tmp_path / f"masks/{name}.png", white)
    same(Clip("cat", frames, tmp_path / "masks").prompts(), {"0": {1: white > 0}})
    write_mask(tmp_path / "masks/0.png", squares(2))
    same(Clip("cat", frames, tmp_path / "masks").prompts(), {"0": {2: squares(2) > 0}})


def test_hidden_folders_beside_masks_are_skipped(tmp_path):
    frames = list_frames(save_frames(tmp_path / "cat", ["00000.png"]))
    write_mask(tmp_path / "masks/001/00000.png", squares(1))
    write_mask(tmp_path / "masks/.ipynb_checkpoints/00000.png", squares(1))
    write_mask(tmp_path / "masks/.ipynb_checkpoints/00000-checkpoint.png", squares(1))
    clip = Clip("cat", frames, tmp_path / "masks", overlapping=True)
    assert list(clip.prompts()["00000"]) == [1]


def test_masks_of_a_video_that_does_not_say_its_length_are_read(tmp_path, monkeypatch):
    monkeypatch.setattr("pe_spatial.tracking.vos.clip.count_frames", lambda _: 0)
    write_mask(tmp_path / "masks/00001.png", squares(5))
    film = Clip("cat", save_video(tmp_path / "cat.mp4", 3), tmp_path / "masks")
    same(film.prompts(), {"00001": {5: squares(5) == 5}})
