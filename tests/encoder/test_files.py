"""Files of weights as they come: odd objects, containers, prefixes, names, folders; code never runs."""

import argparse
import collections
import datetime
import decimal
import json
import logging
import os
import pathlib
import sys
import types
import uuid
import zipfile

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.testing import assert_close

from pe_spatial import EncoderConfig, PerceptionEncoder, from_pretrained, load_checkpoint
from pe_spatial.convert.converter import convert
from pe_spatial.encoder.files import CheckpointError, locate, read_checkpoint

CONFIG = EncoderConfig(img_size=32, patch_size=16, embed_dim=16, depth=2, num_heads=2)


@pytest.fixture(scope="module")
def state():
    torch.manual_seed(0)
    return dict(PerceptionEncoder(CONFIG).state_dict())


def raw(state, value=0.0):
    """The same names with other values, to tell two containers apart."""
    return {name: torch.full_like(x, value) for name, x in state.items()}


def save_with(path, content, name):
    """Save `content` beside an object of a class that exists only while it is written."""
    home, _, last = name.rpartition(".")
    packages = [home[:i] for i, c in enumerate(home) if c == "."] + [home]
    before = {package: sys.modules.get(package) for package in packages}
    sys.modules.update({package: types.ModuleType(package) for package in packages})
    try:
        made = type(last, (dict,), {"__module__": home})
        setattr(sys.modules[home], last, made)
        torch.save({**content, "beside": made(a=1)}, path)
    finally:
        for package, module in before.items():
            sys.modules.pop(package)
            if module is not None:
                sys.modules[package] = module


BESIDE = {
    "posix path": pathlib.PurePosixPath("/data"),
    "path": pathlib.Path("/data"),
    "windows path": pathlib.PureWindowsPath("C:/data"),
    "namespace with a path": argparse.Namespace(output_dir=pathlib.Path("/out"), lr=0.1, device=torch.device("cpu")),
    "simple namespace": types.SimpleNamespace(a=1),
    "torch version": torch.torch_version.TorchVersion("2.1.0"),
    "defaultdict of lists": collections.defaultdict(list, {"loss": [1.0]}),
    "defaultdict of numbers": collections.defaultdict(float, {"loss": 1.0}),
    "defaultdict of dicts": collections.defaultdict(dict),
    "deque": collections.deque([1, 2], maxlen=5),
    "datetime": datetime.datetime(2026, 1, 1, tzinfo=datetime.timezone.utc),
    "date and timedelta": (datetime.date(2026, 1, 1), datetime.timedelta(seconds=3)),
    "uuid": uuid.UUID(int=1),
    "decimal": decimal.Decimal("0.1"),
    "numpy": {"scalar": np.float64(1), "array": np.arange(3), "bool": np.bool_(True), "half": np.float16(1)},
    "numpy text": np.array(["a", "b"]),
    "random states": {"numpy": np.random.get_state(), "python": (3, (1, 2), None), "torch": torch.get_rng_state()},
    "generator": torch.Generator().get_state(),
    "set and frozen set": ({1}, frozenset({2})),
    "range and slice": (range(3), slice(1, 2)),
    "complex and bytes": (1j, b"\xff", bytearray(b"a")),
    "size, device, dtype": (torch.Size([1]), torch.device("cpu"), torch.bfloat16),
}


@pytest.mark.parametrize("beside", BESIDE)
def test_what_trainers_save_beside_the_weights_does_not_hinder(tmp_path, state, beside):
    torch.save({"model": state, "beside": BESIDE[beside]}, tmp_path / "w.pth")
    file = read_checkpoint(tmp_path / "w.pth")
    assert_close(file.state, state, rtol=0, atol=0)
    assert file.rest.keys() == {"beside"}


@pytest.mark.parametrize(
    "name",
    ["easydict.EasyDict", "addict.addict.Dict", "munch.Munch",
     "omegaconf.dictconfig.DictConfig", "yacs.config.CfgNode", "fvcore.common.config.CfgNode",
     "detectron2.config.config.CfgNode", "mmengine.config.config.ConfigDict", "mmcv.utils.config.ConfigDict",
     "pytorch_lightning.utilities.parsing.AttributeDict", "lightning_fabric.utilities.data.AttributeDict",
     "ml_collections.config_dict.config_dict.ConfigDict"],
)  # fmt: skip
def test_objects_of_packages_that_are_not_installed_do_not_hinder(tmp_path, state, name):
    save_with(tmp_path / "w.pth", {"state_dict": state}, name)
    file = read_checkpoint(tmp_path / "w.pth")
    assert_close(file.state, state, rtol=0, atol=0)
    assert file.rest == {"beside": {"a": 1}}


class Payload:
    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments


@pytest.mark.parametrize(
    ("function", "arguments"),
    [(os.mkdir, "{mark}"), (os.system, "mkdir {mark}"), (eval, "__import__('os').mkdir('{mark}')"),
     (exec, "__import__('os').mkdir('{mark}')"), (torch.hub.load, "{mark}"), (np.testing.runstring, "{mark}")],
    ids=lambda x: getattr(x, "__name__", ""),
)  # fmt: skip
def test_what_could_run_is_refused_beside_harmless_objects(tmp_path, state, function, arguments):
    mark = tmp_path / "it-ran"
    call = Payload(function, arguments.format(mark=mark), *([{}] if function is np.testing.runstring else []))
    torch.save({"model": state, "out": pathlib.Path("/x"), "x": call}, tmp_path / "w.pth")
    with pytest.raises(CheckpointError, match=r"w\.pth holds more than tensors .* it could run code\. Save its state"):
        read_checkpoint(tmp_path / "w.pth")
    assert not mark.exists()


# --- containers


@pytest.mark.parametrize(
    "key", ["model_state_dict", "net", "network", "module", "params", "model_state", "encoder", "backbone", "teacher",
            "model_ema", "ema_model", "state_dict_ema", "ema", "params_ema", "student", "target_encoder"]
)  # fmt: skip
def test_the_only_container_is_found(tmp_path, state, key):
    torch.save({key: state, "epoch": 3, "optimizer": {"state": {}}}, tmp_path / "w.pth")
    assert_close(read_checkpoint(tmp_path / "w.pth").state, state, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("plain", "averaged"),
    [("model", "model_ema"), ("model", "ema_model"), ("state_dict", "state_dict_ema"), ("model", "ema"),
     ("params", "params_ema"), ("model", "teacher"), ("state_dict", "ema_state"), ("module", "ema_model")],
)  # fmt: skip
def test_averaged_weights_beside_the_plain_ones_are_named_and_can_be_chosen(tmp_path, state, plain, averaged, caplog):
    average = {"module": state, "updates": 3} if averaged == "ema" else state
    torch.save({plain: raw(state), averaged: average, "epoch": 1}, tmp_path / "w.pth")
    with caplog.at_level(logging.INFO):
        assert_close(read_checkpoint(tmp_path / "w.pth").state, raw(state), rtol=0, atol=0)
    assert f"w.pth#{averaged}" in caplog.text
    chosen = read_checkpoint(f"{tmp_path / 'w.pth'}#{averaged}")
    assert_close(chosen.state, state, rtol=0, atol=0)
    model = PerceptionEncoder(CONFIG)
    load_checkpoint(model, f"{tmp_path / 'w.pth'}#{averaged}")
    assert_close(model.state_dict(), state, rtol=0, atol=0)
    model = from_pretrained(f"{tmp_path / 'w.pth'}#{averaged}", variant=CONFIG)
    assert_close(model.state_dict(), state, rtol=0, atol=0)


def test_student_and_teacher_have_to_be_told_apart(tmp_path, state):
    torch.save({"student": raw(state), "teacher": state, "epoch": 3}, tmp_path / "w.pth")
    with pytest.raises(CheckpointError, match=r"w\.pth#teacher.*w\.pth#student"):
        read_checkpoint(tmp_path / "w.pth")
    assert_close(read_checkpoint(f"{tmp_path / 'w.pth'}#teacher").state, state, rtol=0, atol=0)
    with pytest.raises(CheckpointError, match=r"has no entry 'tutor'.*student, teacher"):
        read_checkpoint(f"{tmp_path / 'w.pth'}#tutor")


def test_a_container_of_an_unknown_name_is_said(tmp_path, state):
    torch.save({"my_weights": state, "epoch": 3}, tmp_path / "w.pth")
    with pytest.raises(CheckpointError, match=r"w\.pth#my_weights"):
        read_checkpoint(tmp_path / "w.pth")
    assert_close(read_checkpoint(f"{tmp_path / 'w.pth'}#my_weights").state, state, rtol=0, atol=0)


def test_mmengines_average_is_in_its_state_dict_already(tmp_path, state, caplog):
    """Its EMAHook swaps the two when it saves."""
    torch.save({"state_dict": state, "ema_state_dict": raw(state), "meta": {"iter": 3}}, tmp_path / "w.pth")
    with caplog.at_level(logging.INFO):
        assert_close(read_checkpoint(tmp_path / "w.pth").state, state, rtol=0, atol=0)
    assert "ema" not in caplog.text


# --- prefixes

PREFIXES = [
    "", "module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.", "model.", "backbone.", "visual.", "net.",
    "visual.trunk.", "timm_model.", "module.visual.", "model.backbone.", "encoder.", "_fsdp_wrapped_module.",
    "model._orig_mod.backbone.", "image_encoder.trunk.", "teacher.backbone.", "my_own_name.of_it.",
]  # fmt: skip


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("middle", ["", "_orig_mod.", "_checkpoint_wrapped_module."])
def test_every_reader_takes_every_prefix(tmp_path, state, prefix, middle):
    names = {prefix + name.replace("blocks.0.", f"blocks.0.{middle}"): x for name, x in state.items()}
    beside = {"head.weight": torch.ones(2)} if prefix.strip("._") not in ("", "orig_mod", "fsdp_wrapped_module") else {}
    torch.save({"state_dict": names | beside}, tmp_path / "w.pth")
    model = PerceptionEncoder(CONFIG)
    load_checkpoint(model, tmp_path / "w.pth")
    assert_close(model.state_dict(), state, rtol=0, atol=0)
    assert_close(convert(read_checkpoint(tmp_path / "w.pth"), "pe_spatial").state, state, rtol=0, atol=0)


# --- files and folders


@pytest.mark.parametrize(
    "name", ["pytorch_model.bin", "last.ckpt", "w.pkl", "w.PTH", "w.pt.tar", "weights", "W.SAFETENSORS"]
)
def test_an_existing_file_is_a_file_whatever_its_name(tmp_path, state, name, monkeypatch):
    path = tmp_path / name
    save_file(state, path) if path.suffix == ".SAFETENSORS" else torch.save(state, path)
    assert_close(from_pretrained(path, variant=CONFIG).state_dict(), state, rtol=0, atol=0)
    monkeypatch.chdir(tmp_path)
    assert_close(from_pretrained(name, variant=CONFIG).state_dict(), state, rtol=0, atol=0)


def test_content_tells_the_format(tmp_path, state):
    save_file(state, tmp_path / "w.pth")
    torch.save(state, tmp_path / "w.safetensors")
    for name in ("w.pth", "w.safetensors"):
        assert_close(from_pretrained(tmp_path / name, variant=CONFIG).state_dict(), state, rtol=0, atol=0)


def test_a_name_that_is_no_file_names_the_folder(tmp_path):
    for name in ("gone.bin", "gone.ckpt", "folder/gone.pkl", "gone.PTH"):
        with pytest.raises(CheckpointError, match="no checkpoint at"):
            from_pretrained(tmp_path / name, variant=CONFIG)


def other_files(folder):
    (folder / "lfs.pth").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n")
    torch.jit.script(nn.Linear(1, 1)).save(folder / "script.pt")
    with zipfile.ZipFile(folder / "zip.pth", "w") as archive:
        archive.writestr("a.txt", "a")
    np.savez(folder / "arrays.npz", a=np.ones(2))
    np.save(folder / "array.npy", np.ones(2))
    (folder / "model.h5").write_bytes(b"\x89HDF\r\n\x1a\n" + b"\0" * 64)
    (folder / "text.pth").write_text("{'a': 1}")
    (folder / "w.safetensors").write_bytes((2**62).to_bytes(8, "little") + b"{}")
    (folder / "bad.safetensors.index.json").write_text("{}")


@pytest.mark.parametrize(
    ("name", "words"),
    [("lfs.pth", "git lfs pull"), ("script.pt", "TorchScript"), ("zip.pth", "not"), ("arrays.npz", "not"),
     ("array.npy", "not"), ("model.h5", "not"), ("text.pth", "not"), ("w.safetensors", "not"),
     ("bad.safetensors.index.json", "weight_map")],
)  # fmt: skip
def test_other_files_get_one_sentence(tmp_path, name, words):
    other_files(tmp_path)
    with pytest.raises(CheckpointError, match=words) as error:
        read_checkpoint(tmp_path / name)
    assert name in str(error.value)
    assert "\n" not in str(error.value)
    assert "weights_only" not in str(error.value)
    assert len(str(error.value)) < 400


def shard(state, folder, *, suffix=".safetensors", stem="model", missing=False):
    names = sorted(state)
    parts = {f"{stem}-0000{i + 1}-of-00002{suffix}": names[i::2] for i in range(2)}
    for i, (part, inside) in enumerate(parts.items()):
        if not missing or not i:
            content = {name: state[name] for name in inside}
            save_file(content, folder / part) if suffix == ".safetensors" else torch.save(content, folder / part)
    index = {
        "metadata": {"total_size": 1},
        "weight_map": {name: part for part, inside in parts.items() for name in inside},
    }
    (folder / f"{stem}{suffix}.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize(("suffix", "stem"), [(".safetensors", "model"), (".bin", "pytorch_model")])
def test_a_folder_of_shards_is_read_by_its_index(tmp_path, state, suffix, stem):
    shard(state, tmp_path, suffix=suffix, stem=stem)
    (tmp_path / "config.json").write_text("{}")
    for source in (tmp_path, tmp_path / f"{stem}{suffix}.index.json"):
        assert_close(from_pretrained(source, variant=CONFIG).state_dict(), state, rtol=0, atol=0)
    model = PerceptionEncoder(CONFIG)
    load_checkpoint(model, tmp_path)
    assert_close(model.state_dict(), state, rtol=0, atol=0)


def test_a_missing_shard_is_named(tmp_path, state):
    shard(state, tmp_path, missing=True)
    with pytest.raises(CheckpointError, match=r"model-00002-of-00002\.safetensors.*download"):
        from_pretrained(tmp_path, variant=CONFIG)


def test_a_shard_outside_of_the_folder_is_not_read(tmp_path, state):
    (tmp_path / "in").mkdir()
    save_file(state, tmp_path / "out.safetensors")
    index = {"weight_map": dict.fromkeys(state, "../out.safetensors")}
    (tmp_path / "in" / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="outside"):
        from_pretrained(tmp_path / "in", variant=CONFIG)


@pytest.mark.parametrize(
    ("weights", "others"),
    [("model.safetensors", ["optimizer.pt", "training_args.bin", "scheduler.pt", "rng_state.pth"]),
     ("model.safetensors", ["pytorch_model.bin"]), ("pytorch_model.bin", ["training_args.bin", "optimizer.bin"]),
     ("best.pth", ["optimizer.pth", "._best.pth"]), ("model.pt", ["random_states_0.pkl", "scaler.pt"]),
     ("last.ckpt", ["config.yaml"])],
)  # fmt: skip
def test_weights_are_found_beside_the_state_of_a_trainer(tmp_path, state, weights, others):
    path = tmp_path / weights
    save_file(state, path) if path.suffix == ".safetensors" else torch.save(state, path)
    for name in others:
        torch.save(raw(state) if name.startswith("pytorch_model") else {"state": {}}, tmp_path / name)
    assert_close(from_pretrained(tmp_path, variant=CONFIG).state_dict(), state, rtol=0, atol=0)


def test_two_files_of_weights_are_named(tmp_path, state):
    for name in ("a.pth", "b.pth"):
        torch.save(state, tmp_path / name)
    with pytest.raises(CheckpointError, match=r"should hold one file of weights .* but holds a\.pth, b\.pth"):
        from_pretrained(tmp_path, variant=CONFIG)
    with pytest.raises(CheckpointError, match=r"but holds a\.pth, b\.pth"):
        load_checkpoint(PerceptionEncoder(CONFIG), tmp_path)


def test_two_addresses_have_two_places_in_the_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", lambda url, path, **_: pathlib.Path(path).write_text(url))
    urls = [f"https://{place}" for place in ("a.org/x/w.pth", "a.org/y/w.pth", "b.org/x/w.pth", "a.org/x/w.pth?rev=2")]
    assert [locate(url).read_text() for url in (*urls, *urls)] == urls * 2
    assert all(locate(url).suffix == ".pth" for url in urls)


# --- saving over the file that was read


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("dtype", [torch.float32, None])
def test_saving_to_the_file_that_was_loaded_from_is_safe(tmp_path, state, suffix, dtype):
    path = tmp_path / f"w{suffix}"
    save_file(state, path) if suffix == ".safetensors" else torch.save(state, path)
    model = from_pretrained(path, variant=CONFIG, dtype=dtype)
    os.truncate(path, 0)  # what torch.save does first; reading a mapped tensor from here on would end the process
    if suffix == ".safetensors":
        save_file(model.state_dict(), path)
    else:
        torch.save(model.state_dict(), path)
    assert_close(from_pretrained(path, variant=CONFIG).state_dict(), state, rtol=0, atol=0)
