"""Small problems of every algorithm that can be tried out whole: oracles for the engines."""

from __future__ import annotations

import random
from dataclasses import replace
from functools import lru_cache

from planner.algorithm import find_algorithm, make_config, make_problem
from planner.memory import RESERVE_BYTES
from planner.plan import Problem
from planner.search import SearchResult, search
from planner.search.options import OptionSpace
from planner.simulate import StepPrices
from profiles.errors import InfeasibleError
from tests.planner.plans import SPEC, make_test_cluster
from tests.planner.test_algorithms import CALLS
from tests.planner.test_search import model_of

MOST_PLANS = 1_000_000
SEEDS = range(48)


def draw_problem(rng: random.Random) -> Problem:
    """Any graph, unlike models, some with experts, one to four devices of one to four nodes, any

    memory and links; on some of them offload is worth trying.
    """
    name, *overrides = rng.choice(sorted(CALLS)).split()
    spec = replace(
        SPEC, num_layers=rng.choice([1, 2, 3, 5]), ffn=rng.choice([32, 128]),
        num_kv_heads=rng.choice([1, 2, 4]), tied_embedding=rng.random() < 0.3,
    )  # fmt: skip
    if rng.random() < 0.2:
        spec = replace(spec, num_experts=rng.choice([2, 4]), experts_per_token=rng.choice([1, 2]))
    memory_bytes = RESERVE_BYTES["cpu"] + rng.choice([300, 500, 900, 2000, 9000]) * 1024
    shape = rng.choice([(1, 1), (1, 2), (2, 1), (1, 3), (1, 4), (2, 2), (4, 1)])
    cluster = make_test_cluster(*shape, memory_bytes=memory_bytes)
    if rng.random() < 0.5:  # moving weights costs as much as a call
        slow = replace(cluster.intra_link, bytes_per_s=rng.choice([1e6, 1e7]))
        cluster = replace(cluster, intra_link=slow, inter_link=slow)
    if rng.random() < 0.4:  # state of roles may be in the host's memory
        more = RESERVE_BYTES["cuda"] - RESERVE_BYTES["cpu"]
        device = replace(cluster.device, kind="cuda", memory_bytes=memory_bytes + more)
        host = replace(cluster.host_link, bytes_per_s=rng.choice([1e8, 1e9]))
        cluster = replace(cluster, device=device, host_link=host)
    found = find_algorithm(name)
    overrides += [f"batch_size={rng.choice([1, 2, 4])}", "prompt_len=16", "response_len=16"]
    if name == "ppo":
        overrides.append("ppo.num_mini_batches=1")
    config = make_config(found.config_class, overrides)
    critic = replace(spec, num_layers=rng.choice([1, 2]))
    return make_problem(found, config, model=spec, critic=critic, cluster=cluster)


@lru_cache(maxsize=64)
def instance(seed: int) -> tuple[Problem, SearchResult | None]:
    """A problem of at most ``MOST_PLANS`` plans and its best by brute force; None: nothing fits."""
    rng = random.Random(seed)
    while True:
        problem = draw_problem(rng)
        try:
            space = OptionSpace(problem, StepPrices(problem, model_of(problem)))
            if space.num_plans > MOST_PLANS:
                continue
            return problem, search(problem, model_of(problem), engine="brute", time_limit_s=600)
        except InfeasibleError:
            if rng.random() < 0.2:
                return problem, None
