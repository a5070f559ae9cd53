"""Tests of ``executor``."""
