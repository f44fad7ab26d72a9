"""The geometry doctor: frontier and recommendation, the command on the synthetic world and on real videos."""

import json

import pytest

pytest.importorskip("mmdet")
pytest.importorskip("mmseg")
from helpers.encoders import TINY
from helpers.repository import REPO
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope

from pe_spatial import PerceptionEncoder
from pe_spatial.alignment.doctor import Choice, default_sizes, forward_costs, frontier, recommend
from pe_spatial.cli.main import main
from pe_spatial.engine.configs import read_config
from pe_spatial.errors import ConfigError
from pe_spatial.synthetic import write_dataset

pytestmark = pytest.mark.mmdet
ENCODER = ["--variant", "pe_synthetic_xs8_192"]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = tmp_path_factory.mktemp("worlds") / "world"
    return write_dataset(root, scenes={"train": 4, "val": 3}, frames_per_scene=2, size=(96, 96))


def choice(cost, score, metric="mIoU", **about):
    about = dict(geometry="release", size=96, layer=0, memory=1, seconds=0.1) | about
    return Choice(scores={metric: score}, gflops=cost, **about)


def test_frontier_keeps_what_nothing_cheaper_equals_and_the_cheapest_good_one_is_recommended():
    choices = [choice(4, 50), choice(1, 30), choice(2, 49.6), choice(3, 40), choice(1, 20), choice(5, 50)]
    assert [(c.gflops, c.scores["mIoU"]) for c in frontier(choices, "mIoU")] == [(1, 30), (2, 49.6), (4, 50)]
    assert recommend(choices, "mIoU", 0.01).gflops == 2
    assert recommend(choices, "mIoU", 0.0).gflops == 4
    errors = [choice(1, 0.9, "rmse"), choice(2, 0.5, "rmse"), choice(3, 0.499, "rmse"), choice(4, 0.6, "rmse")]
    assert [c.gflops for c in frontier(errors, "rmse")] == [1, 2, 3]
    assert recommend(errors, "rmse", 0.01).gflops == 2
    with pytest.raises(ConfigError, match="tolerance is 1"):
        recommend(errors, "rmse", 1)


def test_costs_are_those_of_the_operations_and_of_the_blocks_that_are_needed():
    costs = forward_costs(TINY, "release", [0, 3], 64)
    tokens, width = 17, TINY.embed_dim
    attention = 2 * 2 * tokens**2 * width
    block = 2 * tokens * width * width * (3 + 1 + 8) + attention
    patches = 2 * 16 * (3 * 16 * 16) * width
    assert [costs[0][0], costs[3][0]] == [patches + block, patches + 4 * block]
    weights = sum(p.nbytes for p in PerceptionEncoder(TINY, out_indices=(0,)).parameters())
    assert weights < costs[0][1] < costs[3][1]
    assert default_sizes(TINY) == [48, 64, 96, 128]


def test_command_scores_every_layer_and_writes_a_config_that_builds(world, tmp_path, capsys):
    out = tmp_path / "out"
    options = ["--sizes", "96,144", "--geometries", "release,vitdet", "--layers", "1,4", "--images", "6"]
    main([str(world), *ENCODER, "--out", str(out), *options], command="geometry")
    text = capsys.readouterr().out
    assert "segmentation decides" in text
    assert "| vitdet | 144 |" in text
    assert "recommended: " in text
    choices = json.loads((out / "scores.json").read_text())["choices"]
    assert len(choices) == 8
    assert {c["layer"] for c in choices} == {1, 4}
    assert (out / "frontier.png").stat().st_size > 1000
    cfg = read_config(str(out / "recommended.py"))
    line = next(line for line in text.splitlines() if line.startswith("recommended"))
    backbone = cfg.model.backbone
    assert f"layer {backbone.out_indices[0]} " in line
    assert f"{backbone.geometry}, {cfg.model.data_preprocessor['size'][0]} px" in line
    assert backbone.variant == "pe_synthetic_xs8_192"
    init_default_scope(cfg.default_scope)
    MODELS.build(cfg.model).init_weights()


def test_command_reads_the_data_of_a_config_and_changes_that_config(world, tmp_path):
    base = tmp_path / "depth.py"
    name = str(REPO / "projects/nyu_depth/synthetic_dpt.py")
    base.write_text(
        f"_base_ = {name!r}\n"
        f"train_dataloader = dict(dataset=dict(data_root={str(world)!r}))\n"
        f"val_dataloader = dict(dataset=dict(data_root={str(world)!r}))\n"
    )
    options = ["--sizes", "96", "--geometries", "timm", "--images", "4", "--task", "depth"]
    main([str(base), *ENCODER, "--out", str(tmp_path / "out"), *options], command="geometry")
    cfg = Config.fromfile(tmp_path / "out/recommended.py")
    choices = json.loads((tmp_path / "out/scores.json").read_text())["choices"]
    assert [c["layer"] for c in choices] == [0, 1, 2, 3, 4]
    assert choices[4]["scores"]["rmse"] < choices[0]["scores"]["rmse"]
    assert cfg.model.backbone.geometry == "timm"
    assert len(set(cfg.model.backbone.out_indices)) == 1
    init_default_scope(cfg.default_scope)
    assert MODELS.build(cfg.model).backbone.out_indices


def test_images_without_labels_are_compared_with_their_warps(world, tmp_path, capsys):
    options = ["--sizes", "96", "--geometries", "release", "--layers", "0,4", "--images", "3"]
    main([str(world / "val"), *ENCODER, "--out", str(tmp_path), *options], command="geometry")
    assert "correspondence decides" in capsys.readouterr().out
    scores = [c["scores"]["matches"] for c in json.loads((tmp_path / "scores.json").read_text())["choices"]]
    assert all(10 < score <= 100 for score in scores)
    assert read_config(str(tmp_path / "recommended.py")).model.size == 96


@pytest.mark.slow
def test_real_videos_decide_by_tracking(shared, tmp_path, capsys):
    options = ["--sizes", "120,192", "--geometries", "release", "--layers", "2,4", "--clips", "2", "--frames", "4"]
    main([str(shared / "data/video"), *ENCODER, "--out", str(tmp_path), *options], command="geometry")
    assert "tracking decides" in capsys.readouterr().out
    choices = json.loads((tmp_path / "scores.json").read_text())["choices"]
    assert all(20 < c["scores"]["J&F"] < 100 for c in choices)
    cfg = read_config(str(tmp_path / "recommended.py"))
    assert cfg.model.size in (120, 192)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--geometries", "vit"], "a geometry is 'vit'; allowed are"),
        (["--task", "tracking"], "no labels for tracking; it allows segmentation, depth"),
        (["--task", "detection"], "task is 'detection'; allowed are"),
        (["--sizes", "0"], "--sizes has 0"),
        (["--tolerance", "2"], "tolerance is 2"),
        (["--base", "gone.py"], "gone.py"),
        (["--layers", "9"], "--layers"),
        (
            ["--base", str(REPO / "configs/_base_/runtime.py")],
            "has no Perception Encoder as model.backbone",
        ),
    ],
)
def test_wrong_options_end_in_a_sentence(world, tmp_path, options, message, capsys):
    common = ["--sizes", "48", "--images", "2", "--layers", "0", "--geometries", "release", "--out", str(tmp_path)]
    with pytest.raises(SystemExit) as error:
        main([str(world), *ENCODER, *common, *options], command="geometry")
    out, err = capsys.readouterr()
    assert message in f"{error.value}{err}"
    assert "px" not in out  # nothing was measured before
