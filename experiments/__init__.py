"""Part of the distribution ``realplan``: the algorithms, one folder each.

``graph.py`` and ``config.py`` of a folder are light (no torch); ``functions.py`` is the torch half.
"""
