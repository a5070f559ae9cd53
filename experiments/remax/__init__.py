"""ReMax: REINFORCE with a greedy answer as baseline."""
