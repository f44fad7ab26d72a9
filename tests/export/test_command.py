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
from pe_spatial.cli.main import main
from pe_spatial.errors import ConfigError
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
    assert "belong together" in fail("export", "x.pth", "--out", tmp_path / "o", "--annotations", "a.json")
    (tmp_path / "weights.pth").write_bytes(b"no checkpoint")
    assert "weights.pth" in fail("export", tmp_path / "weights.pth", "--out", tmp_path / "o")
    assert "no weights were released" in fail("export", json.dumps(asdict(TINY)), "--out", tmp_path / "o")


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
