"""How one model is split: tensor shards, pipeline stages, data-parallel replicas, optimizer."""
