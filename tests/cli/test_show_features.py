"""pe-spatial show_features: sheets and videos of any encoder, bad input as one sentence."""

import cv2
import numpy as np
import pytest
import torch
from helpers.language import WORD_CORE, tiny_core
from helpers.repository import command
from PIL import Image

from pe_spatial import PerceptionEncoder
from pe_spatial.cli.main import main
from pe_spatial.cli.show_features import trained_variant
from pe_spatial.features.phrases import PhraseMaps
from pe_spatial.language.checkpoint import save_core
from pe_spatial.video import count_frames, mp4_writer

XS = ("--variant", "pe_synthetic_xs8_192", "--device", "cpu")


def photo(path, size=(50, 80)):
    """Write an image (height, width) of a bright square over noise."""
    pixels = np.random.default_rng(0).integers(0, 60, (*size, 3), dtype=np.uint8)
    pixels[10:30, 10:30] = 230
    Image.fromarray(pixels).save(path)
    return path


def test_sheet_of_all_layers(tmp_path):
    photo(tmp_path / "a.png")
    photo(tmp_path / "b.jpg", (64, 64))
    options = ("--show", "pca", "similarity", "attention", "--point", "20,20", "--size", "96", "--width", "60")
    said = command("show_features", "a.png", "b.jpg", *XS, *options, "--out", "new/f.png", cwd=tmp_path)
    assert "a.png: 80x50 is resized to 96x64 pixels, 12x8 patches" in said
    assert "b.jpg: 64x64 is resized to 96x96 pixels, 12x12 patches" in said
    with Image.open(tmp_path / "new/f.png") as sheet:
        assert sheet.width == 6 + 6 * 66  # the image and five layers
    (tmp_path / "c.jpg").write_bytes(b"broken")
    again = command("show_features", "a.png", "c.jpg", "b.jpg", *XS, *options, "--out", "g.png", cwd=tmp_path)
    assert "omitted 1 of 3 images: " in again
    assert (tmp_path / "g.png").read_bytes() == (tmp_path / "new/f.png").read_bytes()


@pytest.mark.parametrize("basis", ["layers", "none"])
def test_bases_and_random_weights(tmp_path, basis):
    photo(tmp_path / "a.png")
    options = ("--variant", "pe_spatial_t16_512", "--checkpoint", "none", "--size", "64", "--basis", basis)
    command("show_features", "a.png", *options, "--layers", "0,-1", "--columns", "2", cwd=tmp_path)
    with Image.open(tmp_path / "features.png") as sheet:
        assert sheet.width == 6 + 2 * 246


@pytest.mark.mmdet
def test_a_trained_checkpoint_tells_its_encoder(tmp_path):
    pytest.importorskip("mmengine")
    config = dict(img_size=64, patch_size=16, embed_dim=32, depth=4, num_heads=2)
    text = f"model = dict(type='X', backbone=dict(type='PerceptionEncoder', variant={config}, out_indices=(0, 2)))"
    encoder = PerceptionEncoder(config, out_indices=(0, 2))  # without the last block
    state = {f"backbone.{name}": value for name, value in encoder.state_dict().items()}
    torch.save(dict(state_dict=state, meta=dict(cfg=text)), tmp_path / "iter_1.pth")
    assert trained_variant(str(tmp_path / "iter_1.pth"))["depth"] == 3
    photo(tmp_path / "a.png")
    out = str(tmp_path / "f.png")
    main(["show_features", str(tmp_path / "a.png"), "--checkpoint", str(tmp_path / "iter_1.pth"), "--out", out])
    with Image.open(out) as sheet:
        assert sheet.width == 6 + 4 * 246  # the image and three layers
    torch.save(state, tmp_path / "plain.pth")
    assert trained_variant(str(tmp_path / "plain.pth")) is None


def test_timm_encoder(tmp_path):
    pytest.importorskip("timm")
    photo(tmp_path / "a.png")
    options = ("--variant", "timm:vit_tiny_patch16_224", "--checkpoint", "none", "--size", "64", "--layers", "3,11")
    shown = ("--show", "pca", "similarity", "--point", "3,4")
    command("show_features", "a.png", *options, *shown, cwd=tmp_path)
    assert (tmp_path / "features.png").exists()


def test_video_in_video_out(tmp_path):
    with mp4_writer(tmp_path / "v.mp4", 10) as write:
        for i in range(4):
            frame = np.full((48, 64, 3), 40, np.uint8)
            cv2.circle(frame, (20 + 6 * i, 24), 10, (200, 30, 30), -1)
            write(frame)
    command("show_features", "v.mp4", *XS, "--size", "64", "--width", "64", "--layers", "1,4", cwd=tmp_path)
    assert count_frames(tmp_path / "features.mp4") == 4


@pytest.fixture
def sentence(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    photo(tmp_path / "a.png")
    photo(tmp_path / "dot.png", (1, 1))
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "folder").mkdir()

    def run(*arguments):
        with pytest.raises(SystemExit) as end:
            main(["show_features", *arguments])
        assert isinstance(end.value.code, str)
        assert end.value.code.startswith("error: ")
        assert "\n" not in end.value.code
        assert "Traceback" not in capsys.readouterr().err
        assert not list(tmp_path.glob("features.*"))
        return end.value.code

    return run


POINT = ("--show", "similarity", "--point")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("empty.png", *XS), "empty.png is not a readable image (0 bytes)"),
        (("dot.png", *XS), "dot.png has 1x1 pixels, less than one patch of 8x8"),
        (("gone.png", *XS), "cannot open gone.png (No such file or directory); check the path"),
        (("a.png", *XS, "--show", "attention", "--basis", "none"), "--basis is for --show pca"),
        (("folder", *XS), "folder has no images"),
        (("a.png", *XS, *POINT, "80,20"), "--point 80,20 is outside of a.png, which has 80x50 pixels"),
        (("a.png", *XS, "--layers", "1,5"), "--layers is (1, 5), out of range for 5 blocks"),
        (("a.png", *XS, "--show", "similarity"), "--show similarity needs --point"),
        (("a.png", *XS, "--point", "1,1"), "--point is for --show similarity and attention"),
        (("a.png", *XS, "--size", "4"), "--size is 4, less than a patch of 8"),
        (("a.png", *XS, "--geometry", "other"), "other"),
        (("a.png", "--variant", "pe_spatial_x"), "unknown variant 'pe_spatial_x'"),
        (("a.png",), "give --variant"),
        (("a.png", *XS, "--checkpoint", "gone.pt"), "no checkpoint at gone.pt"),
        (("a.png", *XS, "--out", "x.gif"), "'.gif'; allowed are '.png', '.jpg'"),
        (("a.png", "v.mp4", *XS), "v.mp4 is a video; give it alone"),
        (("v.mp4", *XS), "no video at v.mp4"),
    ],
)
def test_bad_input_is_one_sentence(sentence, arguments, message):
    assert message in sentence(*arguments)


@pytest.mark.parametrize(
    ("variant", "message"),
    [
        ("timm:vit_tiny_patch16_224", "attention of timm"),
        ('{"img_size": 64, "patch_size": 16, "embed_dim": 32, "depth": 2, "num_heads": 2, "class_token": false}',
         "has no class token"),
    ],
    ids=["timm", "no class token"],
)  # fmt: skip
def test_attention_that_does_not_exist(sentence, variant, message):
    pytest.importorskip("timm")
    options = ("--variant", variant, "--checkpoint", "none", "--size", "64", "--show", "attention")
    assert message in sentence("a.png", *options)


def test_phrases(tmp_path, capsys):
    pytest.importorskip("open_clip")
    save_core(tiny_core(WORD_CORE), tmp_path / "core.safetensors")
    photo(tmp_path / "a.png")
    core = ("--checkpoint", str(tmp_path / "core.safetensors"), "--device", "cpu")
    image, out = str(tmp_path / "a.png"), str(tmp_path / "p.png")
    main([image, *core, "--phrase", "a red cone", "犬", "--width", "60", "--out", out], "show_features")
    assert "wrote" in capsys.readouterr().out
    with Image.open(out) as sheet:
        assert sheet.width == 6 + 3 * 66
    for options, message in [
        (("--variant", "pe_spatial_b16_512"), "PE-Spatial-B16-512 has no text space"),
        (core, "--phrase names A twice"),
        ((), "--phrase needs a PE-Core"),
        ((*core, "--show", "attention"), "--phrase has no --show"),
        ((*core, "--basis", "none"), "--basis is for --show pca"),
        ((*core, "--variant", "PE-Core-L14-336"), "--phrase takes the PE-Core from --checkpoint FILE; omit --variant"),
    ]:
        with pytest.raises(SystemExit, match=message):
            main([image, "--phrase", "a", "A", *options], "show_features")


def test_map_of_a_phrase_is_the_similarity_of_each_patch(tmp_path):
    pytest.importorskip("open_clip")
    model = tiny_core(WORD_CORE)
    with Image.open(photo(tmp_path / "a.png", (64, 96))) as image:
        rgb = np.array(image)
    maps = PhraseMaps(model, ["a cat"], long_side=96)
    values = maps.maps(rgb, "a.png")
    assert values.shape == (1, 4, 6)
    pixels = torch.from_numpy(rgb).permute(2, 0, 1)[None] / 127.5 - 1
    with torch.inference_mode():
        tokens = model.visual.patches(pixels)[:, 2, 3]
        alone = model.visual.head(model.visual.attn_pool(tokens[:, None]))
    expected = torch.nn.functional.cosine_similarity(alone, maps.texts)
    torch.testing.assert_close(values[0, 2, 3], expected[0], rtol=1e-4, atol=1e-5)
