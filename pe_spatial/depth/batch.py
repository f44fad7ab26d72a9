"""Depth of many images: a folder of predictions that can be resumed, files derived from them, and metadata.json."""

import hashlib
import io
import json
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pe_spatial.depth import outputs, pointcloud
from pe_spatial.depth.datasets import DepthPairDataset
from pe_spatial.depth.inference import DepthPredictor, InputImage, Sources
from pe_spatial.depth.outputs import is_valid
from pe_spatial.depth.transforms import read_depth
from pe_spatial.encoder.files import locate
from pe_spatial.engine.checkpoints import AtomicLocalBackend
from pe_spatial.errors import ConfigError, DatasetError

_write = AtomicLocalBackend().put


@dataclass(frozen=True, kw_only=True)
class OutputOptions:
    """Which files are derived from a prediction, and how."""

    formats: Collection[str] = ("png", "color")  # 'png' (16 bits), 'color' (with a color bar), 'ply' (a point cloud)
    png_scale: float = 1000  # units of the PNG files per meter
    colors: str = "Spectral"  # a matplotlib colormap
    color_range: tuple[float, float] | None = None  # (near, far); None covers `percentiles` of every image
    percentiles: tuple[float, float] = (2, 98)  # (low, high), from 0 to 100
    intrinsics: Sequence[float] | None = None  # (fx, fy, cx, cy) in pixels; None: from EXIF, or guessed from `fov`
    fov: float = 60  # field of view in degrees along the longer side
    edge_ratio: float | None = None  # omit points at edges in depth, see `without_edges`

    def __post_init__(self) -> None:
        if self.color_range and not self.color_range[0] < self.color_range[1]:
            raise ConfigError(f"the color range is {self.color_range}; it must rise")
        if not 0 <= self.percentiles[0] < self.percentiles[1] <= 100:
            raise ConfigError(f"percentiles are {self.percentiles}; they must rise, between 0 and 100")


class GroundTruth:
    """Ground truth by image, from a table of pairs (.csv, see `DepthPairDataset`), or a folder with a map per name.

    `scale` is in units per meter, for the maps in a folder; NPY and EXR files hold meters.
    """

    def __init__(self, source: str | Path, *, scale: float) -> None:
        self.source, self.scale = Path(source), scale
        self.pairs = None
        if self.source.suffix == ".csv":
            root = str(self.source.parent)
            pairs = DepthPairDataset(ann_file=self.source.name, data_root=root, serialize_data=False, pipeline=[])
            self.pairs = {Path(pair["img_path"]).resolve(): pair for pair in pairs.data_list}
        elif not self.source.is_dir():
            raise DatasetError(f"{source} is neither a folder nor a .csv file; give ground truth as one of them")

    def read(self, image: InputImage, size: tuple[int, ...]) -> np.ndarray | None:
        """Return the depth (H, W) of an image in meters, or None; DatasetError if it is not of `size`."""
        if self.pairs is not None:
            pair = self.pairs.get(image.path.resolve())
            path, scale = (pair["depth_path"], pair["depth_scale"]) if pair else (None, 1)
        else:
            paths = [self.source / f"{image.name}{suffix}" for suffix in (".png", ".npy", ".tiff", ".pgm", ".exr")]
            path = next((str(path) for path in paths if path.is_file()), None)
            scale = 1 if path and path.endswith((".npy", ".exr")) else self.scale
        if path is None:
            return None
        depth = read_depth(path, scale=scale)
        if depth.shape != size:
            raise DatasetError(
                f"{path} is {depth.shape[0]}x{depth.shape[1]} and the prediction of {image.path} is "
                f"{size[0]}x{size[1]} (height x width); give ground truth of the same size"
            )
        return depth


class DepthFolder:
    """A folder with NAME.npy, depth (H, W) float32, for each image of `sources`, and with files derived from them.

    `progress` wraps an iteration and takes its description, such as `tqdm`.
    """

    def __init__(
        self, folder: Path, sources: Sources, *, progress: Callable[..., Iterable[Any]] = lambda images, _: images
    ) -> None:
        self.folder, self.sources, self.progress = folder, sources, progress

    def start(self, *, checkpoint: str | Path, overwrite: bool, **model: Any) -> None:
        """Record in metadata.json what the predictions depend on: the checkpoint and the options in `model`.

        Raises ConfigError if the folder holds predictions of another model and `overwrite` is False.
        """
        digest = hashlib.sha256(locate(checkpoint).read_bytes()).hexdigest()
        model = {"checkpoint": Path(checkpoint).name, "sha256": digest, **model}
        path = self.folder / "metadata.json"
        if path.is_file() and not overwrite:
            before = json.loads(path.read_text())["model"]
            names = ", ".join(key for key in model if before.get(key) != model[key])
            if names:
                raise ConfigError(
                    f"{self.folder} holds predictions with another {names}; choose another --out, or --overwrite"
                )
        _write(json.dumps({"model": model}).encode(), path)

    def predict(
        self, predictor: DepthPredictor, *, batch_size: int = 1, tile: int | None = None, overlap: int = 64,
        overwrite: bool = False,
    ) -> tuple[Counter[str], list[str]]:  # fmt: skip
        """Write NAME.npy for every image that has none; return counts of images, and why some could not be read.

        `batch_size` counts images of one size, or tiles, per forward pass. Images larger than a `tile` (in pixels, as
        `overlap`) are predicted as in `DepthPredictor.tiled`. `overwrite` predicts images again that have their file.
        """
        if batch_size < 1:
            raise ConfigError(f"the batch size is {batch_size}; it must be at least 1")
        counts: Counter[str] = Counter()
        unreadable: list[str] = []
        waiting: list[tuple[str, np.ndarray]] = []

        def flush() -> None:
            if waiting:
                for (name, _), depth in zip(waiting, predictor([image for _, image in waiting]), strict=True):
                    self._save(name, depth)
            waiting.clear()

        for image in self.progress(self.sources, "depth"):
            if not overwrite and (self.folder / f"{image.name}.npy").is_file():
                counts["kept"] += 1
                continue
            try:
                rgb = image.read()
            except DatasetError as error:
                unreadable.append(str(error))
                continue
            counts["predicted"] += 1
            if tile and max(rgb.shape[:2]) > tile:
                self._save(image.name, predictor.tiled(rgb, tile=tile, overlap=overlap, batch_size=batch_size))
                continue
            if waiting and (len(waiting) == batch_size or waiting[0][1].shape != rgb.shape):
                flush()
            waiting.append((image.name, rgb))
        flush()
        return counts, unreadable

    def _save(self, name: str, depth: np.ndarray) -> None:
        file = io.BytesIO()
        np.save(file, depth)
        _write(file.getvalue(), self.folder / f"{name}.npy")

    def predictions(self, description: str) -> Iterator[tuple[InputImage, np.ndarray]]:
        """Yield each image that has a prediction, and its depth (H, W)."""
        for image in self.progress(self.sources, description):
            path = self.folder / f"{image.name}.npy"
            if path.is_file():
                yield image, np.load(path)

    def color_range(self, options: OutputOptions, truth: GroundTruth | None) -> tuple[float, float]:
        """Return the range of the colors, shared by all images and their ground truth."""
        if options.color_range:
            return options.color_range
        ranges = []
        for image, depth in self.predictions("color range"):
            target = truth.read(image, depth.shape) if truth else None
            ranges += [outputs.depth_range(x, options.percentiles) for x in (depth, target) if x is not None]
        lows, highs = zip(*filter(None, ranges), strict=True) if any(ranges) else ((0.0,), (1.0,))
        return min(lows), max(highs)

    def derive(self, options: OutputOptions, *, quantity: str, truth: GroundTruth | None = None) -> dict[str, Any]:
        """Write the files that `options` and the ground truth ask for; return the complete metadata.json.

        `quantity` is that of the predictor, such as 'meter'; maps of the error need the `truth` of some images.
        """
        limits = self.color_range(options, truth) if "color" in options.formats else None
        images = {}
        for image, depth in self.predictions("files"):
            target = truth.read(image, depth.shape) if truth else None
            images[image.name] = self._derive_image(image, depth, target, options, quantity, limits)
        if truth and images and not any("abs_rel" in entry for entry in images.values()):
            raise DatasetError(f"{truth.source} has a depth map for none of the {len(images)} images; check the names")
        path = self.folder / "metadata.json"
        metadata = {
            **json.loads(path.read_text()),
            "unit": quantity,
            "metric": quantity == "meter",
            "missing": 0,
            "png_scale": options.png_scale,
            "colors": {"name": options.colors, "range": limits} if limits else None,
            "images": images,
        }
        _write(json.dumps(metadata, indent=1).encode(), path)
        return metadata

    def _derive_image(
        self, image: InputImage, depth: np.ndarray, target: np.ndarray | None, options: OutputOptions, quantity: str,
        limits: tuple[float, float] | None,
    ) -> dict[str, Any]:  # fmt: skip
        base, (height, width), values = self.folder / image.name, depth.shape, depth[is_valid(depth)]
        entry = {"source": str(image.path), "height": height, "width": width, "missing": int(depth.size - values.size)}
        if values.size:
            entry |= {"min": float(values.min()), "median": float(np.median(values)), "max": float(values.max())}
        if "png" in options.formats:
            data, entry["saturated"] = outputs.encode_png16(depth, options.png_scale, {"depth_unit": quantity})
            _write(data, f"{base}_depth.png")
        label = "depth [m]" if quantity == "meter" else quantity
        if limits:
            _write(outputs.encode_color(depth, limits, options.colors, label), f"{base}_color.png")
        if "ply" in options.formats:
            points = pointcloud.without_edges(depth, options.edge_ratio) if options.edge_ratio else depth
            if options.intrinsics:
                camera = pointcloud.given_camera(options.intrinsics, depth.shape)
            else:
                exif = pointcloud.exif_camera(image.path, depth.shape)
                camera = exif or pointcloud.guessed_camera(depth.shape, options.fov)
            data, entry["points"] = pointcloud.encode_ply(points, image.read(), camera, [f"unit {quantity}"])
            entry["intrinsics"] = vars(camera).copy()
            _write(data, f"{base}.ply")
        if target is not None:
            both = is_valid(depth) & is_valid(target)
            entry["abs_rel"] = float((np.abs(depth - target)[both] / target[both]).mean()) if both.any() else None
            _write(outputs.encode_error(depth, target), f"{base}_error.png")
            if limits:
                _write(outputs.encode_color(target, limits, options.colors, label), f"{base}_truth.png")
        return entry


def summarize(metadata: Mapping[str, Any]) -> list[str]:
    """Return sentences about what a reader of the files has to know: saturated pixels, guessed cameras, the error."""
    lines = []
    images = metadata["images"].values()
    saturated = [entry["saturated"] for entry in images if entry.get("saturated")]
    if saturated:
        scale = metadata["png_scale"]
        lines.append(
            f"{sum(saturated)} pixels in {len(saturated)} images exceed {65535 / scale:g} m, the largest depth of "
            f"a PNG at --scale {scale:g}, and are saturated; the .npy files hold their depth"
        )
    cameras = Counter(entry["intrinsics"]["source"].partition(":")[0] for entry in images if "intrinsics" in entry)
    if cameras:
        lines.append(f"cameras of the point clouds: {', '.join(f'{n} {source}' for source, n in cameras.items())}")
    if cameras["GUESS"]:
        lines.append("point clouds with a guessed camera are distorted; give --intrinsics to measure in them")
    errors = [entry["abs_rel"] for entry in images if entry.get("abs_rel") is not None]
    if errors:
        lines.append(f"abs_rel {np.mean(errors):.4f} on {len(errors)} images with ground truth (all valid pixels)")
    return lines
