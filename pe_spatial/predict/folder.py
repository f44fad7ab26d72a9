"""A folder of predictions: drawn images and videos, masks, COCO JSON and a table; it can be resumed.

<folder>/predictions.json         COCO: images, categories, annotations with scores
<folder>/predictions.csv          one line for each object
<folder>/drawn/NAME.jpg (.mp4)    images and videos with the predictions
<folder>/masks/NAME/000.png       the mask of annotation 0 of an image, 0 and 255; a segmenter: masks/NAME.png
<folder>/parts/NAME.jsonl         what one image or video adds to the two tables, written last: it is finished
<folder>/metadata.json            checkpoint and options
"""

import csv
import json
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from PIL import Image

from pe_spatial.atomic import atomic_write, write_file, write_json
from pe_spatial.depth.outputs import encode_png16
from pe_spatial.engine.sources import Sources, count_images, is_video
from pe_spatial.errors import DatasetError
from pe_spatial.images import read_rgb
from pe_spatial.predict.live import LiveFrames, paced
from pe_spatial.predict.results import DepthMap, Detections, SegmentationMap
from pe_spatial.video import decode_video, frame_rate, mp4_writer

FORMATS = ("images", "json", "csv", "masks")
DEFAULT_FPS = 25.0
"""Of videos that do not say theirs."""
LIVE_FPS = 10.0
"""Of the video of a camera."""
_DRAWN_AHEAD = 4

Predict = Callable[[Iterable[np.ndarray]], Iterator[Any]]


class ResultFolder:
    """The predictions of many images and videos.

    Args:
        folder: where they go.
        predict: maps images (H, W, 3) uint8 RGB to `Detections` or `SegmentationMap`, in order.
        class_names: names of the classes.
        formats: of `FORMATS`.
        progress: wraps an iteration and takes its length, such as `tqdm`.

    `counts` has the images that were predicted and kept from before, `unreadable` why others could not be read.
    """

    def __init__(
        self, folder: Path, predict: Predict, *, class_names: Sequence[str], formats: Collection[str],
        progress: Callable[..., Any],
    ) -> None:  # fmt: skip
        self.folder, self.predict, self.class_names = folder, predict, tuple(class_names)
        self.formats, self.progress = formats, progress
        self.counts: Counter[str] = Counter()
        self.unreadable: list[str] = []

    def run(self, sources: Sources, *, overwrite: bool) -> None:
        """Predict all images, then all videos, but those that are finished unless `overwrite`."""
        todo = {}
        for name, path in sources.files.items():
            if overwrite or not self._part(name).is_file():
                todo[name] = path
            else:
                self.counts["kept"] += 1
        with self.progress(total=sum(map(count_images, todo.values()))) as bar:
            self._images({name: path for name, path in todo.items() if not is_video(path)}, bar.update)
            for name, path in todo.items():
                if is_video(path):
                    self._video(name, path, bar.update)

    def run_live(self, frames: LiveFrames, *, limit: int | None) -> None:
        """Predict the newest frames of a camera until Ctrl-C, or `limit` of them; the video keeps the clock's time."""
        name = "camera" if frames.source.isdecimal() else "stream"

        def shown() -> Iterator[np.ndarray]:
            for number, rgb in enumerate(frames):
                if number == limit:
                    return
                yield rgb

        with self.progress(total=limit) as bar, ExitStack() as stack:
            lines = self._open_part(stack, name)
            write = self._open_video(stack, name, LIVE_FPS)
            try:
                for number, (times, rgb) in enumerate(paced(shown(), LIVE_FPS)):
                    (result,) = self.predict([rgb])
                    lines.write(self._line(f"{name}.mp4", rgb, result, frame=number))
                    if write:
                        drawn = result.draw(rgb)
                        for _ in range(times):
                            write(drawn)
                    self.counts["predicted"] += 1
                    bar.update()
            except KeyboardInterrupt:
                if not self.counts["predicted"]:
                    raise

    def _images(self, files: dict[str, Path], done: Callable[[], Any]) -> None:
        waiting: deque[tuple[str, Path, np.ndarray]] = deque()

        def read() -> Iterator[np.ndarray]:
            for name, path in files.items():
                try:
                    rgb = read_rgb(path)
                except DatasetError as error:
                    self.unreadable.append(str(error))
                    done()
                    continue
                waiting.append((name, path, rgb))
                yield rgb

        written: deque[Future[None]] = deque()
        with ThreadPoolExecutor(1) as writer:
            for result in self.predict(read()):
                written.append(writer.submit(self._save, *waiting.popleft(), result))
                while len(written) > _DRAWN_AHEAD or (written and written[0].done()):
                    written.popleft().result()
                self.counts["predicted"] += 1
                done()
            for one in written:
                one.result()

    def _save(self, name: str, path: Path, rgb: np.ndarray, result: Any) -> None:
        if "images" in self.formats:
            with atomic_write(self.folder / "drawn" / f"{name}.jpg") as unfinished:
                Image.fromarray(result.draw(rgb)).save(unfinished, format="JPEG", quality=92)
        self._save_masks(name, result)
        write_file(self._part(name), self._line(f"{name}{path.suffix}", rgb, result))

    def _video(self, name: str, path: Path, done: Callable[[], Any]) -> None:
        waiting: deque[np.ndarray] = deque()

        def read() -> Iterator[np.ndarray]:
            for rgb in decode_video(path):
                waiting.append(rgb)
                yield rgb

        try:
            with ExitStack() as stack:
                write = self._open_writer(stack, name, f"{name}{path.suffix}", frame_rate(path) or DEFAULT_FPS)
                for number, result in enumerate(self.predict(read())):
                    write(number, waiting.popleft(), result)
                    done()
            self.counts["predicted"] += 1
        except DatasetError as error:
            self.unreadable.append(str(error))

    def _open_writer(self, stack: ExitStack, name: str, file_name: str, fps: float) -> Callable[..., None]:
        """Return what writes the number, the image and the result of each frame of a video."""
        lines = self._open_part(stack, name)
        draw = self._open_video(stack, name, fps)

        def write(number: int, rgb: np.ndarray, result: Any) -> None:
            if draw:
                draw(result.draw(rgb))
            self._save_masks(f"{name}/{number:06d}", result)
            lines.write(self._line(file_name, rgb, result, frame=number))

        return write

    def _open_part(self, stack: ExitStack, name: str) -> TextIO:
        """Open the lines of a video; entered first, they appear last."""
        lines = stack.enter_context(atomic_write(self._part(name))).open("w")
        stack.callback(lines.close)
        return lines

    def _open_video(self, stack: ExitStack, name: str, fps: float) -> Callable[[Any], None] | None:
        if "images" not in self.formats:
            return None
        return stack.enter_context(mp4_writer(self.folder / "drawn" / f"{name}.mp4", fps))

    def _save_masks(self, name: str, result: Any) -> None:
        if "masks" not in self.formats:
            return
        if isinstance(result, DepthMap):
            write_file(self.folder / "masks" / f"{name}.png", encode_png16(result.depth, 1000, {})[0])
        if isinstance(result, SegmentationMap):
            _write_png(self.folder / "masks" / f"{name}.png", result.labels.astype(np.uint8))
        for number, crop in enumerate(getattr(result, "crops", None) or ()):
            mask = crop.full(result.image_size).astype(np.uint8) * 255
            _write_png(self.folder / "masks" / name / f"{number:03d}.png", mask)

    def _part(self, name: str) -> Path:
        return self.folder / "parts" / f"{name}.jsonl"

    def _line(self, file_name: str, rgb: np.ndarray, result: Detections | SegmentationMap, **image: int) -> str:
        """Return one line of JSON: an image and its objects."""
        size = dict(height=rgb.shape[0], width=rgb.shape[1])
        return json.dumps(dict(image=dict(file_name=file_name, **size, **image), objects=result.to_coco())) + "\n"

    def finish(self) -> int:
        """Write the tables of all images and videos, those of earlier runs too; return the number of objects."""
        categories = [dict(id=i + 1, name=name) for i, name in enumerate(self.class_names)]
        images: list[dict[str, Any]] = []
        annotations: list[dict[str, Any]] = []
        for path in sorted((self.folder / "parts").rglob("[!.]*.jsonl")):
            for line in path.read_text().splitlines():
                part = json.loads(line)
                images.append(dict(id=len(images) + 1, **part["image"]))
                for one in part["objects"]:
                    ids = dict(id=len(annotations) + 1, image_id=images[-1]["id"])
                    annotations.append({**one, **ids, "iscrowd": 0, "area": _area(one)})
        if "json" in self.formats:
            tables = dict(images=images, annotations=annotations, categories=categories)
            write_json(self.folder / "predictions.json", tables)
        if "csv" in self.formats:
            self._write_csv(images, annotations)
        return len(annotations)

    def _write_csv(self, images: Sequence[dict[str, Any]], annotations: Sequence[dict[str, Any]]) -> None:
        with atomic_write(self.folder / "predictions.csv") as unfinished, unfinished.open("w", newline="") as file:
            table = csv.writer(file)
            table.writerow(("image", "frame", "class", "score", "x0", "y0", "x1", "y1"))
            for one in annotations:
                image = images[one["image_id"] - 1]
                x, y, width, height = one.get("bbox") or _box(one)
                box = (f"{value:.2f}" for value in (x, y, x + width, y + height))
                name = self.class_names[one["category_id"] - 1]
                score = f"{one['score']:.4f}" if "score" in one else ""
                table.writerow((image["file_name"], image.get("frame", ""), name, score, *box))


def _area(one: dict[str, Any]) -> float:
    from pycocotools import mask as run_lengths

    if "segmentation" in one:
        return float(run_lengths.area(one["segmentation"]))
    return one["bbox"][2] * one["bbox"][3]


def _box(one: dict[str, Any]) -> list[float]:
    from pycocotools import mask as run_lengths

    return run_lengths.toBbox(one["segmentation"]).tolist()


def _write_png(path: Path, pixels: np.ndarray) -> None:
    with atomic_write(path) as unfinished:
        Image.fromarray(pixels).save(unfinished, format="PNG")
