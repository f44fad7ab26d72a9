"""The commands: one module each, called by `pe-spatial NAME` and by tools/NAME.py."""
