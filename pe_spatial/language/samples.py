"""What is classified or retrieved: folders of images or videos, WebDatasets, captions; and lists of classes."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from pe_spatial.errors import ConfigError, DatasetError, listed
from pe_spatial.images import decode_rgb, image_suffixes, is_hidden, read_rgb
from pe_spatial.video import VIDEOS

from .embedding import video_frames
from .protocol import check_names


@dataclass(frozen=True)
class Sample:
    """An image or a video: its name, how to read it, and the folder or number of its class, None without one."""

    name: str
    read: Callable[[], Any]
    label: str | int | None


def find_samples(root: Path) -> list[Sample]:
    """Return the images or videos below a folder, each with the name of the folder it is in; or those of a WebDataset.

    Files at the top of the folder have no class. Raises DatasetError for a folder with neither, or with both.
    """
    if not root.exists():
        raise DatasetError(f"there is no folder {root}; check the path")
    if root.is_file() and root.suffix != ".tar":
        raise DatasetError(f"{root} is a file; give a folder of images or videos, or a .tar of a WebDataset")
    shards = [root] if root.is_file() else sorted(root.rglob("*.tar"))
    if shards:
        return _read_shards(shards)
    files = [path for path in sorted(root.rglob("*")) if path.is_file() and not is_hidden(path, root)]
    images = [path for path in files if path.suffix.lower() in image_suffixes()]
    videos = [path for path in files if path.suffix.lower() in VIDEOS]
    if bool(images) == bool(videos):
        what = "images and videos; give a folder of either" if images else "no images, videos or .tar files"
        raise DatasetError(f"{root} has {what}")
    read: Any = read_rgb if images else video_frames
    samples = []
    for path in images or videos:
        place = path.relative_to(root)
        label = place.parts[0] if len(place.parts) > 1 else None
        samples.append(Sample(str(place), partial(read, path), label))
    return samples


def _read_shards(shards: Sequence[Path]) -> list[Sample]:
    """Read the images of .tar shards into memory, still encoded; `cls` is the number of the class."""
    try:
        import webdataset
    except ModuleNotFoundError as error:
        raise ImportError(".tar files need webdataset: pip install webdataset", name="webdataset") from error
    samples: list[Sample] = []
    for one in webdataset.WebDataset([str(path) for path in shards], shardshuffle=False):
        name = one["__key__"]
        kinds = [kind for kind in one if f".{kind.rpartition('.')[2].lower()}" in image_suffixes()]
        if len(kinds) != 1:
            raise DatasetError(f"{one['__url__']} has {len(kinds)} images for {name}; a sample needs one")
        label = one.get("cls")
        if label is not None and not label.strip().isdigit():
            raise DatasetError(f"{one['__url__']}: {name}.cls is {label[:20]!r}; it should be the number of a class")
        read = partial(decode_rgb, one[kinds[0]], f"{name}.{kinds[0]}")
        samples.append(Sample(name, read, None if label is None else int(label)))
    if not samples:
        raise DatasetError(f"{shards[0]} has no samples; give the .tar files of a WebDataset")
    return samples


def read_classes(text: str | None, file: Path | None, root: Path, samples: Sequence[Sample]) -> dict[str, str]:
    """Return folder -> name of each class, in order; a class whose folder is not known stands for itself.

    Args:
        text: names with commas between them, or 'imagenet'.
        file: one name per line, or `folder,name` or `folder<TAB>name`.
        root: the data; a WebDataset may have a classnames.txt.
        samples: the data's samples, whose folders are the classes if nothing else is given.
    """
    beside = (root if root.is_dir() else root.parent) / "classnames.txt"
    numbered = any(isinstance(sample.label, int) for sample in samples)
    if file is None and text is None and numbered and beside.is_file():
        file = beside
    if text is not None and text.strip().lower() == "imagenet":
        return {f"{name} {i}": name for i, name in enumerate(imagenet_names())}  # two names are there twice
    if text is not None:
        return {name: name for name in check_names(text.split(",") if text.strip() else [])}
    if file is not None:
        return _read_file(file)
    folders = sorted({sample.label for sample in samples if isinstance(sample.label, str)})
    if not folders:
        raise ConfigError(
            f"{root} has no class folders and no classnames.txt; put the images of each class into a folder of its "
            "name, or give --classes a,b,c to classify without labels"
        )
    names = check_names([folder.replace("_", " ") for folder in folders], f"the folders of {root}")
    return dict(zip(folders, names, strict=True))


def _read_file(file: Path) -> dict[str, str]:
    lines = [line.strip() for line in _lines(file, "class")]
    pairs = [re.split(r"\t|,", line, maxsplit=1) for line in lines]
    names = check_names([pair[-1] for pair in pairs], str(file))
    return {pair[0].strip() if len(pair) == 2 else name: name for pair, name in zip(pairs, names, strict=True)}


def _lines(file: Path, what: str) -> list[str]:
    """Return the lines of a text file that are not empty."""
    try:
        return [line for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8"
        raise ConfigError(f"{file} cannot be read as text ({reason}); give a file with one {what} per line") from None


def imagenet_names() -> list[str]:
    """Return ImageNet's 1000 class names in the order of its folders, as open_clip has them."""
    return list(_metadata().IMAGENET_CLASSNAMES)


def read_templates(text: str | None) -> tuple[str, ...] | None:
    """Return the templates of 'imagenet' (80), 'simple' (7), or a file with one per line; None for None."""
    if text is None:
        return None
    known = {"imagenet": "OPENAI_IMAGENET_TEMPLATES", "simple": "SIMPLE_IMAGENET_TEMPLATES"}
    if text in known:
        return tuple(template("{}") for template in getattr(_metadata(), known[text]))
    if not Path(text).is_file():
        raise ConfigError(f"--templates is {text}; allowed are imagenet, simple, and a file with one per line")
    return tuple(_lines(Path(text), "template"))


def _metadata() -> Any:
    try:
        from open_clip import zero_shot_metadata
    except ImportError as error:
        raise ImportError(
            f"ImageNet's names need {error.name}: pip install 'pe_spatial[language]'", name=error.name
        ) from error
    return zero_shot_metadata


def targets(samples: Sequence[Sample], classes: Mapping[str, str], root: Path) -> list[int] | None:
    """Return the class of each sample, or None if no sample has one.

    Folders are matched with the classes by name; if none matches and there are as many, by their order.
    Raises DatasetError for folders without a class.
    """
    labels = [sample.label for sample in samples]
    if all(label is None for label in labels):
        return None
    if all(isinstance(label, int) for label in labels):
        wrong = [label for label in labels if not 0 <= label < len(classes)]  # type: ignore[operator]
        if wrong:
            raise DatasetError(f"{root} has the class {wrong[0]}, and {len(classes)} classes are named")
        return labels  # type: ignore[return-value]
    if any(label is None for label in labels):
        loose = [sample.name for sample in samples if sample.label is None]
        raise DatasetError(f"{root} has {listed(loose, 2)} outside of its class folders; move or remove them")
    folders = sorted({str(label) for label in labels})
    number = {_plain(name): i for i, pair in enumerate(classes.items()) for name in pair}
    unknown = [folder for folder in folders if _plain(folder) not in number]
    if len(unknown) == len(folders) == len(classes):
        number = {_plain(folder): i for i, folder in enumerate(folders)}
    elif unknown:
        raise DatasetError(f"no class is named for {listed(unknown)} of {root}; name a class for each folder")
    return [number[_plain(str(label))] for label in labels]


def _plain(text: str) -> str:
    return text.replace("_", " ").strip().lower()


def read_captions(file: Path, root: Path) -> tuple[list[Sample], list[str], list[int]]:
    """Return images or videos, texts, and the index of the image or video of each text.

    `file` is COCO's captions, or MSR-VTT's JSON: `sentences` with video_id and caption, or a list of objects with
    `video` or `image`, and `caption`, a text or several. Files lie below `root`.
    """
    if not file.is_file():
        raise DatasetError(f"there is no file {file}; check the path")
    try:
        table = json.loads(file.read_text(encoding="utf-8"))
        pairs = _pairs(table)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise DatasetError(f"{file} holds no captions as COCO or MSR-VTT write them ({reason}); give such") from None
    if not pairs:
        raise DatasetError(f"{file} has no captions")
    names = list(dict.fromkeys(name for name, _ in pairs))
    number = {name: i for i, name in enumerate(names)}
    samples = [_named_sample(name, root) for name in names]
    return samples, [text for _, text in pairs], [number[name] for name, _ in pairs]


def _pairs(table: Any) -> list[tuple[str, str]]:
    if isinstance(table, list):
        pairs = []
        for one in table:
            texts = one["caption"]
            name = str(one.get("image") or one["video"])
            pairs += [(name, text) for text in ([texts] if isinstance(texts, str) else texts)]
        return pairs
    if "sentences" in table:
        tested = {video["video_id"] for video in table.get("videos", []) if video.get("split", "test") == "test"}
        rows = [(str(one["video_id"]), one["caption"]) for one in table["sentences"]]
        return [(name, text) for name, text in rows if not tested or name in tested]
    files = {image["id"]: image["file_name"] for image in table["images"]}
    return [(files[one["image_id"]], one["caption"]) for one in table["annotations"]]


def _named_sample(name: str, root: Path) -> Sample:
    """Return the sample of a name, which may lack its suffix."""
    path = root / name
    if not path.is_file():
        path = next((root / f"{name}{suffix}" for suffix in VIDEOS if (root / f"{name}{suffix}").is_file()), path)
    if not path.is_file():
        raise DatasetError(f"{root} lacks {name}, which has captions; restore it, or give the folder it is in")
    read: Any = video_frames if path.suffix.lower() in VIDEOS else read_rgb
    return Sample(name, partial(read, path), None)
