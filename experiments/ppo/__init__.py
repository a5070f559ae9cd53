"""PPO: ``config.py`` has the options, ``graph.py`` the calls, ``functions.py`` the mathematics."""
