"""Exported models without torch: numpy, Pillow, and ONNX Runtime or OpenVINO."""
