"""REINFORCE++ and RLOO."""
