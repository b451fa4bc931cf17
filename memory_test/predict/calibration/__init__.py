"""Rates that devices reach, one JSON file a device, written by `memory-test calibrate` on it."""
