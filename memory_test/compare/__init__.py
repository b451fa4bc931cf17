"""Contenders against a baseline, step by step in turns: time ratios that a busy machine moves least."""
