"""What is known before planning: shapes of models, devices, and measured or modelled costs.

Part of the distribution ``realplan``. No torch here; nothing of ours is imported from outside
this package. Read ``models.py`` and ``hardware.py``, then ``costs.py``.
"""
