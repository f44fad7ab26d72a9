"""Depth of many images: a folder of predictions that can be resumed, files derived from them, and metadata.json."""

import io
import json
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pe_spatial.depth import outputs, pointcloud
from pe_spatial.depth.datasets import DepthPairDataset
from pe_spatial.depth.inference import DepthPredictor
from pe_spatial.depth.outputs import is_valid
from pe_spatial.depth.transforms import FORMATS, SCALES, check_scale, fit_to_image, read_depth
from pe_spatial.engine.checkpoints import AtomicLocalBackend
from pe_spatial.engine.sources import InputImage, Sources
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

    `scale` is in units per meter, for the maps in a folder; NPY and EXR files hold meters. None takes millimeters, but
    refuses maps that agree with the predictions at another usual scale.
    """

    def __init__(self, source: str | Path, *, scale: float | None) -> None:
        self.source, self.scale = Path(source), scale
        self.pairs = None
        if self.source.suffix == ".csv":
            root = str(self.source.parent)
            pairs = DepthPairDataset(ann_file=self.source.name, data_root=root, serialize_data=False, pipeline=[])
            self.pairs = {Path(pair["img_path"]).resolve(): pair for pair in pairs.data_list}
        elif not self.source.is_dir():
            raise DatasetError(f"{source} is neither a folder nor a .csv file; give ground truth as one of them")

    def find(self, name: str, image: Path) -> tuple[str | None, float]:
        """Return the file of the depth map of an image, or None, and its units per meter."""
        if self.pairs is not None:
            pair = self.pairs.get(image.resolve(), {})
            return pair.get("depth_path"), pair.get("depth_scale", 1000)
        paths = [self.source / f"{name}{suffix}" for suffix in FORMATS]
        path = next((str(path) for path in paths if path.is_file()), None)
        return path, 1 if path and path.endswith((".npy", ".npz", ".exr")) else self.scale or 1000

    def read(self, name: str, image: Path, prediction: np.ndarray) -> np.ndarray | None:
        """Return the depth (H, W) of an image in meters, or None; DatasetError for another size or a wrong scale."""
        path, scale = self.find(name, image)
        if path is None:
            return None
        option = "--gt-scale " if self.pairs is None else "units_per_meter="
        depth = fit_to_image(read_depth(path, scale=scale), path, prediction.shape, image)
        check_scale(depth, scale=scale, max_depth=None, path=path, option=option)
        if self.pairs is None and self.scale is None and scale != 1:
            _check_ratio(depth, prediction, path)
        return depth


def _check_ratio(depth: np.ndarray, prediction: np.ndarray, path: str) -> None:
    """Raise DatasetError for a depth map, read as millimeters, that agrees with the prediction at another scale."""
    both = is_valid(depth) & is_valid(prediction)
    ratio = float(np.median(prediction[both] / depth[both])) if both.any() else 1.0
    for scale, name in SCALES.items():
        if scale != 1000 and 0.8 < ratio * scale / 1000 < 1.25:
            raise DatasetError(
                f"the prediction is {ratio:.3g} times {path}, read as millimeters; give --gt-scale {scale} ({name}), "
                "or --gt-scale 1000 if the prediction is that wrong"
            )


class DepthFolder:
    """A folder with NAME.npy, depth (H, W) float32, for each image of `sources`, and with files derived from them.

    Args:
        options: which files to derive.
        quantity: what is predicted, such as 'meter'.
        truth: ground truth of some images, for maps of the error.
        progress: wraps an iteration and takes its description, such as `tqdm`.
    """

    def __init__(
        self, folder: Path, sources: Sources, options: OutputOptions, *, quantity: str,
        truth: GroundTruth | None = None, progress: Callable[..., Iterable[Any]] = lambda images, _: images,
    ) -> None:  # fmt: skip
        self.folder, self.sources, self.options, self.progress = folder, sources, options, progress
        self.quantity, self.truth = quantity, truth
        self.images: dict[str, dict[str, Any]] = {}  # what metadata.json says about the images with all their files
        self.ranges: list[tuple[float, float]] = []  # of their depth and ground truth
        self.kept = 0  # images that were predicted before

    def predict(
        self, predictor: DepthPredictor, *, batch_size: int = 1, size: int | None = None, tile: int | None = None,
        overlap: int = 64, overwrite: bool = False,
    ) -> tuple[Counter[str], list[str]]:  # fmt: skip
        """Write all files of every image that has no NAME.npy; return counts, and why images could not be read.

        `batch_size` counts images of one size, or tiles, per forward pass; `size` is that of `DepthPredictor`. Images
        larger than a `tile` (in pixels, as `overlap`) are predicted as in `DepthPredictor.tiled`. `overwrite` predicts
        images again that have their file.
        """
        if batch_size < 1:
            raise ConfigError(f"the batch size is {batch_size}; it must be at least 1")
        counts: Counter[str] = Counter()
        unreadable: list[str] = []
        waiting: list[tuple[InputImage, np.ndarray]] = []

        def flush() -> None:
            if waiting:
                depths = predictor([rgb for _, rgb in waiting], size=size)
                for (image, _), depth in zip(waiting, depths, strict=True):
                    self._save(image, depth)
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
                self._save(image, predictor.tiled(rgb, tile=tile, overlap=overlap, batch_size=batch_size))
                continue
            if waiting and waiting[0][1].shape != rgb.shape:
                flush()
            waiting.append((image, rgb))
            if len(waiting) == batch_size:
                flush()
        flush()
        self.kept = counts["kept"]
        return counts, unreadable

    def _save(self, image: InputImage, depth: np.ndarray) -> None:
        file = io.BytesIO()
        np.save(file, depth)
        _write(file.getvalue(), self.folder / f"{image.name}.npy")
        self._derive(image, depth)

    def finish(self) -> dict[str, Any]:
        """Derive the files of images that were predicted before; return the complete metadata.json.

        Without a given range, colors are drawn again, with one range for all images and their ground truth.
        """
        for image in self.progress(self.sources, "files") if self.kept else ():
            path = self.folder / f"{image.name}.npy"
            if image.name not in self.images and path.is_file():
                self._derive(image, np.load(path))
        if self.truth and self.images and not any("abs_rel" in entry for entry in self.images.values()):
            count = len(self.images)
            raise DatasetError(f"{self.truth.source} has a depth map for none of the {count} images; check the names")
        limits = None
        if "color" in self.options.formats:
            limits = self._limits()
            if not self.options.color_range and len(self.images) > 1:
                for name in self.progress(self.images, "colors"):
                    depth = np.load(self.folder / f"{name}.npy")
                    self._color(name, depth, self._truth(name, depth, Path(self.images[name]["source"])), limits)
        path = self.folder / "metadata.json"
        metadata = {
            **json.loads(path.read_text()),
            "unit": self.quantity,
            "metric": self.quantity == "meter",
            "missing": 0,
            "png_scale": self.options.png_scale,
            "colors": {"name": self.options.colors, "range": limits} if limits else None,
            "images": self.images,
        }
        _write(json.dumps(metadata, indent=1).encode(), path)
        return metadata

    def _truth(self, name: str, depth: np.ndarray, path: Path) -> np.ndarray | None:
        return self.truth.read(name, path, depth) if self.truth else None

    def _limits(self) -> tuple[float, float]:
        """Return the range of the colors: the given one, or that of all images until now."""
        if self.options.color_range:
            return self.options.color_range
        lows, highs = zip(*self.ranges, strict=True) if self.ranges else ((0.0,), (1.0,))
        return min(lows), max(highs)

    def _derive(self, image: InputImage, depth: np.ndarray) -> None:
        """Write the files of one image."""
        options, base = self.options, self.folder / image.name
        target = self._truth(image.name, depth, image.path)
        (height, width), values = depth.shape, depth[is_valid(depth)]
        entry = {"source": str(image.path), "height": height, "width": width, "missing": int(depth.size - values.size)}
        if values.size:
            entry |= {"min": float(values.min()), "median": float(np.median(values)), "max": float(values.max())}
        if "png" in options.formats:
            data, entry["saturated"] = outputs.encode_png16(depth, options.png_scale, {"depth_unit": self.quantity})
            _write(data, f"{base}_depth.png")
        if "color" in options.formats:
            ranges = [outputs.depth_range(x, options.percentiles) for x in (depth, target) if x is not None]
            self.ranges += filter(None, ranges)
            self._color(image.name, depth, target, self._limits())
        if "ply" in options.formats:
            points = pointcloud.without_edges(depth, options.edge_ratio) if options.edge_ratio else depth
            if options.intrinsics:
                camera = pointcloud.given_camera(options.intrinsics, depth.shape)
            else:
                exif = pointcloud.exif_camera(image.path, depth.shape)
                camera = exif or pointcloud.guessed_camera(depth.shape, options.fov)
            data, entry["points"] = pointcloud.encode_ply(points, image.read(), camera, [f"unit {self.quantity}"])
            entry["intrinsics"] = vars(camera).copy()
            _write(data, f"{base}.ply")
        if target is not None:
            both = is_valid(depth) & is_valid(target)
            entry["abs_rel"] = float((np.abs(depth - target)[both] / target[both]).mean()) if both.any() else None
            _write(outputs.encode_error(depth, target), f"{base}_error.png")
        self.images[image.name] = entry

    def _color(self, name: str, depth: np.ndarray, truth: np.ndarray | None, limits: tuple[float, float]) -> None:
        label = "depth [m]" if self.quantity == "meter" else self.quantity
        for kind, values in (("color", depth), ("truth", truth)):
            if values is not None:
                data = outputs.encode_color(values, limits, self.options.colors, label)
                _write(data, self.folder / f"{name}_{kind}.png")


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
