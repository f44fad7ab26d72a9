"""Several models exported on one encoder: the results of the models in PyTorch, and one sentence for another folder."""

import shutil

import numpy as np
import pytest

pytest.importorskip("mmdet")
pytest.importorskip("mmseg")
pytest.importorskip("sam2")
pytest.importorskip("onnxruntime")
from helpers import multitask as helper
from helpers.exported import EagerSession

import pe_spatial
from pe_spatial.cli.main import main
from pe_spatial.errors import ConfigError
from pe_spatial.export.graph import versions
from pe_spatial.multitask.export import export_together, together_parts
from pe_spatial.runtime.dense import ExportedDepth
from pe_spatial.runtime.manifest import Manifest, write_manifest
from pe_spatial.runtime.together import ExportedTogether, compare_results, reference_frames, results_of

pytestmark = pytest.mark.slow
SIZE = 192


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    """A detector, a depth model that averages with the mirror image, a segmenter and a tracker, with random heads."""
    root, depth = tmp_path_factory.mktemp("models"), helper.depth_config()
    depth.model.test_cfg.flip = True
    return [
        helper.write(root / "detector.pth", helper.detector_config(), seed=0),
        helper.write(root / "depth.pth", depth, seed=1),
        helper.write(root / "segmenter.pth", helper.segmenter_config(), seed=2),
        helper.write_tracker(root / "tracker.pth", seed=3),
    ]


def test_heads_on_the_maps_of_one_graph_give_the_results_of_the_models(paths, tmp_path, monkeypatch):
    """All four, with the modules of the graphs in place of their files."""
    model = pe_spatial.MultiTask(paths, size=SIZE)
    parts = together_parts(model)
    assert parts.options["tasks"] == {task: task for task in model.tasks}
    assert list(parts.graphs["segmentation"].inputs) == ["layer_4"]
    names = [f"{kind}_{i}" for kind in ("layer", "token") for i in range(1, 5)]
    assert list(parts.graphs["depth"].inputs) == [*names, *(f"mirrored_{name}" for name in names)]
    assert all("layer_" not in name for part in list(parts.graphs.values())[1:] for name in part.stages)
    common = dict(format="onnx", precision="fp32", inputs={}, outputs=[], versions=versions())
    graphs = {tmp_path / name: part for name, part in parts.graphs.items()}
    for folder, part in graphs.items():
        folder.mkdir(parents=True)
        (folder / "graph").touch()
        write_manifest(folder, part.manifest("onnx", "fp32"))
    write_manifest(tmp_path / "tracking", Manifest(task="tracking", options=parts.tracking, **common))
    write_manifest(tmp_path, Manifest(task="multitask", options=parts.options, **common))
    calls = []

    class Session(EagerSession):
        def run(self, inputs):
            calls.append(self.exportable.task)
            return super().run(inputs)

    for module in ("together", "tracker"):
        monkeypatch.setattr(f"pe_spatial.runtime.{module}.open_session", lambda folder, _: Session(graphs[folder]))
    exported = pe_spatial.load(tmp_path)
    frames = reference_frames(SIZE)[:2]
    stages, matched, agreement = compare_results(results_of(exported, frames), results_of(model, frames))
    assert stages["depth/depth"]["largest"] < 1e-5
    assert matched["theirs"] > 5
    assert matched["unmatched"] == 0
    assert matched["box"] < 1e-3
    assert agreement > 0.999
    assert calls.count("encoder") == 2 * len(frames)  # each frame and its mirror image
    assert calls.count("detection") == len(frames)
    assert exported.report()["encodes"] == 2


def test_a_folder_is_written_certified_and_refused_when_it_is_another(paths, tmp_path, capsys):
    models, out = [str(paths[i]) for i in (1, 2)], tmp_path / "out"
    main(["export", *models, "--size", str(SIZE), "--out", str(out)])
    printed = capsys.readouterr().out
    assert "depth, segmentation on one encoder, onnx" in printed
    assert "classes of pixels and tracked masks agree in" in printed
    main(["export", "--verify", str(out)])
    assert "encoder/layer_1 differs by" in capsys.readouterr().out
    image = np.random.default_rng(0).integers(0, 256, (150, 260, 3), np.uint8)
    result, expected = pe_spatial.load(out)(image), pe_spatial.MultiTask(models, size=SIZE)(image)
    assert np.abs(result["depth"].depth - expected["depth"].depth).max() < 0.01  # cv2 shrinks other pixels by one level
    assert result["segmentation"].labels.shape == (150, 260)
    with pytest.raises(ConfigError, match=r"depth is one head of several on one encoder.*give the folder above it"):
        ExportedDepth(out / "depth")
    shutil.copy(out / "depth" / "model.onnx", out / "segmentation" / "model.onnx")
    with pytest.raises(ConfigError, match=r"do not belong together: segmentation/model.onnx differ"):
        ExportedTogether(out)


def test_what_cannot_be_exported_together_is_one_sentence(paths, tmp_path):
    with pytest.raises(ConfigError, match="for frames of one size; give it: --size PIXELS"):
        together_parts(pe_spatial.MultiTask(paths[:2]))
    with pytest.raises(ConfigError, match=r"reaches the encoder of detector.pth as another image, of 192x192"):
        together_parts(pe_spatial.MultiTask(paths[:3], size=128))
    with pytest.raises(ConfigError, match="the format is torch; several models are exported to onnx or openvino"):
        export_together(pe_spatial.MultiTask(paths[:2], size=SIZE), tmp_path / "out", form="torch")
    cfg = helper.depth_config()
    cfg.model.backbone.update(window_size=12, global_attn_indexes=[2, 4])
    windowed = helper.write(tmp_path / "windowed.pth", cfg)
    with pytest.raises(ConfigError, match=r"depth.pth and windowed.pth encode an image in different geometries"):
        together_parts(pe_spatial.MultiTask([paths[1], windowed], size=SIZE))
    with pytest.raises(SystemExit, match="several models are exported without --images; omit it"):
        main(["export", *map(str, paths[:2]), "--out", str(tmp_path / "out"), "--images", "x"])
