"""The models of the page, what an upload may be, and errors as one sentence."""

import html
import inspect
import logging
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import wraps
from pathlib import Path
from typing import Any

import numpy as np

from pe_spatial.encoder.files import CheckpointError
from pe_spatial.errors import ConfigError, DatasetError, TrainingError
from pe_spatial.features.extract import FeatureExtractor, load_encoder
from pe_spatial.images import decode_rgb, read_bytes, read_size
from pe_spatial.language.model import PECore
from pe_spatial.loading import load
from pe_spatial.multitask.models import MultiTask
from pe_spatial.predict.predictor import load_words

SHIPPED = "pe_synthetic_xs8_192"
"""The encoder in the package."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a user may upload."""

    megabytes: float = 50
    megapixels: float = 40
    max_frames: int = 300

    def __post_init__(self) -> None:
        """Raise ConfigError for a limit that lets nothing through."""
        for name, option in (
            ("megabytes", "--max-upload"),
            ("megapixels", "megapixels"),
            ("max_frames", "--max-frames"),
        ):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{option} is {getattr(self, name):g}; it must be more than 0")


@dataclass(frozen=True, kw_only=True)
class Models:
    """The loaded models of the page.

    Attributes:
        predictors: 'detection', 'depth' and 'tracking' -> predictor, and 'together' -> `MultiTask`, of those given.
        encoders: name -> its feature extractor.
        limits: of uploads.
        labels: folder of the labeling projects, which outlive the page.
        words: the PE-Core that finds phrases, if one was given.
    """

    predictors: dict[str, Any] = field(default_factory=dict)
    encoders: dict[str, FeatureExtractor] = field(default_factory=dict)
    limits: Limits = Limits()
    labels: Path = Path("labels")
    words: PECore | None = None
    _folder: Any = field(default_factory=lambda: tempfile.TemporaryDirectory(prefix="pe_spatial_"))

    def new_file(self, name: str) -> Path:
        """Return the path of a file to write, in a temporary folder of its own that ends with the page."""
        return Path(tempfile.mkdtemp(dir=self._folder.name)) / name

    def read_image(self, path: str | None) -> np.ndarray:
        """Read an upload, (H, W, 3) uint8 RGB; DatasetError for none, a broken one and one beyond the limits."""
        data = read_bytes(self.checked(path, "an image"))
        name = Path(str(path)).name
        try:
            height, width = read_size(Path(str(path)))
        except DatasetError:
            height, width = 0, 0  # `decode_rgb` says what the file is
        if height * width > self.limits.megapixels * 1e6:
            raise DatasetError(
                f"{name} has {width}x{height} pixels, and the page takes at most {self.limits.megapixels:g} megapixels"
                "; resize or crop it"
            )
        return decode_rgb(data, name)

    def checked(self, path: str | None, what: str) -> Path:
        """Return the path of an upload; DatasetError for none and for a file that is too large."""
        if path is None:
            raise DatasetError(f"there is no file; upload {what}")
        megabytes = Path(path).stat().st_size / 1e6
        if megabytes > self.limits.megabytes:
            raise DatasetError(
                f"{Path(path).name} has {megabytes:.0f} MB, and the page takes at most {self.limits.megabytes:g} MB; "
                "give a smaller file, or start the page with a larger --max-upload"
            )
        return Path(path)


def load_models(
    checkpoints: dict[str, str | None], encoders: Sequence[str], *, device: str, limits: Limits,
    labels: Path = Models.labels, together: Sequence[str] = (), size: int | None = None, words: str | None = None,
) -> Models:  # fmt: skip
    """Load the checkpoint of each task, those that share an encoder (`MultiTask`), the encoders, and a PE-Core.

    An encoder is a variant with its released weights, 'timm:NAME', or a checkpoint file. Raises ConfigError for a
    checkpoint of another task, and as `pe_spatial.load` and `load_encoder` do.
    """
    predictors: dict[str, Any] = {}
    for task, checkpoint in checkpoints.items():
        if checkpoint is not None:
            predictors[task] = load(checkpoint, device=device)
            if predictors[task].task != task:
                raise ConfigError(
                    f"{checkpoint} is a model for {predictors[task].task}, not for {task}; give a checkpoint for {task}"
                )
    if together:
        predictors["together"] = MultiTask(together, device=device, score=0.3, size=size)
    extractors = {}
    for name in encoders:
        file = Path(name).is_file()
        encoder = load_encoder(None if file else name, name if file else "released")
        extractors[Path(name).name if file else name] = FeatureExtractor(encoder, device=device)
    core = load_words(words, device)
    return Models(predictors=predictors, encoders=extractors, limits=limits, labels=labels, words=core)


def sentence(error: Exception) -> str:
    """Say what is wrong in one sentence; what nobody expected goes to the log with its traceback."""
    if isinstance(error, CheckpointError | ConfigError | DatasetError | TrainingError):
        return str(error)
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}; the disk of the server may be full, or its temporary folder not writable"
    if "out of memory" in str(error):
        return "the model ran out of memory; give a smaller image or video, or start the page with --device cpu"
    _log.error("the page failed", exc_info=error)
    return f"the page failed ({type(error).__name__}); the terminal in which it runs shows where"


def with_sentences(job: Callable[..., Any], error_class: Callable[[str], Exception]) -> Callable[..., Any]:
    """Wrap a function or generator: its errors become an `error_class` of one `sentence`, escaped for HTML."""

    def shown(error: Exception) -> Exception:
        return error_class(html.escape(sentence(error), quote=False))

    @wraps(job)
    def call(*args: Any) -> Any:
        try:
            return job(*args)
        except Exception as error:
            raise shown(error) from None

    @wraps(job)
    def iterate(*args: Any) -> Iterator[Any]:
        try:
            yield from job(*args)
        except Exception as error:
            raise shown(error) from None

    return iterate if inspect.isgeneratorfunction(job) else call
