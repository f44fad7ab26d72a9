"""Checkpoints of torch without their code: what is not a tensor or plain data becomes an object that does nothing."""

import codecs
import collections
import pickle
import re
import types
import zipfile
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch


class _Inert:
    """Stands for an object that trainers save beside weights: takes any state, does nothing, imports nothing."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __setstate__(self, _: Any) -> None:
        pass


class _InertDict:
    """Stands for a mapping; what it holds stays readable."""

    def __new__(cls, *_: Any, **__: Any) -> Any:
        return collections.OrderedDict()


class _InertList:
    """Stands for a list."""

    def __new__(cls, *_: Any, **__: Any) -> Any:
        return []


# module: classes that trainers are known to save. getattr is how a HistoryBuffer keeps its methods.
_CLASSES = """
argparse: Namespace
builtins: getattr slice range frozenset list tuple dict int float str bool bytes object
copyreg: _reconstructor
datetime: datetime date time timedelta timezone
decimal: Decimal
lightning.pytorch.callbacks.model_checkpoint: ModelCheckpoint
mmengine.logging.history_buffer: HistoryBuffer
numpy: ndarray dtype
numpy.core.multiarray: _reconstruct scalar
numpy._core.multiarray: _reconstruct scalar
numpy.dtypes: BoolDType Int8DType Int16DType Int32DType Int64DType UInt8DType UInt32DType UInt64DType
numpy.dtypes: Float16DType Float32DType Float64DType
numpy.random._pickle: __randomstate_ctor __generator_ctor __bit_generator_ctor
omegaconf.base: ContainerMetadata Metadata
omegaconf.listconfig: ListConfig
omegaconf.nodes: AnyNode StringNode IntegerNode FloatNode BooleanNode EnumNode PathNode BytesNode
pathlib: Path PosixPath WindowsPath PurePath PurePosixPath PureWindowsPath
pathlib._local: Path PosixPath WindowsPath PurePath PurePosixPath PureWindowsPath
pytorch_lightning.callbacks.model_checkpoint: ModelCheckpoint
torch.torch_version: TorchVersion
transformers.trainer_utils: IntervalStrategy SchedulerType HubStrategy SaveStrategy
types: SimpleNamespace
typing: Any Union Optional
uuid: UUID SafeUUID
"""
_MAPPINGS = """
addict.addict: Dict
collections: defaultdict
detectron2.config.config: CfgNode
easydict: EasyDict
fvcore.common.config: CfgNode
lightning.fabric.utilities.data: AttributeDict
lightning.pytorch.utilities.parsing: AttributeDict
lightning_fabric.utilities.data: AttributeDict
ml_collections.config_dict.config_dict: ConfigDict
mmcv.utils.config: ConfigDict
mmengine.config.config: ConfigDict
munch: Munch
omegaconf.dictconfig: DictConfig
pytorch_lightning.utilities.parsing: AttributeDict
yacs.config: CfgNode
"""


def _stand_ins(table: str, base: type) -> list[type]:
    # torch finds an allowed object by its full name, so a class of that name stands for it
    rows = [line.split(": ") for line in table.strip().splitlines()]
    return [type(name, (base,), {"__module__": home}) for home, names in rows for name in names.split()]


STAND_INS = (
    _stand_ins(_CLASSES, _Inert) + _stand_ins(_MAPPINGS, _InertDict) + _stand_ins("collections: deque", _InertList)
)


def unpickle(path: Path, *, real: Sequence[Any] = (), map_location: Any = "cpu", mmap: bool | None = None) -> Any:
    """Return what torch.save wrote; pickled code never runs.

    Args:
        path: the file.
        real: classes and functions that are used themselves instead of a stand-in.
        map_location: as in torch.load.
        mmap: as in torch.load, for files that can be mapped.

    Raises pickle.UnpicklingError for objects that are neither data nor known, and whatever torch has for broken files.
    """
    zipped = zipfile.is_zipfile(path)
    if zipped:
        with zipfile.ZipFile(path) as archive:
            if any(name.endswith("/constants.pkl") for name in archive.namelist()):
                raise pickle.UnpicklingError("TorchScript")
    names = {(thing.__module__, thing.__name__) for thing in real}
    allowed = [*real, *(one for one in STAND_INS if (one.__module__, one.__name__) not in names)]
    options: dict[str, Any] = dict(map_location=map_location, mmap=mmap if zipped else False)
    if not hasattr(torch.serialization, "safe_globals"):  # torch before 2.5
        return torch.load(str(path), pickle_module=_restricted_pickle(allowed), weights_only=False, **options)
    if path.suffix == ".safetensors":  # which torch 2.14 hands to safetensors by its name, whatever it holds
        with path.open("rb") as file, torch.serialization.safe_globals(allowed):
            return torch.load(file, weights_only=True, map_location=map_location)
    with torch.serialization.safe_globals(allowed):
        return torch.load(str(path), weights_only=True, **options)


def _restricted_pickle(allowed: Sequence[Any]) -> types.ModuleType:
    """Return a module like pickle, for torch.load, that finds only what torch allows in weights, and `allowed`."""
    from torch import _weights_only_unpickler

    names = dict(_weights_only_unpickler._get_allowed_globals())
    names |= {"_codecs.encode": codecs.encode, "builtins.set": set, "builtins.complex": complex}
    names |= {"builtins.bytearray": bytearray, "collections.Counter": collections.Counter, "torch.device": torch.device}
    names |= {str(one): one for one in vars(torch).values() if isinstance(one, torch.dtype)}
    names |= {f"{one.__module__}.{one.__name__}": one for one in allowed}

    class Unpickler(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> Any:
            module, name = NAME_MAPPING.get((module, name), (IMPORT_MAPPING.get(module, module), name))
            if f"{module}.{name}" not in names:
                raise pickle.UnpicklingError(f"GLOBAL {module}.{name} is not allowed")
            return names[f"{module}.{name}"]

    restricted: Any = types.ModuleType("restricted_pickle")
    restricted.Unpickler = Unpickler
    restricted.load = lambda file, **options: Unpickler(file, **options).load()
    return restricted


def explain(path: Path, error: Exception) -> str:
    """Say in one sentence why `unpickle` failed, without torch's advice to run the code nevertheless."""
    text = str(error)
    if "TorchScript" in text:
        return f"{path} is a TorchScript program, not weights; save the state dict of the model and give that"
    if isinstance(error, pickle.UnpicklingError):
        code = re.search(r"GLOBAL (\S+)", text)
        if code:
            return (
                f"{path} holds more than tensors and plain data ({code[1]}), so it is not read: it could run code. "
                "Save its state dict alone and load that"
            )
        return f"{path} is truncated or not written by torch.save; download it again, or save its state dict anew"
    # safetensors and torch raise many types for broken files: RuntimeError, EOFError, SafetensorError, ...
    reason = re.split(r"\. |\n", text)[0] or type(error).__name__
    return f"{path} is truncated or not a checkpoint ({reason}); download it again"
