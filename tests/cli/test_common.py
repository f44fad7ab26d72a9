"""What the command lines share."""

import pytest
import torch

pytest.importorskip("mmengine")
from helpers.tiny_run import tiny_config
from mmengine.config import Config

from pe_spatial.cli.arguments import load_config
from pe_spatial.cli.main import build_parser
from pe_spatial.encoder.files import CheckpointError
from pe_spatial.engine.configs import config_in
from pe_spatial.engine.runner import build_runner
from pe_spatial.engine.training import explain_failure
from pe_spatial.errors import TrainingError


def test_options_given_twice_all_count():
    """A launch script sets some, its user others; of the same option the later one holds."""
    args = build_parser("train").parse_args(["c.py", "--cfg-options", "a=1", "b.c=2", "--cfg-options", "b.c=3", "d=x"])
    assert args.cfg_options == {"a": "1", "b.c": "3", "d": "x"}
    assert build_parser("train").parse_args(["c.py"]).cfg_options == {}


def test_work_dir_of_an_installed_config_is_its_name():
    cfg = load_config(build_parser("train").parse_args(["pe_spatial::pe_demo_cascade_synthetic.py"]))
    assert cfg.work_dir == "work_dirs/pe_demo_cascade_synthetic"


def test_encoders_are_names_or_json():
    parser = build_parser("swap_backbone")
    assert parser.parse_args(["c.py", "--variant", "timm:x"]).variant == "timm:x"
    assert parser.parse_args(["c.py", "--variant", '{"img_size": 192}']).variant == {"img_size": 192}
    with pytest.raises(SystemExit):
        parser.parse_args(["c.py", "--variant", '{"img_size": 192'])


def test_a_config_without_a_launcher_builds_a_runner(tmp_path):
    """As the demo's, which no command line has been through."""
    assert type(build_runner(tiny_config(tmp_path))).__name__ == "QuietRunner"


def test_config_comes_back_from_a_checkpoint(tmp_path):
    cfg = Config(dict(model=dict(type="Line", width=3), names=("a", "b")))
    torch.save({"meta": {"cfg": cfg.pretty_text}, "state_dict": {"x": torch.ones(1)}}, tmp_path / "run.pth")
    assert config_in(str(tmp_path / "run.pth")).to_dict() == cfg.to_dict()
    torch.save({"state_dict": {"x": torch.ones(1)}}, tmp_path / "weights.pth")
    with pytest.raises(CheckpointError, match="holds no config; name it with --config"):
        config_in(str(tmp_path / "weights.pth"))


@pytest.fixture
def training(tmp_path):
    encoder = dict(type="PerceptionEncoderPyramid", variant="pe_spatial_t16_512")
    loader = dict(batch_size=4, num_workers=2, timeout=600)
    Config(dict(model=dict(detector=dict(backbone=encoder)), train_dataloader=loader)).dump(tmp_path / "c.py")
    return Config.fromfile(tmp_path / "c.py")


def test_out_of_memory_names_the_step_and_the_knobs(training):
    with pytest.raises(RuntimeError) as cpu:
        torch.empty(1 << 60)
    for error in (cpu.value, torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")):
        explained = explain_failure(training, 17, error)
        assert isinstance(explained, TrainingError)
        for part in ("step 17", "batch_size (now 4", "model.detector.backbone.grad_checkpointing=True", "--amp"):
            assert part in str(explained)
        assert "\n" not in str(explained)


def test_a_hanging_worker_is_named_and_other_errors_are_left_alone(training):
    class Hangs(torch.utils.data.Dataset):
        def __len__(self):
            return 2

        def __getitem__(self, _):
            import time

            time.sleep(30)

    with pytest.raises(RuntimeError) as error:
        next(iter(torch.utils.data.DataLoader(Hangs(), num_workers=1, timeout=1)))
    explained = explain_failure(training, 3, error.value)
    assert isinstance(explained, TrainingError)
    assert "step 3 waited 600 s for a data worker" in str(explained)
    other = RuntimeError("shapes do not match")
    assert explain_failure(training, 3, other) is other
