"""Score folders of predicted masks against annotations in the layouts of DAVIS, YouTube-VOS, MOSE and SA-V.

There are two protocols. Both skip the first and the last annotated frame, look predictions up by the annotations' file
names, and give J = F = 1 to an object that is in neither mask.

    davis            The objects are 1 .. the largest id of the first annotated frame, including ids skipped there;
                     objects that appear later are ignored. 255 is void and counts as background. A larger predicted
                     id is an error. A sequence with only 0 and 255 in its first frame is binary, as in DAVIS 2016:
                     every nonzero pixel is the object, in both masks.
                     (davisvideochallenge/davis2017-evaluation@ac7c43f, semi-supervised)
    vos-benchmark    The objects are all ids in scored annotated frames, including 255. Each counts from the first
                     frame in which either mask shows it.
                     (hkchengrex/vos-benchmark@acb4733, which has neither recall nor decay)

In SA-V's layout (<video>/<object>/<frame>.png) each object is scored on its own, over its own annotated frames
(facebookresearch/sam2@2b90b9f, sav_dataset/utils/sav_benchmark.py).
"""

import csv
import io
import json
import multiprocessing
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from pe_spatial.errors import DatasetError
from pe_spatial.tracking.vos.jandf import boundary_f, boundary_radius, box_around, region_similarity, statistics
from pe_spatial.tracking.vos.masks import VOID, read_binary_mask, read_mask, read_mask_and_kind

PROTOCOLS = ("davis", "vos-benchmark")
COUNTS = {
    "binary_sequences": "sequences annotated with 0 and 255 alone: every nonzero pixel is the object",
    "skipped_ids": "ids skipped in a first frame: they count as objects, which score 1 where nothing is predicted",
    "late_objects": "objects that appear after the first frame: ignored by davis, scored by vos-benchmark",
    "void_frames": "frames with void pixels (255): they count as background",
    "unpredicted_objects": "annotated objects without a prediction in any scored frame: they count as empty masks",
    "invented_objects": "ids in predictions alone: vos-benchmark ignores them, davis refuses them",
    "gray_masks": "masks without a palette: their gray values are the ids",
}

_OTHER = "score with --protocol vos-benchmark"
_CHUNK = 32  # frames per job, so that a single long sequence keeps all workers busy
_SPLITS = ("2017/val.txt", "2016/val.txt", "480p/val.txt")  # below a DAVIS root; the last is that of DAVIS 2016


@dataclass(frozen=True)
class Track:
    """Annotated frames that are scored together: a sequence or, in SA-V's layout, one object of a video."""

    sequence: str
    part: str | None  # the object's folder in SA-V's layout
    folder: Path
    frames: tuple[str, ...]  # names of all annotated frames in order, without .png
    first_ids: frozenset[int]  # of the first annotated frame
    binary: bool
    protocol: str

    @property
    def scored(self) -> tuple[str, ...]:
        return self.frames[1:-1]


@dataclass(frozen=True)
class FrameScores:
    scores: Mapping[int, tuple[float, float]]  # id in either mask -> J and F
    annotated: frozenset[int]
    predicted: frozenset[int]
    counts: Mapping[str, int]


@dataclass(frozen=True)
class Evaluation:
    """Scores as fractions; objects are named `<sequence>_<id>` (in SA-V's layout `<video>_<folder of the object>`).

    The keys of `global_results` and `per_object` are those of DAVIS's evaluator; the global values are means over all
    objects. `per_sequence` has means over the objects of each sequence, `per_frame` each object's J and F with the
    names of the frames, `counts` how often each rule of `COUNTS` was applied.
    """

    protocol: str
    global_results: dict[str, float]
    per_sequence: dict[str, dict[str, float]]
    per_object: dict[str, dict[str, float]]
    per_frame: dict[str, dict[str, list[str] | list[float]]]
    counts: dict[str, int]

    def rules(self) -> list[str]:
        """Return one line for each rule of `COUNTS` that was applied."""
        return [f"{count} {COUNTS[name]}" for name, count in self.counts.items() if count]

    def to_json(self) -> str:
        """Return all fields; a decay of NaN becomes null."""
        without_nan = json.loads(json.dumps(asdict(self)), parse_constant=lambda _: None)
        return json.dumps(without_nan, indent=1)

    def to_csv(self) -> str:
        """Return one line for each object."""
        rows = [["Sequence", *next(iter(self.per_object.values()))]]
        rows += [[name, *(f"{value:.6f}" for value in values.values())] for name, values in self.per_object.items()]
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows(rows)
        return text.getvalue()


def evaluate(
    gt_dir: str | Path,
    pred_dir: str | Path,
    *,
    sequences: Sequence[str] | None = None,
    protocol: str = "davis",
    workers: int = 1,
    official_decay: bool = False,
    progress: bool = False,
) -> Evaluation:
    """Score the masks <pred_dir>/<sequence>/<frame>.png (SA-V: <video>/<object>/<frame>.png).

    Args:
        gt_dir: root of DAVIS (Annotations/480p), SA-V (Annotations_6fps), YouTube-VOS or MOSE (Annotations), or a
            folder of sequences.
        sequences: names; None takes ImageSets/2017/val.txt (or that of 2016) below a DAVIS root, else all sequences.
        protocol: 'davis' or 'vos-benchmark', see the module's docstring.
        workers: number of processes; the result does not depend on it.
        official_decay: see `statistics`.
        progress: show a progress bar.

    Raises DatasetError, which names the file, for anything that cannot be scored.
    """
    tracks = find_tracks(gt_dir, sequences=sequences, protocol=protocol)
    _check_predictions(tracks, Path(pred_dir))
    jobs = [
        (track, Path(pred_dir), track.scored[start : start + _CHUNK])
        for track in tracks
        for start in range(0, len(track.scored), _CHUNK)
    ]
    frames: dict[Track, list[FrameScores]] = {track: [] for track in tracks}
    with tqdm(total=sum(len(names) for *_, names in jobs), unit="frame", disable=not progress) as bar:
        for (track, _, names), scores in zip(jobs, _run(jobs, workers), strict=True):
            frames[track] += scores
            bar.update(len(names))
    return summarize(frames, official_decay=official_decay)


def read_sequences(source: str | Path | Sequence[str]) -> list[str]:
    """Return names of sequences.

    `source` holds names, which may be joined by commas, or a file with one name per line or with the lines of DAVIS
    2016 (/JPEGImages/480p/<sequence>/00000.jpg ...). What ends in .txt is a file.
    """
    if isinstance(source, str | Path):
        source = [str(source)]
    names: list[str] = []
    for item in source:
        names += _listed(Path(item)) if item.endswith(".txt") or Path(item).is_file() else item.split(",")
    return list(dict.fromkeys(filter(None, names)))


def _listed(path: Path) -> list[str]:
    try:
        lines = [line.strip() for line in path.read_text().splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise DatasetError(f"cannot read the list of sequences {path}: {error}") from error
    names = [Path(line.split()[0]).parent.name if line.endswith((".jpg", ".png")) else line for line in lines if line]
    if not names:
        raise DatasetError(f"{path} lists no sequence; write one name per line")
    return names


def find_tracks(gt_dir: str | Path, *, sequences: Sequence[str] | None, protocol: str) -> list[Track]:
    """List what is scored, see `evaluate`; only the first annotated frames are read."""
    if protocol not in PROTOCOLS:
        raise DatasetError(f"protocol is {protocol!r}; choose {' or '.join(PROTOCOLS)}")
    root = Path(gt_dir)
    inner = [root / name for name in ("Annotations/480p", "Annotations_6fps", "Annotations")]
    folder = next((path for path in inner if path.is_dir()), root)
    if sequences is None and folder == inner[0]:
        lists = [path for name in _SPLITS if (path := root / "ImageSets" / name).is_file()]
        if not lists:
            raise DatasetError(f"{root} is a DAVIS root without ImageSets/{_SPLITS[0]}; give --sequences")
        sequences = read_sequences(lists[0])
    tracks = []
    for name in choose_sequences([path.name for path in _folders(folder)], sequences, folder):
        if _masks(folder / name):
            tracks.append(_open_track(name, None, folder / name, protocol))
            continue
        parts = _folders(folder / name)
        if not parts:
            raise DatasetError(f"{folder / name} holds no mask; expected <frame>.png, or <object>/<frame>.png (SA-V)")
        tracks += [_open_track(name, path.name, path, protocol) for path in parts]
    return tracks


def divide_sequences(gt_dir: str | Path, pred_dir: str | Path, *, protocol: str) -> tuple[list[str], list[str]]:
    """Return the annotated sequences with predictions, or all if there are none, and those without."""
    names = list(dict.fromkeys(track.sequence for track in find_tracks(gt_dir, sequences=None, protocol=protocol)))
    predicted = [name for name in names if (Path(pred_dir) / name).is_dir()] or names
    return predicted, [name for name in names if name not in predicted]


def choose_sequences(present: Iterable[str], sequences: Sequence[str] | None, where: Path) -> list[str]:
    """Return `sequences`, or all that are `present`; DatasetError if one is missing or there are none."""
    available = set(present)
    if not available:
        raise DatasetError(f"{where} holds no sequences; check the root of the dataset, its layout and its folders")
    names = sorted(available) if sequences is None else list(dict.fromkeys(sequences))
    missing = [name for name in names if name not in available]
    if missing:
        raise DatasetError(f"{len(missing)} of {len(names)} sequences are not in {where}, the first is {missing[0]}")
    return names


def score_frame(track: Track, frame: str, pred: np.ndarray, *, source: str | Path, gray: bool = False) -> FrameScores:
    """Score one predicted mask (H, W) uint8 against its annotation.

    `source` is its name in error messages, `gray` tells whether it comes from a file without a palette.
    """
    if pred.dtype != np.uint8:
        raise TypeError(f"{source} is {pred.dtype}; expected uint8")
    gt, gt_gray = _read(track, track.folder / f"{frame}.png")
    if pred.shape != gt.shape:
        sizes = f"{pred.shape[0]}x{pred.shape[1]} (height x width), but its annotation is {gt.shape[0]}x{gt.shape[1]}"
        raise DatasetError(f"{source} is {sizes}; write predictions in the size of the annotation")
    counts = {"gray_masks": gt_gray + gray}
    if track.binary:
        gt, pred = ((mask > 0).view(np.uint8) for mask in (gt, pred))
    annotated, predicted = _ids(gt), _ids(pred)
    if track.protocol == "davis":
        highest = max(track.first_ids)
        if max(predicted, default=0) > highest:
            first = f"the first annotated frame of {track.sequence} has ids up to {highest}"
            raise DatasetError(f"{source} holds id {max(predicted)}, but {first}; correct it, or {_OTHER}")
        counts["void_frames"] = int(VOID in annotated)
        annotated -= {VOID}
    ids = sorted(annotated | predicted)
    box = box_around(gt | pred)
    masks = [mask[box] == np.array(ids, np.uint8)[:, None, None] for mask in (gt, pred)]  # (N, h, w) bool
    j, f = region_similarity(*masks), boundary_f(*masks, bound=boundary_radius(gt.shape))
    scores = dict(zip(ids, zip(j.tolist(), f.tolist(), strict=True), strict=True))
    return FrameScores(scores, annotated, predicted, counts)


def summarize(frames: Mapping[Track, Sequence[FrameScores]], *, official_decay: bool = False) -> Evaluation:
    """Combine the scores of the scored frames of each track."""
    protocol = next(iter(frames)).protocol
    counts = Counter(dict.fromkeys(COUNTS, 0))
    per_frame: dict[str, dict[str, list[str] | list[float]]] = {}
    per_object: dict[str, dict[str, float]] = {}
    members: dict[str, list[dict[str, float]]] = {}
    for track, scored in frames.items():
        _count(counts, track, scored)
        for i, start in _objects(track, scored).items():
            name = f"{track.sequence}_{track.part or i}"
            # an id in neither mask of a frame scores 1
            values = np.array([frame.scores.get(i, (1.0, 1.0)) for frame in scored[start:]])  # (frames, 2)
            per_object[name] = {
                f"{measure}-{statistic.capitalize()}": value
                for measure, column in zip("JF", values.T, strict=True)
                for statistic, value in statistics(column, official_decay=official_decay)._asdict().items()
            }
            j, f = values.T.tolist()
            per_frame[name] = {"frames": list(track.scored[start:]), "J": j, "F": f}
            members.setdefault(track.sequence, []).append(per_object[name])
    if not per_object:
        raise DatasetError("no scored frame of any sequence has an annotated object, so there is nothing to score")
    per_sequence = {name: _means(objects, ("J-Mean", "F-Mean")) for name, objects in members.items()}
    global_results = _means(per_object.values(), next(iter(per_object.values())))
    return Evaluation(protocol, global_results, per_sequence, per_object, per_frame, dict(counts))


def _objects(track: Track, scored: Sequence[FrameScores]) -> dict[int, int]:
    """Return the objects of a track, each with the index of the first scored frame that counts for it."""
    if track.protocol == "davis":
        return dict.fromkeys(range(1, max(track.first_ids) + 1), 0)
    first: dict[int, int] = {}
    for index, frame in enumerate(scored):
        for i in frame.annotated | frame.predicted:
            first.setdefault(i, index)
    annotated = frozenset().union(*(frame.annotated for frame in scored))
    return {i: first[i] for i in sorted(annotated)}


def _count(counts: Counter[str], track: Track, scored: Sequence[FrameScores]) -> None:
    annotated = frozenset().union(*(frame.annotated for frame in scored))
    predicted = frozenset().union(*(frame.predicted for frame in scored))
    for frame in scored:
        counts.update(frame.counts)
    counts["binary_sequences"] += track.binary and track.part is None
    objects = _objects(track, scored)
    expected = track.first_ids
    if track.protocol == "davis":
        expected = frozenset(objects)
        counts["skipped_ids"] += len(expected - track.first_ids)
    counts["late_objects"] += len(annotated - expected)
    counts["unpredicted_objects"] += len(annotated.intersection(objects) - predicted)
    counts["invented_objects"] += len(predicted - annotated - expected)


def _means(objects: Iterable[Mapping[str, float]], keys: Iterable[str]) -> dict[str, float]:
    objects = list(objects)
    means = {key: float(np.mean([values[key] for values in objects])) for key in keys}
    return {"J&F-Mean": (means["J-Mean"] + means["F-Mean"]) / 2, **means}


def _open_track(sequence: str, part: str | None, folder: Path, protocol: str) -> Track:
    frames = tuple(path.stem for path in _masks(folder))
    if len(frames) < 3:
        raise DatasetError(
            f"{folder} has {len(frames)} annotated frames, and the first and last are not scored; omit it (--sequences)"
        )
    if part is not None:
        return Track(sequence, part, folder, frames, frozenset({1}), True, protocol)
    path = folder / f"{frames[0]}.png"
    ids = _ids(read_mask(path))
    binary = protocol == "davis" and ids == {VOID}
    if protocol == "davis":
        ids = frozenset({1}) if binary else ids - {VOID}
        if not ids:
            raise DatasetError(f"{path} is the first annotated frame and shows no object; {_OTHER}, or omit {sequence}")
    return Track(sequence, part, folder, frames, ids, binary, protocol)


def _check_predictions(tracks: Sequence[Track], pred_dir: Path) -> None:
    if not pred_dir.is_dir():
        raise DatasetError(f"no folder of predictions at {pred_dir}")
    missing, scored = [], 0
    for track in tracks:
        folder = pred_dir / track.sequence / (track.part or "")
        present = {path.stem for path in _masks(folder)}
        missing += [folder / f"{frame}.png" for frame in track.scored if frame not in present]
        scored += len(track.scored)
    if missing:
        raise DatasetError(
            f"{len(missing)} of {scored} predicted masks are missing, the first is {missing[0]}; predict every "
            "annotated frame (the first and the last may be missing), or list the sequences to score (--sequences)"
        )


def _run(jobs: Sequence[tuple[Track, Path, Sequence[str]]], workers: int) -> Iterable[list[FrameScores]]:
    workers = min(workers, len(jobs))
    if workers == 1:
        yield from map(_score_chunk, jobs)
        return
    # spawn: forking a process with torch's threads may hang
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield from pool.map(_score_chunk, jobs)


def _score_chunk(job: tuple[Track, Path, Sequence[str]]) -> list[FrameScores]:
    track, pred_dir, frames = job
    scores = []
    for frame in frames:
        path = pred_dir / track.sequence / (track.part or "") / f"{frame}.png"
        pred, gray = _read(track, path)
        scores.append(score_frame(track, frame, pred, source=path, gray=gray))
    return scores


def _read(track: Track, path: Path) -> tuple[np.ndarray, bool]:
    """Read a mask (H, W) uint8, and whether it lacks a palette that it should have."""
    if track.part is not None:
        return read_binary_mask(path).view(np.uint8), False
    mask, has_palette = read_mask_and_kind(path)
    return mask, not has_palette and not track.binary


def _ids(mask: np.ndarray) -> frozenset[int]:
    """Return the ids in a mask (H, W) uint8 without the background 0."""
    data = mask.tobytes()  # searching it for each id is far cheaper than np.unique
    return frozenset(i for i in range(1, int(mask.max(initial=0)) + 1) if bytes((i,)) in data)


def _folders(path: Path) -> list[Path]:
    inner = path.iterdir() if path.is_dir() else ()
    return sorted(entry for entry in inner if entry.is_dir() and not entry.name.startswith("."))


def _masks(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("*.png") if not path.name.startswith("."))
