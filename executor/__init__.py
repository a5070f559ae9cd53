"""Part of the distribution ``realplan``: runs plans on torch.distributed (extra ``executor``).

Read ``worker.py`` first: it interprets a rank's program; ``run.py`` is what comes before it.
"""
