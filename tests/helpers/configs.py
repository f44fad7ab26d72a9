"""Configs, with what they register."""

from mmengine.config import Config
from mmengine.registry import init_default_scope
from mmengine.utils import import_modules_from_strings


def load(path):
    cfg = Config.fromfile(path)
    init_default_scope(cfg.default_scope)
    import_modules_from_strings(**cfg.custom_imports)
    return cfg
