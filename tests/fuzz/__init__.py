"""Damaged files against everything that reads one."""
