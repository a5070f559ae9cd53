"""RAFT: fine-tuning on the best of n answers."""
