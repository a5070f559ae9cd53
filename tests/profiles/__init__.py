"""Tests of ``profiles``."""
