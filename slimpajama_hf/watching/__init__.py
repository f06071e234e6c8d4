"""Callbacks that watch a run in progress: bar, samples, passports, prompts, charts, trackers."""
