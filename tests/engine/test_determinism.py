"""Same seed, same losses to the last bit; with data workers, and across an interruption."""

import random

import numpy as np
import pytest
import torch

pytest.importorskip("mmengine")
from helpers.tiny_run import build, losses, tiny_config
from torch.utils.data import DataLoader

from pe_spatial.engine.determinism import SeedAugmentation, SeededIndex, make_deterministic
from pe_spatial.errors import ConfigError


def run(work_dir, *, seed=3, stop=None, **options):
    cfg = tiny_config(work_dir, **options)
    make_deterministic(cfg, seed)
    runner = build(cfg)
    found = losses(runner)
    random.seed()  # whatever was drawn before does not matter
    np.random.seed(random.getrandbits(32))
    torch.manual_seed(random.getrandbits(32))
    if stop is not None:
        step = runner.model.train_step

        def interrupted(*args, **kwargs):
            if runner.iter == stop:
                raise KeyboardInterrupt
            return step(*args, **kwargs)

        runner.model.train_step = interrupted
        with pytest.raises(KeyboardInterrupt):
            runner.train()
    else:
        runner.train()
    return found


@pytest.mark.parametrize(("epochs", "workers"), [(False, 0), (True, 0), (False, 2)])
def test_same_seed_same_losses_also_when_resumed(tmp_path, epochs, workers):
    """The checkpoint lies in the middle of what was done; what came after it is done again, equally."""
    whole = run(tmp_path / "whole", epochs=epochs, workers=workers)
    assert len(whole) == (20 if epochs else 10)
    stop = 13 if epochs else 7
    part = run(tmp_path / "part", epochs=epochs, workers=workers, stop=stop)
    again = run(tmp_path / "part", epochs=epochs, workers=workers, resume=True)
    assert min(again) == (11 if epochs else 5)
    assert part | again == whole
    assert all(part[step] == again[step] for step in part.keys() & again.keys())


def test_another_seed_and_no_seed_give_others(tmp_path):
    one = run(tmp_path / "a", seed=3)
    assert run(tmp_path / "b", seed=4) != one
    free = []
    for name in "cd":
        runner = build(tiny_config(tmp_path / name))
        found = losses(runner)
        random.seed()
        runner.train()
        free.append(found)
    assert free[0] != free[1]  # Python's random numbers, which the augmentation uses


def test_augmentation_does_not_depend_on_the_number_of_workers(tmp_path):
    assert run(tmp_path / "a", workers=0) == run(tmp_path / "b", workers=2)


def test_draws_of_one_image_differ_between_epochs(tmp_path):
    found = run(tmp_path, epochs=True)
    assert len(set(found.values())) == 20
    step = SeedAugmentation()
    numbers = []
    for seed in ((0, 0), (0, 1), (1, 0), (0, 0)):
        draw = SeededIndex(5, 3, *seed, 1)
        step.transform(dict(sample_idx=draw))
        numbers.append((random.random(), np.random.rand()))
    assert numbers[0] == numbers[3]
    assert len(set(numbers)) == 3


def test_draw_is_an_index_and_survives_the_way_to_a_worker():
    class Echo:
        def __len__(self):
            return 4

        def __getitem__(self, index):
            return [10, 11, 12, 13][index], index.seed

    loader = DataLoader(Echo(), sampler=[SeededIndex(2, 7, 8)], num_workers=1, collate_fn=list)
    assert list(loader) == [[(12, (7, 8))]]


def test_lost_draws_are_an_error_but_a_replaced_image_is_not():
    step = SeedAugmentation()
    with pytest.raises(ConfigError, match="a wrapper around the dataset"):
        step.transform(dict(sample_idx=3))
    step.transform(dict(sample_idx=SeededIndex(3, 0)))
    step.transform(dict(sample_idx=4))
    cfg = tiny_config("unused")
    cfg.train_dataloader.dataset = dict(type="RepeatDataset", times=2, dataset=cfg.train_dataloader.dataset)
    with pytest.raises(ConfigError, match="RepeatDataset without its own pipeline"):
        make_deterministic(cfg, 0)
