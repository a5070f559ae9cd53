"""The subjects of ``bench_executor.py``, a file each; ``turns.py``: how each is timed."""
