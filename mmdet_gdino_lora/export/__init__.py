"""Tuned detectors for where there is neither mmdet nor torch: ONNX graphs and their runner."""
