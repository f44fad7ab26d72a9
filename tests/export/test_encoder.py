"""An exported encoder equals the encoder, at every size and batch, from one file."""

import json
import shutil

import numpy as np
import pytest
import torch
from helpers.encoders import TINY, TINY_NO_CLASS
from helpers.golden import read_arrays, read_json, read_weights

from pe_spatial import PerceptionEncoder
from pe_spatial.encoder.checkpoint import load_state
from pe_spatial.errors import ConfigError, DatasetError
from pe_spatial.runtime.encoder import ExportedEncoder, check_input
from pe_spatial.runtime.manifest import Manifest, read_manifest

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
from pe_spatial.export.encoder import encoder_graph
from pe_spatial.export.graph import Exportable, export

WINDOWS = dict(global_attn_indexes=(1,))
CASES = {
    "release": (TINY, dict(geometry="release")),
    "timm": (TINY_NO_CLASS, dict(geometry="timm")),
    "bicubic": (TINY_NO_CLASS, dict(pos_embed_mode="bicubic")),
    "vitdet": (TINY, dict(geometry="vitdet", **WINDOWS)),
    "vitdet, masked": (TINY_NO_CLASS, dict(geometry="vitdet", **WINDOWS, window_size=3, mask_window_padding=True)),
    "deta": (TINY_NO_CLASS, dict(geometry="deta", **WINDOWS, window_size=3, pos_grid=3)),
}
SIZES = ((1, 64, 64), (3, 96, 160), (2, 32, 48), (1, 16, 16))


def tiny(name):
    torch.manual_seed(0)
    config, options = CASES[name]
    return PerceptionEncoder(config, out_indices=(1, 0), **options).eval()


def pixels(*shape):
    return np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)


def check_equal(exported, graph, shapes, atol=1e-4):
    for shape in shapes:
        image = pixels(*shape)
        with torch.no_grad():
            expected = graph.module(torch.from_numpy(image))
        for ours, theirs in zip(exported(image), expected, strict=True):
            np.testing.assert_allclose(ours, theirs.numpy(), rtol=0, atol=atol)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("exported") / "vitdet"
    export(encoder_graph(tiny("vitdet")), out)
    return out


def test_one_file_of_onnx_equals_the_encoder_at_every_size(folder):
    check_equal(ExportedEncoder(folder), encoder_graph(tiny("vitdet")), SIZES)
    check_equal(ExportedEncoder(folder, backend="openvino"), encoder_graph(tiny("vitdet")), SIZES)


@pytest.mark.slow
@pytest.mark.parametrize("form", ["onnx", "openvino"])
@pytest.mark.parametrize("name", CASES)
def test_every_geometry_in_every_format(tmp_path, name, form):
    graph = encoder_graph(tiny(name))
    export(graph, tmp_path / "out", form=form)
    check_equal(ExportedEncoder(tmp_path / "out"), graph, SIZES)


def test_pixels_are_normalized_as_the_config_says():
    graph, images = encoder_graph(tiny("release")), torch.from_numpy(pixels(1, 32, 48))
    encoder = graph.module.encoder
    with torch.no_grad():
        expected = encoder((images.permute(0, 3, 1, 2) - 127.5) / 127.5)
        torch.testing.assert_close(graph.module(images), tuple(expected))


@pytest.mark.long
@pytest.mark.parametrize("name", ["release", "vitdet"])
def test_torch_takes_two_windows_and_more(tmp_path, name):
    graph = encoder_graph(tiny(name), whole_windows=True)
    export(graph, tmp_path / "out", form="torch")
    for backend in (None, "torch"):  # the compiled package, where there is a C++ compiler, and the program
        exported = ExportedEncoder(tmp_path / "out", backend=backend)
        check_equal(exported, graph, ((1, 128, 128), (3, 192, 256)), atol=1e-5)
    assert (tmp_path / "out/model.aoti.pt2").exists() == bool(shutil.which("g++") or shutil.which("clang++"))
    with pytest.raises(DatasetError, match=r"too small|not a multiple"):
        exported(pixels(1, 16, 16))


@pytest.mark.slow
@pytest.mark.parametrize("case", ["encoder_cls_p16", "encoder_nocls_layerscale_p14"])
def test_golden_values(golden, tmp_path, case):
    facts, arrays = read_json(golden / f"encoder/{case}.json"), read_arrays(golden / f"encoder/{case}.npz")
    sizes = sorted({name.removeprefix("input_") for name in arrays if name.startswith("input_")})
    layers = sorted({int(name.rpartition("layer")[2]) for name in arrays if name.startswith("tokens_")})
    kw = facts["kw"]
    config = dict(
        img_size=kw["image_size"], patch_size=kw["patch_size"], embed_dim=kw["width"], depth=kw["layers"],
        num_heads=kw["heads"], mlp_ratio=kw["mlp_ratio"], class_token=kw["use_cls_token"],
        init_values=kw["ls_init_value"],
    )  # fmt: skip
    encoder = PerceptionEncoder(config, out_indices=layers).eval()
    load_state(encoder, read_weights(golden / f"encoder/{case}.pt"), path=case)
    export(encoder_graph(encoder, inputs="images"), tmp_path / "out")
    exported = ExportedEncoder(tmp_path / "out")
    for size in sizes:
        for layer, ours in zip(layers, exported(arrays[f"input_{size}"]), strict=True):
            theirs = arrays[f"tokens_{size}_layer{layer}"][:, int(config["class_token"]) :]
            np.testing.assert_allclose(ours.reshape(*ours.shape[:2], -1).transpose(0, 2, 1), theirs, rtol=0, atol=1e-4)


@pytest.mark.long
@pytest.mark.parametrize(("name", "layers"), [("t16_512", (5, 11)), ("s16_512", (5, 11)), ("b16_512", (5, 11)),
                                              ("l14_448", (1, 3)), ("g14_448", (0, 1))])  # fmt: skip
def test_a_released_variant_from_one_file(tmp_path, name, layers):
    torch.manual_seed(0)
    encoder = PerceptionEncoder(f"pe_spatial_{name}", out_indices=layers).eval()
    graph, patch = encoder_graph(encoder), encoder.patch_size
    sizes = [(batch, h * patch, w * patch) for batch, h, w in ((1, 32, 32), (3, 16, 24), (1, 40, 30))]
    export(graph, tmp_path / "out")
    for backend in ("onnxruntime", "openvino"):
        check_equal(ExportedEncoder(tmp_path / "out", backend=backend), graph, sizes)


def test_manifest_describes_the_folder(folder):
    manifest = read_manifest(folder)
    assert (manifest.task, manifest.format, manifest.outputs) == ("encoder", "onnx", ["layer_1", "layer_0"])
    assert manifest.inputs == {"pixels": dict(dtype="uint8", shape=["batch", "height", "width", 3])}
    assert manifest.model["geometry"]["window_size"] == 4
    assert set(manifest.files) == {"model.onnx", "model.onnx.data"}


def test_files_that_do_not_belong_together_are_refused(folder, tmp_path):
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    data = bytearray((tmp_path / "model.onnx.data").read_bytes())
    data[100] ^= 1
    (tmp_path / "model.onnx.data").write_bytes(data)
    with pytest.raises(ConfigError, match=r"do not belong together: model.onnx.data"):
        read_manifest(tmp_path)
    (tmp_path / "model.onnx.data").unlink()
    with pytest.raises(ConfigError, match="do not belong together"):
        read_manifest(tmp_path)
    (tmp_path / "manifest.json").write_text("{}")
    with pytest.raises(ConfigError, match="not a manifest"):
        read_manifest(tmp_path)
    with pytest.raises(ConfigError, match="not an exported model"):
        read_manifest(tmp_path / "absent")


def test_wrong_inputs_are_refused_in_one_sentence():
    manifest = Manifest(task="encoder", format="onnx", inputs={}, outputs=[], multiple=16)
    with pytest.raises(DatasetError, match=r"30x40 is not a multiple of 16; pad or resize to 32x48"):
        check_input(pixels(1, 30, 40), "pixels", manifest)
    with pytest.raises(DatasetError, match=r"an array \(32, 32, 3\) of uint8; this model takes \(B, H, W, 3\)"):
        check_input(pixels(32, 32), "pixels", manifest)
    with pytest.raises(DatasetError, match=r"of float64; this model takes \(B, 3, H, W\) float32"):
        check_input(np.zeros((1, 3, 32, 32)), "images", manifest)
    with pytest.raises(DatasetError, match="a list"):
        check_input([], "images", manifest)


def test_runtimes_that_do_not_fit_are_refused(folder, monkeypatch):
    with pytest.raises(ConfigError, match="onnxruntime, openvino runs, and not torch"):
        ExportedEncoder(folder, backend="torch")
    monkeypatch.setitem(__import__("sys").modules, "onnxruntime", None)
    with pytest.raises(ConfigError, match="needs onnxruntime, which is not installed: pip install onnxruntime"):
        ExportedEncoder(folder)


class Unsupported(torch.nn.Module):
    def forward(self, x):
        return (torch.special.airy_ai(x),)


class Branching(torch.nn.Module):
    def forward(self, x):
        return (x if x.sum() > 0 else -x,)


@pytest.mark.parametrize(("module", "message"), [(Unsupported(), "airy_ai"), (Branching(), "cannot be traced")])
def test_what_cannot_be_expressed_is_named(tmp_path, module, message):
    graph = Exportable(module=module, task="encoder", inputs={"x": torch.rand(2, 3)}, dynamic={}, outputs=["y"])
    with pytest.raises(ConfigError, match=message) as error:
        export(graph, tmp_path / "out")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_folder_must_be_new(tmp_path):
    (tmp_path / "file").write_text(json.dumps({}))
    with pytest.raises(ConfigError, match="not empty"):
        export(encoder_graph(tiny("release")), tmp_path)
