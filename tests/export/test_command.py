"""pe-spatial export, and predict with what it wrote."""

import json

import numpy as np
import pytest
from helpers.encoders import TINY
from PIL import Image

pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")
from dataclasses import asdict

from helpers.exported import EagerSession, golden_detector

import pe_spatial
from pe_spatial.cli.export import certified
from pe_spatial.cli.main import main
from pe_spatial.errors import ConfigError, DatasetError
from pe_spatial.export.accuracy import read_annotations
from pe_spatial.export.detector import detector_graph
from pe_spatial.runtime.loading import load_exported
from pe_spatial.runtime.manifest import write_manifest


def fail(*arguments):
    with pytest.raises(SystemExit) as error:
        main([str(a) for a in arguments])
    assert "\n" not in str(error.value)
    return str(error.value)


def test_an_encoder_is_exported_certified_and_verified(tmp_path, capsys):
    config = json.dumps({**asdict(TINY), "depth": 1})
    main(["export", config, "--weights", "none", "--out", str(tmp_path / "out")])
    assert "layer_0        differs by" in capsys.readouterr().out
    main(["export", "--verify", str(tmp_path / "out")])
    assert "layer_0        differs by" in capsys.readouterr().out
    assert "not empty" in fail("export", config, "--weights", "none", "--out", tmp_path / "out")
    maps = load_exported(tmp_path / "out")(np.zeros((1, 32, 64, 3), np.uint8))
    assert maps[0].shape == (1, TINY.embed_dim, 2, 4)
    error = fail("predict", tmp_path, "--checkpoint", tmp_path / "out", "--out", tmp_path / "p")
    assert "is an exported encoder, which predicts nothing" in error


def test_mistakes_end_in_one_sentence(tmp_path):
    assert "name the model and the folder" in fail("export", "pe_spatial_t16_512")
    assert "not an exported model" in fail("export", "--verify", tmp_path)
    assert "takes a folder and nothing else" in fail("export", "pe_spatial_t16_512", "--verify", tmp_path)
    for option in (["--format", "torch"], ["--layers", "1"], ["--gt", "x"], ["--images", "x"]):
        assert f"{option[0]}" in fail("export", "--verify", tmp_path, *option)
    gone, out = tmp_path / "gone", ("--out", tmp_path / "o")
    assert "no use of --gt-scale; omit it" in fail("export", "x.pth", *out, "--gt-scale", "1000")
    assert f"--gt is {gone}, which does not exist" in fail("export", "x.pth", *out, "--gt", gone, "--images", "x")
    assert "--image-root is" in fail("export", "x.pth", *out, "--annotations", __file__, "--image-root", gone)
    assert "belong together" in fail("export", "x.pth", "--out", tmp_path / "o", "--annotations", "a.json")
    (tmp_path / "weights.pth").write_bytes(b"no checkpoint")
    assert "weights.pth" in fail("export", tmp_path / "weights.pth", "--out", tmp_path / "o")
    assert "no weights were released" in fail("export", json.dumps(asdict(TINY)), "--out", tmp_path / "o")


def test_an_export_without_certificate_is_removed(tmp_path):
    for name, error in (("", KeyboardInterrupt), ("certificate.json", ConfigError)):
        folder = tmp_path / f"out{name}"
        folder.mkdir()
        (folder / "model.onnx").touch()
        stopped = certified(folder)
        stopped.__enter__()
        (folder / (name or "model.onnx")).touch()
        assert not stopped.__exit__(error, error(), None)
        assert folder.exists() == bool(name)


def test_annotations_in_another_form_are_refused(tmp_path):
    for content in ("no JSON", "[1]", "{}", '{"images": [], "annotations": []}'):
        (tmp_path / "a.json").write_text(content)
        with pytest.raises(DatasetError, match=r"a\.json holds no annotations in COCO's form"):
            read_annotations(tmp_path / "a.json", ["a"])
    (tmp_path / "a.json").write_text('{"images": [], "annotations": [], "categories": [{"id": 1, "name": "b"}]}')
    with pytest.raises(DatasetError, match="has the category 'b', which the model does not have"):
        read_annotations(tmp_path / "a.json", ["a"])


@pytest.mark.mmdet
def test_predict_takes_an_exported_detector(golden, tmp_path, monkeypatch, capsys):
    predictor, images, expected = golden_detector(golden, "maskrcnn", tmp_path)
    graph = detector_graph(predictor)
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "model.onnx").touch()
    write_manifest(folder, graph.manifest("onnx", "fp32"))
    monkeypatch.setattr("pe_spatial.runtime.images.open_session", lambda *_, **__: EagerSession(graph))
    assert len(pe_spatial.load(folder)(images[0])) == len(expected[0]["scores"])
    with pytest.raises(ConfigError, match="which has no tta; omit it"):
        pe_spatial.load(folder, tta=True)
    main(["predict", str(images[0]), "--checkpoint", str(folder), "--out", str(tmp_path / "p"), "--score", "0.05"])
    assert "1 predicted" in capsys.readouterr().out
    assert json.loads((tmp_path / "p" / "predictions.json").read_text())["annotations"]
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / "a.png")
    error = fail("predict", tmp_path / "a.png", "--checkpoint", folder, "--out", tmp_path / "q", "--tile")
    assert "is an exported model, which has no --tile; omit it" in error
