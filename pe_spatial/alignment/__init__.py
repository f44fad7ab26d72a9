"""Alignment: losses, teachers, students and data to make a PE-Spatial of one's own; which geometry and layer to use.

Importing it registers what configs name; `losses` alone needs torch alone.
"""
