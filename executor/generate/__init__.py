"""Generation: ``engine.generate`` samples answers; the cache and the sampler are its two parts."""
