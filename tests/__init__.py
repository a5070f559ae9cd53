"""Tests; ``spawn.py`` starts real processes, ``runs.py`` makes small PPO runs."""
