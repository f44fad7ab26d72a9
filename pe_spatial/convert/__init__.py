"""Checkpoints between layouts: names and shapes as tables, one converter, rotary tables."""
