"""A journal that survives crashes, masks that it gives again, and frames that are offered for correction."""

import json

import numpy as np
import pytest

pytest.importorskip("sam2")
from helpers.app import FakeDetector, TinyTracker
from helpers.videos import moving
from PIL import Image

from pe_spatial.data import open_dataset
from pe_spatial.errors import DatasetError
from pe_spatial.labeling.journal import Journal
from pe_spatial.labeling.keyframes import choose_keyframes
from pe_spatial.labeling.project import LabelProject
from pe_spatial.tracking.sam2.session import Box, Click, Drawn

FRAMES, SIZE = 10, (48, 64)
FACTS = dict(video="discs", frames=FRAMES, size=[*SIZE])


@pytest.fixture(scope="module")
def tracker():
    return TinyTracker()


@pytest.fixture(scope="module")
def video(tmp_path_factory):
    folder = tmp_path_factory.mktemp("video") / "discs"
    folder.mkdir()
    for name, rgb, _ in moving(FRAMES, SIZE):
        Image.fromarray(rgb).save(folder / f"{name}.png")
    return folder


def opened(tracker, video, folder):
    return LabelProject(folder, video, tracker.start(), max_frames=100)


def done(steps):
    return list(steps)


def masks(project):
    done(project.track())
    return [project.session.mask(t) for t in range(len(project))]


def test_the_journal_gives_the_same_masks_after_a_crash(tracker, video, tmp_path):
    """Every kind of prompt, a correction, an undo; then half a line, as a crash leaves it."""
    project = opened(tracker, video, tmp_path / "out")
    drawn = np.zeros(SIZE, bool)
    drawn[30:44, 8:20] = True
    for frame, mark in [(0, Click(1, 20, 20)), (0, Box(2, 40, 20, 60, 40)), (3, Drawn(3, drawn))]:
        done(project.prompt(frame, mark))
    done(project.track())
    done(project.prompt(5, Click(1, 5, 40, on_object=False)))
    done(project.prompt(6, Click(2, 6, 6)))
    done(project.undo())
    project.name(2, "cat")
    project.accept(4)
    expected = masks(project)
    path = tmp_path / "out" / "journal.jsonl"
    before = path.read_bytes()
    with path.open("ab") as file:
        file.write(b'{"op":"prompt","frame":9,"obj')
    again = opened(tracker, video, tmp_path / "out")
    assert path.read_bytes() == before
    assert again.session.objects == [1, 2, 3]
    assert again.journal.classes == {2: "cat"}
    assert again.journal.accepted == {4}
    for ours, theirs in zip(masks(again), expected, strict=True):
        assert np.array_equal(ours, theirs)
    assert any(mask.any() for mask in expected)
    done(again.undo())  # the prompt on frame 5
    assert [entry["frame"] for entry in again.journal.prompts] == [0, 0, 3]


def test_another_project_and_other_files_are_refused(tracker, video, tmp_path):
    Journal(tmp_path / "out", FACTS)
    for change in (dict(video="walk"), dict(frames=9), dict(size=[48, 65])):
        with pytest.raises(DatasetError, match=r"holds the labels of discs \(10 frames of 64x48\), not of .*another"):
            Journal(tmp_path / "out", FACTS | change)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").touch()
    with pytest.raises(DatasetError, match="holds other files and no journal of labels"):
        opened(tracker, video, tmp_path / "full")
    (tmp_path / "out" / "journal.jsonl").write_text('{"op":"project"}\nnothing\n')
    with pytest.raises(DatasetError, match="line 2 is not an entry of a journal"):
        Journal(tmp_path / "out", FACTS)


def test_a_prompt_outside_of_the_frame_leaves_no_trace(tracker, video, tmp_path):
    project = opened(tracker, video, tmp_path / "out")
    for mark, problem in [
        (Click(1, 64, 20), "outside the frame of 64x48"),
        (Box(1, 10, 10, 70, 20), "within the frame of 64x48"),
        (Drawn(1, np.ones((3, 3), bool)), r"expected \(48, 64\)"),
        (Click(255, 3, 3), "its number must be 1 to 254"),
    ]:
        with pytest.raises(DatasetError, match=problem):
            done(project.prompt(0, mark))
    with pytest.raises(DatasetError, match="there is no frame 10"):
        done(project.prompt(10, Click(1, 3, 3)))
    with pytest.raises(DatasetError, match="no prompt to take back"):
        done(project.undo())
    with pytest.raises(DatasetError, match="frame 5 is not tracked yet"):
        project.accept(5)
    with pytest.raises(DatasetError, match="there is no object to track"):
        done(project.track())
    with pytest.raises(DatasetError, match="has no name"):
        project.name(1, " ")
    assert [entry["op"] for entry in project.journal.entries] == ["project"]


def test_boxes_of_a_detector_begin_objects_that_are_not_there_yet(tracker, video, tmp_path):
    project = opened(tracker, video, tmp_path / "out")
    drawn = np.zeros(SIZE, bool)
    drawn[2:20, 2:30] = True  # the cat of the fake detector
    done(project.prompt(0, Drawn(4, drawn)))
    assert project.detect(FakeDetector(), 0) == [5]  # the dog, clipped to the frame
    assert project.journal.classes == {5: "dog"}
    assert project.journal.prompts[-1]["box"] == [40, 30, 60, 48]
    project.name(4, "cat")
    done(project.track())
    project.export(["coco"], every=4)
    dataset = open_dataset(tmp_path / "out")
    assert set(dataset.classes) <= {"cat", "dog"}
    content = json.loads((tmp_path / "out" / "coco" / "instances.json").read_text())
    assert [image["frame_id"] for image in content["images"]] == [0, 4, 8]
    tracked = [np.unique(project.session.mask(t)) for t in (0, 4, 8)]
    assert len(content["annotations"]) == sum((ids > 0).sum() for ids in tracked)


def test_keyframes_are_where_masks_jump_and_the_tracker_doubts():
    def mask(t):
        index = np.zeros((20, 40), np.uint8)
        x = 4 if t < 10 else 20  # jumps at 10
        index[5:15, x : x + 10] = 1
        return index

    confidence = {t: {1: 0.2 if t == 16 else 0.95} for t in range(20)}
    found = choose_keyframes(mask, confidence, 20, count=2)
    assert [(one.frame, one.object_id) for one in found] == [(10, 1), (16, 1)]
    assert found[0].reason == "changes by 100%"
    assert found[1].reason == "confidence 20%"
    assert choose_keyframes(mask, confidence, 20, count=1, done={10})[0].frame == 16
    assert choose_keyframes(mask, confidence, 20, count=1, done={0, 10, 15})[0].frame == 16  # one at a time is no wider


def test_confidence_is_between_0_and_1_and_high_for_a_drawn_mask(tracker, video, tmp_path):
    project = opened(tracker, video, tmp_path / "out")
    drawn = np.zeros(SIZE, bool)
    drawn[10:30, 10:30] = True
    done(project.prompt(0, Drawn(1, drawn)))
    done(project.track())
    values = [project.session.confidence[t][1] for t in range(FRAMES)]
    assert all(0 <= value <= 1 for value in values)
    assert values[0] > 0.9
    assert set(project.keyframes(2)[0]._fields) == {"frame", "score", "object_id", "reason"}
