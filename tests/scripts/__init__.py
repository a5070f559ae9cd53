"""Tests of what scripts/ offers."""
