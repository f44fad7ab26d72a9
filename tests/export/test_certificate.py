"""The certificate: it passes for what was exported, and names what is wrong with anything else."""

import json

import numpy as np
import pytest
import torch
from helpers.encoders import TINY

pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
import onnx
from helpers.exported import EagerSession

from pe_spatial import PerceptionEncoder
from pe_spatial.errors import ConfigError
from pe_spatial.export.certificate import certify, page, reference_cases
from pe_spatial.export.encoder import encoder_graph
from pe_spatial.export.graph import Exportable, export
from pe_spatial.export.precision import check_precision
from pe_spatial.export.tensorrt import build, build_command, check
from pe_spatial.runtime.compare import LIMITS, difference, match, problems, unpaired
from pe_spatial.runtime.manifest import read_manifest, write_manifest
from pe_spatial.runtime.verify import compare, verify


def tiny(**options):
    torch.manual_seed(0)
    return encoder_graph(PerceptionEncoder(TINY, out_indices=(0,), **options).eval())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("certified") / "out"
    graph = tiny()
    export(graph, out)
    certificate = certify(graph, out, rounds=1, images=[np.zeros((32, 48, 3), np.uint8)])
    return out, certificate


def test_certificate_states_the_differences_and_can_be_repeated(folder):
    out, certificate = folder
    assert certificate["passed"]
    assert certificate["stages"]["layer_0"]["largest"] < 1e-5
    assert certificate == json.loads((out / "certificate.json").read_text())
    assert len(certificate["cases"]) == 4
    assert min(certificate["seconds"]["torch"], certificate["seconds"]["exported"]) > 0
    assert "# Certificate: PASSED" in (out / "certificate.md").read_text()
    assert verify(out)["stages"]["layer_0"] == pytest.approx(certificate["stages"]["layer_0"])
    assert verify(out, backend="openvino")["stages"]["layer_0"]["largest"] < 1e-5


def test_another_weight_in_the_file_is_caught_by_the_runtime_alone(folder, tmp_path):
    out, _ = folder
    for path in out.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    model = onnx.load(str(tmp_path / "model.onnx"))
    weight = max((t for t in model.graph.initializer if len(t.dims) == 2), key=lambda t: len(t.raw_data))
    values = onnx.numpy_helper.to_array(weight).copy()
    values[0, 0] += 0.1
    weight.CopyFrom(onnx.numpy_helper.from_array(values, weight.name))
    (tmp_path / "model.onnx.data").unlink()
    onnx.save_model(model, str(tmp_path / "model.onnx"), save_as_external_data=True, location="model.onnx.data")
    write_manifest(tmp_path, read_manifest(out))
    with pytest.raises(ConfigError, match=r"does not compute what PyTorch did: layer_0 differs by .* Do not use it"):
        verify(tmp_path)
    (tmp_path / "reference.npz").unlink()
    with pytest.raises(ConfigError, match="no readable"):
        verify(tmp_path)


def weights(graph):
    graph.module.encoder.blocks[0].attn.proj.weight.data[3, 5] += 0.02


def channels(graph):
    graph.module.mean.add_(torch.tensor([0.0, 5.0, 0.0]))


def resize(graph):
    """Learned positions resized with other weights."""
    encoder = graph.module.encoder
    encoder.geometry = PerceptionEncoder(TINY, geometry="release", pos_embed_mode="bicubic").geometry


@pytest.mark.parametrize("mutation", [None, weights, channels, resize])
def test_mutations_are_caught(mutation):
    graph = tiny()
    cases = reference_cases(graph, 1, [])
    if mutation:
        mutation(graph)
    assert bool(problems(*compare(EagerSession(graph), cases), LIMITS["fp32"])) == bool(mutation)


def test_failed_certificate_is_written_and_raises(tmp_path, folder):
    out, _ = folder
    for path in out.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    graph = tiny()
    weights(graph)
    with pytest.raises(ConfigError, match="layer_0 differs"):
        certify(graph, tmp_path, rounds=1)
    assert not json.loads((tmp_path / "certificate.json").read_text())["passed"]
    assert "FAILED" in (tmp_path / "certificate.md").read_text()


def boxes(count, seed=0):
    rng = np.random.default_rng(seed)
    corner = rng.random((count, 2)) * 100
    return dict(
        boxes=np.concatenate((corner, corner + 20), 1), scores=np.sort(rng.random(count))[::-1],
        labels=rng.integers(0, 3, count), masks=rng.random((count, 8, 8)) > 0.5,
    )  # fmt: skip


def test_detections_are_matched_one_to_one():
    theirs = boxes(12)
    order = np.random.default_rng(1).permutation(12)
    ours = {name: value[order] for name, value in theirs.items()}
    assert match(ours, theirs) == dict(theirs=12, ours=12, unmatched=0, box=0.0, score=0.0, iou=1.0)
    ours["boxes"] = ours["boxes"] + 0.2
    assert match(ours, theirs)["box"] == pytest.approx(0.2)
    assert problems({}, match(ours, theirs), LIMITS["fp32"]) == ["the box of a detection differs by 0.2 (limit 0.05)"]
    fewer = {name: value[:10] for name, value in theirs.items()}
    assert match(fewer, theirs)["unmatched"] == 2
    assert "2 of 12 detections" in problems({}, match(fewer, theirs), LIMITS["fp32"])[0]
    other = theirs | {"labels": theirs["labels"] + 1}
    assert match(other, theirs)["unmatched"] > 0
    nothing = {name: value[:0] for name, value in theirs.items()}
    assert match(nothing, nothing)["unmatched"] == 0
    assert match(nothing, theirs)["unmatched"] == 12


def test_proposals_are_compared_as_a_set():
    theirs = boxes(50)["boxes"][None]
    assert unpaired(theirs[:, ::-1], theirs) == 0
    ours = theirs.copy()
    ours[0, :3] += 1
    assert unpaired(ours, theirs) == pytest.approx(0.06)
    assert "6.0 % of the proposals have no partner (limit 0.5 %)" in problems(
        {"proposals": dict(largest=unpaired(ours, theirs), scale=1)}, None, LIMITS["fp32"]
    )


def test_differences_that_are_no_number_are_caught():
    assert difference(np.array([np.nan]), np.array([1.0]))["largest"] == np.inf
    assert difference(np.zeros(2), np.zeros(3))["largest"] == np.inf
    assert problems({"a": difference(np.array([np.nan]), np.array([1.0]))}, None, LIMITS["fp32"])


def test_precisions_that_a_format_does_not_have():
    with pytest.raises(ConfigError, match="format onnx has no bf16; it has fp32, int8, int8-static"):
        check_precision("onnx", "bf16", [])
    with pytest.raises(ConfigError, match="int8-static needs calibration"):
        check_precision("onnx", "int8-static", [])
    with pytest.raises(ConfigError, match="fp32 takes no calibration"):
        check_precision("onnx", "fp32", [1])


@pytest.mark.slow
@pytest.mark.parametrize(("form", "precision"), [("onnx", "int8"), ("onnx", "int8-static"), ("openvino", "int8-static"),
                                                 ("openvino", "fp16"), ("openvino", "bf16")])  # fmt: skip
def test_lower_precision_is_near_and_smaller(tmp_path, form, precision):
    graph = tiny()
    calibration = [{"pixels": np.random.default_rng(0).integers(0, 256, (1, 64, 64, 3), dtype=np.uint8)}]
    export(graph, tmp_path / "out", form=form, precision=precision,
           calibration=calibration if precision == "int8-static" else [])  # fmt: skip
    certificate = certify(graph, tmp_path / "out", rounds=1)
    assert certificate["stages"]["layer_0"]["largest"] > 1e-5
    assert verify(tmp_path / "out")["stages"]["layer_0"]["largest"] < 1


def test_tensorrt_takes_the_file_and_the_command_is_printed(folder, tmp_path, monkeypatch):
    out, _ = folder
    assert check(out / "model.onnx") == []
    monkeypatch.setattr("shutil.which", lambda _: None)
    result = build(out, read_manifest(out))
    assert not result["built"]
    assert result["command"].startswith(f"trtexec --onnx={out / 'model.onnx'} --saveEngine=")
    assert "--optShapes=pixels:1x448x448x3" in build_command(out, read_manifest(out))
    graph = Exportable(module=Odd(), task="encoder", inputs={"x": torch.rand(2, 3)}, dynamic={}, outputs=["y"])
    export(graph, tmp_path / "odd")
    with pytest.raises(ConfigError, match="TensorRT has no operator Det"):
        build(tmp_path / "odd", read_manifest(tmp_path / "odd"))


class Odd(torch.nn.Module):
    def forward(self, x):
        return (torch.linalg.det(x.T @ x),)


def test_page_names_the_problems(folder):
    _, certificate = folder
    text = page(certificate | dict(passed=False, problems=["level_0 differs by 1 (limit 0.1)"]))
    assert text.startswith("# Certificate: FAILED")
    assert "- level_0 differs by 1 (limit 0.1)" in text
