"""--batch auto: batches are halved until two real steps fit, and accumulated to as many images as before."""

import subprocess
from types import SimpleNamespace

import pytest

pytest.importorskip("mmengine")
pytest.importorskip("torch", minversion="2.4")
from helpers.tiny_run import tiny_config

from pe_spatial.engine import batch
from pe_spatial.errors import ConfigError, TrainingError

SENTENCE = "batches of {}, accumulated to {} (their losses are averaged): two steps of it fitted into memory"


def hungry(tmp_path, fits, how="gpu", size=8):
    imports = dict(imports=["helpers.hungry"], allow_failed_imports=False)
    cfg = tiny_config(tmp_path, custom_imports=imports)
    cfg.model = dict(type="Hungry", fits=fits, how=how)
    cfg.train_dataloader.batch_size = size
    return cfg


@pytest.fixture
def in_this_process(monkeypatch):
    """Take the steps here, which saves the start of an interpreter for each."""

    def run(command, **_):
        path = command[-1].partition("take_steps(")[2].strip("')\"")
        try:
            batch.take_steps(path)
        except Exception as error:
            return subprocess.CompletedProcess(command, 1, "", f"{type(error).__name__}: {error}")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(batch, "subprocess", SimpleNamespace(run=run))


@pytest.mark.usefixtures("in_this_process")
@pytest.mark.parametrize("how", ["gpu", "cpu"])
def test_batches_are_halved_and_accumulated(how, tmp_path):
    cfg = hungry(tmp_path, 2, how)
    cfg.optim_wrapper.accumulative_counts = 3
    assert batch.fit_batch(cfg) == (4, SENTENCE.format(2, 8))
    assert cfg.train_dataloader.batch_size == 2
    assert cfg.optim_wrapper.accumulative_counts == 12
    assert cfg.train_cfg.max_iters == 10


@pytest.mark.usefixtures("in_this_process")
@pytest.mark.parametrize(
    ("heads", "updates", "said"),
    [
        (8, 1, "batches of 8, encoded 2 at a time"),
        (4, 2, "batches of 4, encoded 1 at a time, accumulated to 8 (their losses are averaged)"),
    ],
)
def test_the_encoder_gets_fewer_images_before_the_losses_do(heads, updates, said, tmp_path):
    cfg = hungry(tmp_path, 2)
    encoder = dict(type="PerceptionEncoder", variant="any")
    cfg.model.update(heads=heads, backbone=dict(encoder, grad_checkpointing="selective"))
    assert batch.fit_batch(cfg) == (updates, f"{said}: two steps of it fitted into memory")
    assert cfg.train_dataloader.batch_size == 8 // updates
    assert cfg.optim_wrapper.get("accumulative_counts", 1) == updates
    assert cfg.model.backbone == dict(encoder, micro_batch=2 // updates, grad_checkpointing=False)


@pytest.mark.usefixtures("in_this_process")
def test_what_fits_stays(tmp_path):
    cfg = hungry(tmp_path, 8)
    assert batch.fit_batch(cfg)[0] == 1
    assert cfg.train_dataloader.batch_size == 8
    assert "accumulative_counts" not in cfg.optim_wrapper


@pytest.mark.usefixtures("in_this_process")
def test_nothing_fits_or_something_else_is_wrong(tmp_path):
    with pytest.raises(TrainingError, match=r"not even one image fits into memory\. Use smaller images"):
        batch.fit_batch(hungry(tmp_path, 0))
    with pytest.raises(ConfigError, match="--batch auto: the first steps failed: ValueError: wrong shape"):
        batch.fit_batch(hungry(tmp_path, 0, "other"))


@pytest.mark.parametrize(
    ("found", "said"),
    [
        ("--amp", "The planner expects that it fits with --amp"),
        ("", "Close what else takes memory."),
        (ConfigError("it does not fit into 2 GB"), "it does not fit into 2 GB"),
    ],
)
def test_if_nothing_fits_the_planner_says_what_would(found, said, tmp_path, monkeypatch):
    def fit(*_, **__):
        if isinstance(found, ConfigError):
            raise found
        return found

    monkeypatch.setattr(batch, "plan", lambda *_, **__: [dict(total=0)])
    monkeypatch.setattr(batch, "_fits", lambda _: False)
    monkeypatch.setattr(batch, "fit", fit)
    with pytest.raises(TrainingError, match=f"not even one image fits into memory\\. {said}"):
        batch.fit_batch(hungry(tmp_path, 0))


@pytest.mark.slow
def test_a_process_that_the_system_kills_had_no_memory(tmp_path):
    """In a real one, which kills itself in the model's first step."""
    assert not batch._fits(hungry(tmp_path, 1, "killed", size=2))
