"""Several processes that work together."""

from collections.abc import Callable
from typing import Any

import torch
from torch import multiprocessing


def start(work: Callable[..., None], args: tuple[Any, ...], *, number: int) -> None:
    """Run `work(rank, *args)` in processes and wait; forked ones, which import nothing again, unless there is a GPU."""
    torch.manual_seed(0)
    method = "spawn" if torch.cuda.is_available() else "fork"
    multiprocessing.start_processes(work, args, nprocs=number, start_method=method)
