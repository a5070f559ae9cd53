"""Reward modelling on pairs (Bradley-Terry)."""
