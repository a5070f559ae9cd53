"""The decoder: its stages and shards (``transformer``), attention, and Hugging Face's files."""
