"""Measure, explain and report what differential privacy costs a diffusion transformer."""
