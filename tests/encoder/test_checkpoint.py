"""Checkpoints: every released layout maps one to one, and a bad file gets one sentence and never runs."""

import argparse
import functools
import http.server
import os
import pickle
import re
import shutil
import socket
import subprocess
import sys
import threading
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers.golden import checkpoint_file, read_arrays, read_json
from safetensors.torch import save_file
from torch.testing import assert_close

from pe_spatial import VARIANTS, EncoderConfig, PerceptionEncoder, from_pretrained, load_checkpoint
from pe_spatial.encoder.checkpoint import OMITTED, load_state
from pe_spatial.encoder.files import CheckpointError, locate, read_checkpoint, read_state_dict
from pe_spatial.encoder.resize import resize_patch_kernel
from pe_spatial.encoder.variants import RELEASED_NAMES

CONFIG = EncoderConfig(img_size=64, patch_size=16, embed_dim=48, depth=4, num_heads=3)
TIMM_SIZES = dict(zip(("t16", "s16", "b16"), ("tiny_patch16", "small_patch16", "base_patch16"), strict=True))
TIMM_SIZES |= {"l14": "large_patch14", "g14": "gigantic_patch14"}


def timm_name(variant: str) -> str:
    _, family, size, side = variant.removesuffix("_tiling").split("_")
    return f"vit_pe_{family}_{TIMM_SIZES[size]}_{side}"


# (file, name in it, our variant); timm has one name for a model and its tiling
LAYOUTS = [("release", RELEASED_NAMES[v], v) for v in VARIANTS] + [("timm", timm_name(v), v) for v in VARIANTS]


@pytest.fixture
def checkpoint(golden):
    return checkpoint_file(golden / "encoder" / "encoder_cls_p16.pt")


@pytest.fixture
def state(checkpoint) -> dict[str, torch.Tensor]:
    return read_state_dict(checkpoint)


# --- released layouts


@pytest.mark.parametrize(("layout", "name", "variant"), LAYOUTS)
def test_every_released_layout_loads_strictly(golden, layout, name, variant):
    shapes = read_json(golden / f"encoder/{layout}_state_dicts.json")[name]
    with torch.device("meta"):
        model = PerceptionEncoder(variant)
        report = load_state(model, {key: torch.empty(shape) for key, shape in shapes.items()})
    assert report.layout == layout
    assert len(shapes) == len(model.state_dict()) + len(report.omitted)
    # Only the contrastive models bring more than an encoder, and only these parts.
    parts = {re.split(r"[._]", key)[0] for key in report.omitted}
    pooled = {"release": {"proj", "ln", "attn"}, "timm": {"norm", "attn", "head"}}[layout]
    assert parts == (pooled if "_core_" in variant else set())
    assert set(report.omitted.values()) <= set(OMITTED.values())


def test_reference_files_hold_26_layouts(golden):
    assert {(layout, name) for layout, name, _ in LAYOUTS} == {
        (layout, name)
        for layout in ("release", "timm")
        for name in read_json(golden / f"encoder/{layout}_state_dicts.json")
    }


# --- what loads


def save(state, folder, suffix):
    path = folder / f"weights{suffix}"
    save_file(state, path) if suffix == ".safetensors" else torch.save(state, path)
    return path


WRAPPINGS = ("plain", "ours", "ddp", "clip", "model", "nested")


@pytest.mark.parametrize(
    ("suffix", "wrap"),
    # safetensors holds tensors alone
    [(".pt", w) for w in WRAPPINGS] + [(".safetensors", w) for w in WRAPPINGS[:4]] + [(".pth", "model")],
)
def test_same_weights_from_every_wrapping(tmp_path, checkpoint, state, suffix, wrap):
    model, expected = PerceptionEncoder(CONFIG), PerceptionEncoder(CONFIG)
    load_checkpoint(expected, checkpoint)
    wrapped = {
        "plain": state,
        "ours": expected.state_dict(),
        "ddp": {f"module.{k}": v for k, v in state.items()},
        "clip": {**{f"visual.{k}": v for k, v in state.items()}, "logit_scale": torch.ones(())},
        "model": {"model": state, "epoch": 3},
        "nested": {"state_dict": {"model": state}},
    }[wrap]
    report = load_checkpoint(model, save(wrapped, tmp_path, suffix))
    assert report.layout == ("timm" if wrap == "ours" else "release")
    assert report.omitted == ({"logit_scale": "text tower"} if wrap == "clip" else {})
    assert_close(dict(model.state_dict()), dict(expected.state_dict()), rtol=0, atol=0)


def test_blocks_not_built_are_omitted_by_name(checkpoint):
    report = load_checkpoint(PerceptionEncoder(CONFIG, out_indices=(1,)), checkpoint)
    assert len(report.omitted) == 2 * 12
    assert {re.match(r"blocks\.\d", name)[0] for name in report.omitted} == {"blocks.2", "blocks.3"}


def test_patch_kernel_is_resized_and_reported(golden):
    kw = {"img_size": 56, "patch_size": 14, "embed_dim": 48, "depth": 4, "num_heads": 2, "mlp_ratio": 280 / 48}
    config = EncoderConfig(**kw, class_token=False, init_values=0.1)
    path = checkpoint_file(golden / "encoder" / "encoder_nocls_layerscale_p14.pt")
    model = PerceptionEncoder(config, patch_size=16)
    assert load_checkpoint(model, path).resized == {"patch_embed.proj.weight": "(48, 3, 14, 14) -> (48, 3, 16, 16)"}
    assert_close(model.patch_embed.proj.weight.data, resize_patch_kernel(read_state_dict(path)["conv1.weight"], 16))
    again = PerceptionEncoder(config, patch_size=16)
    assert load_state(again, model.state_dict()).resized == {}


def test_half_precision_file_keeps_the_type_of_the_model(state):
    model = PerceptionEncoder(CONFIG)
    load_state(model, {name: value.half() for name, value in state.items()})
    assert model.patch_embed.proj.weight.dtype == torch.float32
    assert_close(model.patch_embed.proj.weight.data, state["conv1.weight"].half().float(), rtol=0, atol=0)


# --- what does not


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s: s.pop("ln_pre.bias"), "missing in the file: norm_pre.bias"),
        (lambda s: s.update(surprise=torch.ones(1)), "unknown to the model: surprise"),
        (lambda s: s.update({"conv1.weight": torch.ones(48, 3, 8, 8)}), r"other shapes: .*\(48, 3, 8, 8\) in the file"),
        (lambda s: s.update({"transformer.resblocks.4.ln_1.bias": torch.ones(48)}), "unknown to the model: blocks.4"),
    ],
)
def test_load_is_strict_and_changes_nothing_on_error(state, change, words):
    model = PerceptionEncoder(CONFIG)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    change(state)
    with pytest.raises(CheckpointError, match=words):
        load_state(model, state)
    assert_close(dict(model.state_dict()), before, rtol=0, atol=0)


@pytest.mark.parametrize(
    "config", [replace(CONFIG, class_token=False), replace(CONFIG, depth=5), replace(CONFIG, embed_dim=96)]
)
def test_file_of_another_variant_is_named(checkpoint, config):
    with pytest.raises(CheckpointError, match="Build the variant that the file belongs to") as error:
        load_checkpoint(PerceptionEncoder(config), checkpoint)
    assert str(checkpoint) in str(error.value)


class Payload:
    """Unpickles by making a folder."""

    def __init__(self, folder):
        self.folder = str(folder)

    def __reduce__(self):
        return os.mkdir, (self.folder,)


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("kind", ["zip", "legacy", "pickle"])
def test_code_in_a_checkpoint_never_runs(tmp_path, state, kind, nested):
    path, mark = tmp_path / "weights.pt", tmp_path / "it-ran"
    content = {"model": {**state, "x": Payload(mark)}} if nested else Payload(mark)
    if kind == "pickle":
        path.write_bytes(pickle.dumps(content, protocol=2))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=kind == "zip")
    with pytest.raises(CheckpointError) as error:
        load_checkpoint(PerceptionEncoder(CONFIG), path)
    assert not mark.exists()
    message = str(error.value)
    assert str(path) in message
    assert "weights_only" not in message  # torch's message advises to run the code
    if kind != "pickle":
        assert "mkdir" in message
        assert "Save its state dict alone" in message
    (tmp_path / "control.pkl").write_bytes(pickle.dumps(Payload(mark)))
    pickle.loads((tmp_path / "control.pkl").read_bytes())
    assert mark.exists()  # the payload is live: it was the loader that did not run it


def broken_files(folder, good):
    state, whole = torch.load(good, weights_only=True), good.read_bytes()
    files = {
        "half.pt": whole[: len(whole) // 2],
        "empty.pt": b"",
        "page.pt": b"<!doctype html><html>404 not found</html>",
        "page.safetensors": b"<!doctype html><html>404 not found</html>",
        "empty.safetensors": b"",
    }
    for name, content in files.items():
        (folder / name).write_bytes(content)
    torch.save(state, folder / "legacy.pt", _use_new_zipfile_serialization=False)
    save_file(state, folder / "full.safetensors")
    for name, source, keep in (("half_legacy.pt", "legacy.pt", 0.5), ("half.safetensors", "full.safetensors", 0.5),
                               ("almost.safetensors", "full.safetensors", 0.999)):  # fmt: skip
        whole = (folder / source).read_bytes()
        (folder / name).write_bytes(whole[: int(len(whole) * keep)])
    for name, content in (("list.pt", [1]), ("tensor.pt", torch.ones(2)), ("none.pt", {"epoch": 3})):
        torch.save(content, folder / name)
    save_file({}, folder / "none.safetensors")
    (folder / "folder.pt").mkdir()


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        *((f"{n}.pt", "download it again") for n in ("half", "empty", "page", "half_legacy")),
        *((f"{n}.safetensors", "download it again") for n in ("half", "almost", "empty", "page")),
        *((f"{n}.pt", "give [a-z' ]*weights") for n in ("list", "tensor", "none")),
        ("none.safetensors", "give a file with the weights"),
        ("absent.pt", "download it, or give the path"),
        ("absent.safetensors", "download it, or give the path"),
        ("folder.pt", "should hold one file of weights"),
    ],
)
def test_broken_file_gets_one_sentence_with_its_name_and_the_remedy(tmp_path, checkpoint, name, remedy):
    broken_files(tmp_path, checkpoint)
    with pytest.raises(CheckpointError, match=remedy) as error:
        load_checkpoint(PerceptionEncoder(CONFIG), tmp_path / name)
    message = str(error.value)
    assert str(tmp_path / name) in message
    assert "\n" not in message
    assert len(message) < 300


def test_released_weights_without_network_or_cache(tmp_path):
    script = """
from pe_spatial import PerceptionEncoder, VARIANTS, load_checkpoint
from pe_spatial.encoder.files import CheckpointError
for model, source in ((PerceptionEncoder("pe_spatial_t16_512", out_indices=(0,)), "released"),
                      (PerceptionEncoder(VARIANTS["pe_spatial_t16_512"], out_indices=(0,)), "released"),
                      (PerceptionEncoder("pe_spatial_t16_512", out_indices=(0,)), "hf://someone/weights"),
                      (PerceptionEncoder("pe_spatial_t16_512", out_indices=(0,)), "hf://nobody")):
    try:
        load_checkpoint(model, source)
    except CheckpointError as error:
        print(error)
"""
    environ = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", script], env=environ, capture_output=True, text=True, check=True)
    released, custom, other, nonsense = done.stdout.splitlines()
    assert "PE-Spatial-T16-512.pt of facebook/PE-Spatial-T16-512 is not in the local cache" in released
    assert "https://huggingface.co/facebook/PE-Spatial-T16-512/resolve/main/PE-Spatial-T16-512.pt" in released
    assert "give the path of the file" in released
    assert "no weights were released" in custom
    assert "model.safetensors of someone/weights" in other
    assert "write hf://owner/repo" in nonsense


@pytest.mark.parametrize("cached", [True, False])
def test_hub_is_asked_for_the_right_file_and_its_cache_first(checkpoint, monkeypatch, cached):
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    asked = []

    def download(*args, local_files_only=False):
        asked.append((*args, local_files_only))
        if local_files_only and not cached:
            raise LocalEntryNotFoundError("not there")
        return str(checkpoint)

    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", lambda _: None)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    ours = "someone/weights"
    for address in (ours, f"{ours}/sub/best.pt", f"{ours}:sub/best.pt", "facebook/PE-Core-B16-224"):
        load_checkpoint(PerceptionEncoder(CONFIG), f"hf://{address}")
    assert asked == [
        (repo, file, local)
        for repo, file in (
            ("someone/weights", "model.safetensors"),
            ("someone/weights", "sub/best.pt"),
            ("someone/weights", "sub/best.pt"),
            ("facebook/PE-Core-B16-224", "PE-Core-B16-224.pt"),
        )
        for local in ([True] if cached else [True, False])
    ]


def test_without_a_network_the_hub_is_asked_once(monkeypatch, tmp_path):
    asked = []

    def fail(host, *_, **__):
        asked.append(host)
        raise socket.gaierror(-3, "no network")

    monkeypatch.setattr(socket, "getaddrinfo", fail)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(CheckpointError, match="no network"):
        locate("hf://facebook/PE-Spatial-B16-512")
    assert len(asked) <= 2  # addresses of two kinds


def test_url_goes_through_the_cache_of_torch_hub(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    (tmp_path / "w.pt").write_bytes(checkpoint.read_bytes())
    server = http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(http.server.SimpleHTTPRequestHandler, directory=tmp_path)
    )
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}/w.pt?download=true"
    assert re.fullmatch(r"w-\w{12}\.pt", locate(url).name)  # a key of the whole address
    assert locate(url).parent == tmp_path / "hub" / "checkpoints"
    server.shutdown()
    server.server_close()
    load_checkpoint(PerceptionEncoder(CONFIG), url)  # from the cache
    with pytest.raises(CheckpointError, match=r"cannot be downloaded .* put it at .*/other-.*\.pt or give"):
        locate(url.replace("w.pt", "other.pt"))


def test_package_file(checkpoint, monkeypatch, tmp_path):
    (tmp_path / "shipping_weights").mkdir()
    (tmp_path / "shipping_weights" / "__init__.py").touch()
    shutil.copy(checkpoint, tmp_path / "shipping_weights" / "it.pt")
    monkeypatch.syspath_prepend(tmp_path)
    report = load_checkpoint(PerceptionEncoder(CONFIG), "package://shipping_weights/it.pt")
    assert report.path == tmp_path / "shipping_weights" / "it.pt"
    with pytest.raises(CheckpointError, match="package://module/file"):
        load_checkpoint(PerceptionEncoder(CONFIG), "package://no_such_package/it.pt")


# --- from_pretrained


def release(state_of, folder, name):
    """Write `state_of`, an encoder of a released variant, as the released file `name` in `folder`."""
    torch.save(state_of.state_dict(), folder / name)
    return folder / name


@pytest.fixture(scope="module")
def t16():
    torch.manual_seed(0)
    return PerceptionEncoder("pe_spatial_t16_512").eval()


def test_from_pretrained_takes_a_folder_or_a_file_and_finds_the_variant(tmp_path, t16):
    path = release(t16, tmp_path, "anything.pt")
    image = torch.randn(1, 3, 64, 96, generator=torch.Generator().manual_seed(0))
    for source in (tmp_path, path, str(path)):
        model = from_pretrained(source, out_indices=(3, -1))
        assert not model.training
        assert model.variant == "pe_spatial_t16_512"
        with torch.no_grad():
            assert_close(model(image)[1], t16(image)[0], rtol=0, atol=0)
    assert from_pretrained(path, geometry="vitdet", window_size=16).geometry.window_size == 16
    assert from_pretrained(path, geometry="vitdet").geometry.pos_embed_mode == "tile"


def test_from_pretrained_by_name_works_offline_from_the_cache(tmp_path, t16):
    """The layout of the hub's cache, made by hand, so that the real client finds it without a network."""
    repo = tmp_path / "hub" / "models--facebook--PE-Spatial-T16-512"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text("0" * 40)
    (repo / "snapshots" / ("0" * 40)).mkdir(parents=True)
    release(t16, repo / "snapshots" / ("0" * 40), "PE-Spatial-T16-512.pt")
    script = (
        "from pe_spatial import from_pretrained\n"
        "for name in ('PE-Spatial-T16-512', 'pe_spatial_t16_512'):\n"
        "    print(from_pretrained(name, out_indices=(0,)).variant)"
    )
    environ = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", script], env=environ, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["pe_spatial_t16_512"] * 2


def test_from_pretrained_takes_the_encoder_out_of_a_detector(tmp_path, t16):
    kernel = torch.ones(192, 3, 16, 16)
    detector = {f"backbone.encoder.{k}": v for k, v in t16.state_dict().items()} | {"neck.conv1.weight": kernel}
    torch.save({"state_dict": detector, "meta": {"iter": 3}}, tmp_path / "detector.pth")
    model = from_pretrained(tmp_path / "detector.pth")
    assert_close(dict(model.state_dict()), dict(t16.state_dict()), rtol=0, atol=0)
    with pytest.raises(CheckpointError, match=r"has several encoders, at student.*teacher"):
        load_state(t16, {f"{who}.{k}": v for who in ("student", "teacher") for k, v in t16.state_dict().items()})


def test_from_pretrained_keeps_the_patches_of_a_file_that_was_resized(tmp_path):
    config = EncoderConfig(img_size=56, patch_size=14, embed_dim=48, depth=1, num_heads=2)
    torch.save(PerceptionEncoder(config, patch_size=16).state_dict(), tmp_path / "w.pt")
    assert from_pretrained(tmp_path / "w.pt", variant=config).patch_size == 16


@pytest.mark.parametrize("class_token", [False, True])
def test_released_positions_are_resized_to_pos_grid_as_the_reference_converter_does(golden, class_token):
    arrays = {name: torch.from_numpy(value) for name, value in read_arrays(golden / "maskrcnn/convert.npz").items()}
    config = EncoderConfig(img_size=112, patch_size=14, embed_dim=8, depth=1, num_heads=2, class_token=class_token)
    model = PerceptionEncoder(config, patch_size=16, pos_grid=6)
    state = PerceptionEncoder(config).state_dict()
    table = arrays["in/module.visual.positional_embedding"]  # width 6, which is no encoder's
    table, expected = (F.pad(t.flatten(0, -2), (0, 2)) for t in (table, arrays["output_pixel_96/positional_embedding"]))
    token = torch.ones(int(class_token), 8)
    state["pos_embed"] = torch.cat((token, table))[None]
    report = load_state(model, state)
    n = int(class_token)
    assert report.resized["pos_embed"] == f"(1, {n + 64}, 8) -> (1, {n + 36}, 8)"
    assert_close(model.pos_embed[0], torch.cat((token, expected)), rtol=0, atol=1e-6)
    again = PerceptionEncoder(config, patch_size=16, pos_grid=6)
    assert load_state(again, model.state_dict()).resized == {}
    assert_close(again.pos_embed, model.pos_embed, rtol=0, atol=0)
    with pytest.raises(
        CheckpointError, match=rf"pos_embed \(1, {n + 36}, 8\) in the file, \(1, {n + 25}, 8\) in the model"
    ):
        load_state(PerceptionEncoder(config, patch_size=16, pos_grid=5), model.state_dict())


def test_from_pretrained_finds_a_variant_whose_positions_were_resized(tmp_path):
    """Where the grid alone tells two variants apart, it has to be said."""
    with torch.device("meta"):
        for variant, known in (("pe_spatial_s16_512", False), ("pe_lang_l14_448", True), ("pe_core_g14_448", True)):
            path = release(PerceptionEncoder(variant, patch_size=16, pos_grid=12), tmp_path, f"{variant}.pt")
            if not known:
                with pytest.raises(CheckpointError, match="holds no released variant; give variant="):
                    from_pretrained(path)
            found = from_pretrained(path, **({} if known else {"variant": variant, "pos_grid": 12}))
            assert (found.variant, found.patch_size, found.geometry.pos_grid) == (variant, 16, 12)


def test_from_pretrained_errors_say_what_to_do(tmp_path, checkpoint):
    with pytest.raises(CheckpointError, match=r"unknown variant .PE-Spatial-X.; allowed are .*; or give a folder, or"):
        from_pretrained("PE-Spatial-X")
    with pytest.raises(CheckpointError, match="holds no released variant; give variant=dict"):
        from_pretrained(checkpoint)
    assert from_pretrained(checkpoint, variant=CONFIG).config == CONFIG
    with pytest.raises(CheckpointError, match=f"{tmp_path} should hold one file of weights .* but holds none"):
        from_pretrained(tmp_path)
    for name in ("a.pt", "PE-Spatial-B16-512.pt"):
        shutil.copy(checkpoint, tmp_path / name)
    with pytest.raises(CheckpointError, match=r"but holds PE-Spatial-B16-512.pt, a.pt"):
        from_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"B16-512.pt does not hold the weights of this encoder"):
        from_pretrained(tmp_path, variant="PE-Spatial-B16-512")
    with pytest.raises(TypeError, match="out_index"):
        from_pretrained(checkpoint, variant=CONFIG, out_index=3)


def test_training_state_of_known_trainers_does_not_hinder_and_stays_inert(tmp_path, state):
    """Detectron2's, DETA's and mmengine's files hold such objects beside the weights."""
    beside = {"args": argparse.Namespace(lr=1), "mean": np.float64(2), "history": np.arange(3.0), "iteration": 3}
    torch.save({"model": state, **beside}, tmp_path / "w.pth")
    file = read_checkpoint(tmp_path / "w.pth")
    assert file.rest.keys() == beside.keys()
    assert file.rest["iteration"] == 3
    assert not isinstance(file.rest["args"], argparse.Namespace)
    assert file.state.keys() == state.keys()


def test_file_with_an_optimizer_alone_is_named(tmp_path):
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.ones(2))])
    for content in ({"optimizer": optimizer.state_dict()}, optimizer.state_dict()):
        torch.save(content, tmp_path / "w.pth")
        with pytest.raises(CheckpointError, match=f"holds no weights, only .*{min(content)}"):
            read_checkpoint(tmp_path / "w.pth")


def test_the_demonstration_loads_from_the_package_without_a_network(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    encoder = from_pretrained("pe_synthetic_xs8_192", geometry="timm", out_indices=(1,))
    assert (encoder.variant, encoder.depth, encoder.config.img_size) == ("pe_synthetic_xs8_192", 2, 192)
    assert encoder(torch.zeros(1, 3, 192, 192))[0].dtype == torch.float32  # though the file holds halves
    assert from_pretrained("pe_synthetic_xs8_192", dtype=None).pos_embed.dtype == torch.float16
    again = PerceptionEncoder("pe_synthetic_xs8_192")
    load_checkpoint(again, "released")
    assert_close(again.blocks[1].mlp.fc1.weight, encoder.blocks[1].mlp.fc1.weight, rtol=0, atol=0)
    file = locate("package://pe_spatial.synthetic/pe_synthetic_xs8_192.safetensors")
    assert from_pretrained(file).variant == "pe_synthetic_xs8_192"
    assert "pe_synthetic_xs8_192" not in VARIANTS  # which are Meta's
