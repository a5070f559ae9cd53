"""Protects the choice of tokens: noise that is a pure function of its keys and looks random, and
truncation as transformers does it (its warpers are the oracle), drawn by inverse CDF in float64.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from executor.generate.sampling import SamplingParams, sample, uniform
from profiles.errors import ConfigError

N = 100_000


def params(**changes: object) -> SamplingParams:
    return SamplingParams(**{"max_new_tokens": 8, **changes})  # type: ignore[arg-type]


def random_logits(rows: int, vocab: int, spread: float, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return spread * torch.randn(rows, vocab, generator=generator)


def random_u(n: int, seed: int = 1) -> Tensor:
    return torch.rand(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ---- noise ----------------------------------------------------------------------------------


WORD = 1 << 64
GAMMA = 0x9E3779B97F4A7C15


def plain_mix(z: int) -> int:
    """splitmix64's finalizer in integers of unlimited size."""
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % WORD
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % WORD
    return z ^ (z >> 31)


def plain_uniform(seed: int, step: int, sample: int, position: int) -> float:
    state = 0
    for key in (seed, step, sample, position):
        state = plain_mix(((state ^ (key % WORD)) + GAMMA) % WORD)
    return (state >> 11) / 2**53


def test_noise_is_the_hash_in_unsigned_integers():
    keys = [(0, 0, 0, 0), (1, 2, 3, 4), (-7, 10**9, 2**40, 131071), (2**70 + 1, 3, 511, 1)]
    for seed, step, place, position in keys:
        got = uniform(seed, step, torch.tensor([place]), torch.tensor([position]))
        assert got.tolist() == [plain_uniform(seed, step, place, position)]


def test_the_oracle_is_splitmix64():
    # First outputs from state 0 of Vigna's reference implementation.
    assert plain_mix(GAMMA) == 0xE220A8397B1DCDAF
    assert plain_mix(2 * GAMMA % WORD) == 0x6E789E6AA1B965F4


GRIDS = {
    "positions": (torch.zeros(N, dtype=torch.long), torch.arange(N)),
    "samples": (torch.arange(N), torch.zeros(N, dtype=torch.long)),
    "both": (torch.arange(N) // 250, torch.arange(N) % 250),
}


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("seed, step", [(0, 0), (1, 0), (0, 1), (123456789, 77)])
def test_noise_is_uniform_by_kolmogorov_and_smirnov(grid, seed, step):
    u = uniform(seed, step, *GRIDS[grid]).sort().values
    places = torch.arange(N + 1, dtype=torch.float64) / N
    distance = torch.maximum(u - places[:-1], places[1:] - u).max()
    assert distance < 1.95 / math.sqrt(N)  # exceeded once in a thousand times
    assert u.min() >= 0
    assert u.max() < 1


@pytest.mark.parametrize("neighbour", ["seed", "step", "sample", "position"])
def test_neighbouring_keys_give_unrelated_noise(neighbour):
    samples, positions = GRIDS["both"]
    one = uniform(5, 3, samples, positions)
    other = uniform(
        5 + (neighbour == "seed"),
        3 + (neighbour == "step"),
        samples + (neighbour == "sample"),
        positions + (neighbour == "position"),
    )
    assert torch.corrcoef(torch.stack((one, other)))[0, 1].abs() < 4 / math.sqrt(N)
    # Pairs fall evenly on a 16 x 16 board: chi-square with 255 degrees of freedom, 0.1 %.
    cells = torch.bincount((one * 16).long() * 16 + (other * 16).long(), minlength=256)
    assert ((cells - N / 256) ** 2 / (N / 256)).sum() < 330.5


def test_keys_do_not_collide_or_commute():
    samples, positions = torch.meshgrid(torch.arange(700), torch.arange(700), indexing="ij")
    u = uniform(1, 2, samples.flatten(), positions.flatten())
    assert len(u.unique()) == 490_000
    assert (
        uniform(1, 2, samples[:1, :9], positions[:1, :9])
        .ne(uniform(2, 1, samples[:1, :9], positions[:1, :9]))
        .all()
    )


# ---- truncation and draw ----------------------------------------------------------------------


def warped(logits: Tensor, setting: SamplingParams) -> Tensor:
    """Oracle: transformers' chain of warpers, in float64."""
    ids = torch.zeros(len(logits), 1, dtype=torch.long)
    scores = TemperatureLogitsWarper(setting.temperature)(ids, logits.double())
    if setting.top_k:
        scores = TopKLogitsWarper(setting.top_k)(ids, scores)
    if setting.top_p < 1:
        scores = TopPLogitsWarper(setting.top_p)(ids, scores)
    return scores


SETTINGS = [
    {},
    {"temperature": 0.6},
    {"top_k": 1},
    {"top_k": 5},
    {"top_k": 100_000},
    {"top_p": 0.9},
    {"top_p": 0.3, "temperature": 1.7},
    {"top_p": 1e-6},
    {"top_k": 20, "top_p": 0.8},
    {"top_k": 3, "top_p": 0.999, "temperature": 0.5},
]


@pytest.mark.parametrize(
    "vocab, spread", [(3, 1.0), (50, 2.0), (1009, 0.1), (6000, 0.5), (6000, 4)]
)
@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_tokens_are_the_inverse_cdf_of_transformers_warped_probabilities(setting, vocab, spread):
    setting = params(**setting)
    logits, rows = random_logits(24, vocab, spread).repeat_interleave(8, 0), 24 * 8
    before = logits.clone()
    u = random_u(rows)
    tokens, log_probs = sample(logits, u, setting)
    cumulative = warped(logits, setting).softmax(-1).cumsum(-1)
    expected = (cumulative <= u[:, None] * cumulative[:, -1:]).sum(-1)
    # Float32 exponentials move the borders between tokens by about 1e-7.
    unsure = (cumulative - u[:, None]).abs().min(-1).values < 1e-6
    assert unsure.float().mean() < 0.1
    assert torch.equal(tokens[~unsure], expected[~unsure])
    full = (logits.double() / setting.temperature).log_softmax(-1)
    assert (log_probs.double() - full.gather(1, tokens[:, None])[:, 0]).abs().max() < 5e-6
    assert torch.equal(logits, before)


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_support_is_what_transformers_warpers_keep(setting):
    setting = params(**setting)
    logits = random_logits(1, 40, 1.5, seed=4)
    u = (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000
    tokens, _ = sample(logits.expand(len(u), -1), u, setting)
    kept = warped(logits, setting)[0]
    likely = kept.softmax(-1) > 1e-4  # a grid of 20,000 finds all of these
    assert set(likely.nonzero()[:, 0].tolist()) <= set(tokens.tolist())
    assert set(tokens.tolist()) <= set(kept.isfinite().nonzero()[:, 0].tolist())


def test_tokens_of_equal_logit_stay_together():
    logits = torch.tensor([[0.0, 2.0, 2.0, 2.0, 1.0]]).expand(300, -1)
    u = torch.arange(300, dtype=torch.float64) / 300
    for setting in ({"top_k": 2}, {"top_p": 0.4}, {"top_k": 2, "top_p": 0.9}):
        tokens, _ = sample(logits, u, params(**setting))
        assert set(tokens.tolist()) == {1, 2, 3}, setting


@pytest.mark.parametrize("setting", [{}, {"top_k": 3}, {"top_p": 0.9}], ids=str)
@pytest.mark.parametrize("vocab", [5, 64, 1000, 49_152])
def test_ends_of_the_unit_interval_never_leave_the_support(setting, vocab):
    # All mass within, and zero probability at both ends of the vocabulary.
    logits = torch.full((2, vocab), -math.inf)
    logits[:, 1:-1] = random_logits(2, vocab - 2, 1.0)
    almost_one = 1 - 2.0**-53
    tokens, _ = sample(logits, torch.tensor([0.0, almost_one]).double(), params(**setting))
    support = warped(logits, params(**setting)).isfinite()
    assert tokens[0] == support[0].nonzero().min()
    assert tokens[1] == support[1].nonzero().max()
    # Beyond what `uniform` gives, as if rounding had reached 1.
    tokens, _ = sample(logits, torch.ones(2).double(), params(**setting))
    assert support[torch.arange(2), tokens].all()


def test_frequencies_are_the_probabilities():
    logits = torch.tensor([[1.0, -2.0, 0.5, 3.0, 0.0, 2.0, -1.0, 2.5, 1.5, -0.5]])
    u = uniform(3, 1, torch.arange(N), torch.full((N,), 17))
    for setting, dof_bound in (({}, 27.9), ({"top_k": 6, "temperature": 1.3}, 20.5)):
        chosen, _ = sample(logits.expand(N, -1), u, params(**setting))
        expected = N * warped(logits, params(**setting)).softmax(-1)[0]
        counts = torch.bincount(chosen, minlength=10)
        live = expected > 0
        assert counts[~live].sum() == 0
        chi_square = ((counts - expected) ** 2 / expected)[live].sum()
        assert chi_square < dof_bound  # 0.1 % with 9 and with 5 degrees of freedom


@pytest.mark.parametrize("greedy", [True, False])
def test_forbidden_stop_tokens_are_not_drawn_but_counted(greedy):
    logits = random_logits(400, 30, 1.0)
    logits[:, 7] += 6
    allow = torch.arange(400) % 2 == 0
    setting = params(stop_token_ids=(7, 3, 7), min_new_tokens=2, greedy=greedy, top_k=4)
    tokens, log_probs = sample(logits, random_u(400), setting, allow)
    assert not set(tokens[~allow].tolist()) & {3, 7}
    assert (tokens[allow] == 7).float().mean() > 0.8
    full = logits.double().log_softmax(-1).gather(1, tokens[:, None])[:, 0]
    assert (log_probs - full).abs().max() < 5e-6
    # What is left has its own top-k: a row may draw any of its four best other tokens.
    others = logits.clone()
    others[:, [3, 7]] = -math.inf
    best = others.topk(4).indices
    assert (tokens[:, None] == best).any(-1)[~allow].all()


def test_greedy_takes_the_largest_and_ignores_the_noise():
    logits = random_logits(50, 333, 1.0)
    tokens, _ = sample(logits, random_u(50), params(greedy=True, top_k=5, temperature=3.0))
    assert torch.equal(tokens, logits.argmax(-1))


def test_bf16_logits_are_drawn_in_float32():
    logits = random_logits(50, 333, 1.0).bfloat16()
    u = random_u(50)
    got, expected = sample(logits, u, params()), sample(logits.float(), u, params())
    assert torch.equal(got[0], expected[0])
    assert torch.equal(got[1], expected[1])


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"max_new_tokens": 0}, "max_new_tokens is 0, not a whole number of at least 1"),
        ({"max_new_tokens": 2.0}, "max_new_tokens is 2.0"),
        ({"min_new_tokens": -1}, "min_new_tokens is -1"),
        ({"min_new_tokens": 9}, "min_new_tokens is 9, not at most max_new_tokens = 8"),
        ({"temperature": 0.0}, "temperature is 0.0, not above 0; .*greedy=true"),
        ({"temperature": math.nan}, "temperature is nan"),
        ({"top_k": -1}, "top_k is -1"),
        ({"top_k": True}, "top_k is True"),
        ({"top_p": 0.0}, r"top_p is 0.0, not in \(0, 1\]"),
        ({"top_p": 1.5}, "top_p is 1.5"),
        ({"stop_token_ids": [1]}, r"stop_token_ids is \[1\], not a tuple"),
        ({"stop_token_ids": (-1,)}, r"stop_token_ids is \(-1,\)"),
    ],
)
def test_wrong_values_are_named(changes, message):
    with pytest.raises(ConfigError, match=f"generation: {message}"):
        params(**changes)
