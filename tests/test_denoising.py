"""Schedules, rules and sampling, on made-up predictions."""

import math

import numpy as np
import pytest
import torch
from perceptiondlm.generation_loop import Sampler, denoise, keep_top_k, keep_top_p
from perceptiondlm.generation_options import DiffusionOptions
from perceptiondlm.generation_rules import (
    Adaptive,
    EntropyBound,
    Factor,
    Prediction,
    RemaskLowConfidence,
    SemiAutoregressive,
    State,
    StopAt,
    Threshold,
)
from scipy.stats import chisquare

MASK, EOT = 50, 51
VOCAB = 52


def blank(groups: int, n: int, batch: int = 1) -> State:
    shape = (batch, groups, n)
    return State(
        torch.full(shape, MASK),
        torch.ones(shape, dtype=torch.bool),
        torch.ones(shape, dtype=torch.bool),
    )


def prediction(confidence, tokens=None) -> Prediction:
    """Given probabilities (groups, n) of the candidates; the others share the rest."""
    confidence = torch.tensor([confidence], dtype=torch.float64)
    tokens = torch.arange(confidence.numel()).view(confidence.shape) if tokens is None else tokens
    rest = ((1 - confidence) / (VOCAB - 1)).log()
    logits = rest[..., None].repeat(1, 1, 1, VOCAB)
    logits.scatter_(-1, tokens[..., None], confidence.log()[..., None])
    return Prediction(logits, tokens, confidence)


def fixed(confidence, tokens=None):
    """A network that always predicts the same."""
    made = prediction(confidence, tokens)
    return lambda current, step: made.logits.float()


class Noise:
    """A network of random logits that depend on the step and all current tokens; counts calls."""

    def __init__(self, seed: int, scale: float = 3.0):
        self.seed, self.scale, self.calls = seed, scale, []

    def __call__(self, tokens, step):
        self.calls.append(tokens.clone())
        rows = []
        for row in tokens.flatten(1).tolist():
            generator = torch.Generator().manual_seed(hash((self.seed, step, *row)) % 2**31)
            rows.append(torch.randn(*tokens.shape[1:], VOCAB, generator=generator) * self.scale)
        return torch.stack(rows)


def drawn(seed: int):
    """Uniform draws of one generator."""
    generator = torch.Generator().manual_seed(seed)
    return lambda shape, dtype: torch.rand(shape, generator=generator, dtype=dtype)


def run(predict, state, rule, sampler=None, **options):
    return denoise(predict, state, rule, sampler or Sampler(), MASK, **options)[:2]


def history(predict, state, rule, **options):
    seen = []
    run(predict, state, rule, on_step=lambda step, now: seen.append(now), **options)
    return seen


# The released rules.


@pytest.mark.parametrize(("positions", "steps"), [(24, 8), (12, 24), (7, 3), (5, 5), (3, 1)])
def test_joint_remasking_equals_the_plain_loop(positions, steps):
    network = Noise(seed=positions)
    state, forwards = run(network, blank(1, positions), RemaskLowConfidence(steps))
    tokens, masked, calls = [MASK] * positions, set(range(positions)), 0
    plain = Noise(seed=positions)
    for step in range(steps):
        if not masked:
            break
        calls += 1
        probabilities = plain(torch.tensor([[tokens]]), step)[0, 0].double().softmax(-1)
        confidence, best = probabilities.max(-1)
        for i in masked:
            tokens[i] = int(best[i])
        count = int(positions * ((steps - 1 - step) / steps))
        masked = set(sorted(range(positions), key=lambda i: float(confidence[i]))[:count])
        for i in masked:
            tokens[i] = MASK
    assert state.tokens.flatten().tolist() == tokens
    assert not state.masked.any()
    assert int(forwards) == calls


@pytest.mark.parametrize(("positions", "steps"), [(12, 4), (12, 6), (9, 9), (10, 3)])
def test_joint_remasking_commits_the_mask_token_like_any_other(positions, steps):
    """After step s exactly the int(N (S - 1 - s) / S) least confident of N positions are filled
    anew; any other keeps its token, the mask token too."""
    noise = Noise(seed=positions + steps)

    def prefers_masks(tokens, step):
        logits = noise(tokens, step)
        logits[..., ::3, MASK] += 9.0 * ((step + tokens.sum()) % 2)
        return logits

    state, _ = run(prefers_masks, blank(1, positions), RemaskLowConfidence(steps))
    tokens, filled_anew = [MASK] * positions, list(range(positions))
    for step in range(steps):
        probabilities = prefers_masks(torch.tensor([[tokens]]), step)[0, 0].double().softmax(-1)
        for i in filled_anew:
            tokens[i] = int(probabilities[i].argmax())
        count = int(positions * ((steps - 1 - step) / steps))
        by_confidence = sorted(range(positions), key=lambda i: float(probabilities[i].max()))
        filled_anew = by_confidence[:count]
        for i in filled_anew:
            tokens[i] = MASK
    assert MASK in tokens
    assert state.tokens.flatten().tolist() == tokens


@pytest.mark.parametrize("rule", [RemaskLowConfidence(200), SemiAutoregressive(200, 6, 1)])
def test_no_state_is_shown_to_the_network_twice_where_steps_do_not_matter(rule):
    noise = Noise(seed=3)

    def at_any_step(tokens, step):
        logits = noise(tokens, 0)
        logits[..., ::2, MASK] += 4.0
        return logits

    plain, all_forwards = run(at_any_step, blank(1, 6, batch=2), rule)
    noise.calls.clear()
    state, forwards = run(at_any_step, blank(1, 6, batch=2), rule, depends_on_step=False)
    seen = [tuple(map(tuple, call.flatten(1).tolist())) for call in noise.calls]
    assert torch.equal(state.tokens, plain.tokens) and torch.equal(state.masked, plain.masked)
    assert len(set(seen)) == len(seen) < int(all_forwards.max())
    for row in range(2):
        assert int(forwards[row]) == len({call[row] for call in seen})


def test_every_step_is_run_where_the_choice_is_drawn():
    sampler = Sampler(temperature=1.0, noise=drawn(0))
    _, forwards = run(
        fixed([[0.5, 0.4, 0.3]]),
        blank(1, 3),
        RemaskLowConfidence(9),
        sampler,
        depends_on_step=False,
    )
    assert int(forwards) == 7


def test_joint_remasking_stops_when_nothing_is_masked():
    """4 positions and 32 steps: int(4 (31 - s) / 32) is 0 from step 24 on."""
    state, forwards = run(Noise(1), blank(1, 4), RemaskLowConfidence(32))
    assert not state.masked.any()
    assert int(forwards) == 25


def test_joint_remasking_ranks_all_captions_of_a_pass_together():
    sure, unsure = [0.9, 0.91, 0.92, 0.93], [0.1, 0.11, 0.12, 0.13]
    first = history(fixed([sure, unsure]), blank(2, 4), RemaskLowConfidence(2))[0]
    assert first.masked.tolist() == [[[False] * 4, [True] * 4]]


def test_joint_remasking_by_region_ranks_each_caption_alone():
    sure, unsure = [0.9, 0.91, 0.92, 0.93], [0.1, 0.11, 0.12, 0.13]
    first = history(fixed([sure, unsure]), blank(2, 4), RemaskLowConfidence(2, "region"))[0]
    assert first.masked.tolist() == [[[True, True, False, False]] * 2]


def test_a_committed_position_keeps_its_token_until_it_is_masked_again():
    """Position 0 is taken at 0.9, then another token is the likeliest: 0 stays as long as that
    one's probability is not among the lowest."""
    first, second = prediction([[0.9, 0.2, 0.3]]), prediction([[0.8, 0.7, 0.6]])
    second.logits[0, 0, 0] = second.logits[0, 0, 0].roll(5)
    logits = [first.logits, second.logits, second.logits]
    states = history(lambda tokens, step: logits[step], blank(1, 3), RemaskLowConfidence(3))
    assert states[0].tokens.tolist() == [[[0, MASK, MASK]]]
    assert states[1].tokens.tolist() == [[[0, 1, MASK]]]
    assert states[2].tokens.tolist() == [[[0, 1, 2]]]


def test_a_position_whose_best_guess_gets_doubtful_is_masked_again():
    early, late = prediction([[0.9, 0.2, 0.3]]), prediction([[0.1, 0.7, 0.6]])
    logits = [early.logits, late.logits, late.logits]
    states = history(lambda tokens, step: logits[step], blank(1, 3), RemaskLowConfidence(3))
    assert states[0].tokens.tolist() == [[[0, MASK, MASK]]]
    assert states[1].tokens.tolist() == [[[MASK, 1, 2]]]


def test_groups_that_pad_a_batch_are_not_counted():
    state = blank(2, 4)
    state.valid[:, 1] = False
    state.masked &= state.valid
    padded = history(fixed([[0.4, 0.3, 0.2, 0.1]] * 2), state, RemaskLowConfidence(2))
    alone = history(fixed([[0.4, 0.3, 0.2, 0.1]]), blank(1, 4), RemaskLowConfidence(2))
    for got, expected in zip(padded, alone, strict=True):
        assert torch.equal(got.tokens[:, :1], expected.tokens)
        assert torch.equal(got.masked[:, :1], expected.masked)
        assert not got.masked[:, 1].any()


@pytest.mark.parametrize(
    ("length", "block", "steps"), [(14, 14, 4), (16, 4, 8), (12, 6, 8), (6, 3, 8), (5, 5, 1)]
)
def test_block_commit_equals_the_plain_loop(length, block, steps):
    network, plain = Noise(seed=length), Noise(seed=length)
    rule = SemiAutoregressive(steps, block, length // block)
    state, _ = run(network, blank(1, length), rule, Sampler(suppressed=torch.tensor([MASK])))
    tokens, step = [MASK] * length, 0
    each = steps // (length // block)
    for first in range(0, length, block):
        left = list(range(first, first + block))
        for i in range(each):
            if not left and not any(t == MASK for t in tokens):
                break
            logits = plain(torch.tensor([[tokens]]), step)[0, 0].double()
            logits[:, MASK] = -math.inf
            probabilities = logits.softmax(-1)
            confidence, best = probabilities.max(-1)
            quota = block // each + (1 if i < block % each else 0)
            for place in sorted(left, key=lambda p: -float(confidence[p]))[:quota]:
                tokens[place] = int(best[place])
                left.remove(place)
            step += 1
    assert state.tokens.flatten().tolist() == tokens


def test_block_commit_never_looks_ahead():
    states = history(fixed([[0.1, 0.2, 0.8, 0.9]]), blank(1, 4), SemiAutoregressive(4, 2, 2))
    assert [s.tokens.flatten().tolist() for s in states] == [
        [MASK, 1, MASK, MASK],
        [0, 1, MASK, MASK],
        [0, 1, MASK, 3],
        [0, 1, 2, 3],
    ]


def test_equal_confidences_commit_by_position():
    states = history(fixed([[0.5] * 4]), blank(1, 4), SemiAutoregressive(4, 4, 1))
    assert [int(s.masked.sum()) for s in states] == [3, 2, 1, 0]
    assert states[0].masked.tolist() == [[[False, True, True, True]]]


def test_a_mask_token_may_be_decoded_again_within_the_schedule():
    """Position 1 wants the mask token first; told to retry, the rule gives it another go when
    another position's turn has come, and leaves what is never decoded masked."""
    stubborn = torch.tensor([[[0, MASK, 2, 3]]])
    yielding = torch.tensor([[[0, 1, 2, 3]]])
    confidence = [[0.4, 0.9, 0.3, 0.2]]
    logits = [prediction(confidence, t).logits for t in (stubborn, stubborn, yielding, yielding)]
    rule = SemiAutoregressive(4, 4, 1)
    states = history(lambda tokens, step: logits[step], blank(1, 4), rule)
    left = [s.masked.flatten().tolist() for s in states]
    assert left[:2] == [[True] * 4] * 2
    assert states[2].tokens.tolist() == [[[MASK, 1, MASK, MASK]]]
    assert states[3].tokens.tolist() == [[[0, 1, MASK, MASK]]]


def test_a_block_left_unfinished_is_gone_on_with_in_the_next():
    stubborn = torch.tensor([[[0, MASK, 2, 3]]])
    yielding = torch.tensor([[[0, 1, 2, 3]]])
    confidence = [[0.4, 0.9, 0.3, 0.2]]
    logits = [prediction(confidence, t).logits for t in (stubborn, stubborn, yielding, yielding)]
    rule = SemiAutoregressive(4, 2, 2)
    states = history(lambda tokens, step: logits[step], blank(1, 4), rule)
    assert states[1].tokens.tolist() == [[[MASK] * 4]]
    assert states[3].tokens.tolist() == [[[0, 1, MASK, MASK]]]


# Stop sequences.


def test_after_a_stop_only_positions_before_it_are_decoded():
    """The sequence 5 6 is committed first; what stands behind it stays masked."""
    tokens = torch.tensor([[[1, 2, 5, 6, 3, 4]]])
    predict = fixed([[0.1, 0.2, 0.8, 0.9, 0.3, 0.4]], tokens)
    rule = StopAt(SemiAutoregressive(6, 6, 1), ((5, 6),))
    state, forwards = run(predict, blank(1, 6), rule)
    assert state.tokens.tolist() == [[[1, 2, 5, 6, MASK, MASK]]]
    assert int(forwards) == 4


def test_the_earliest_of_several_stops_counts():
    tokens = torch.tensor([[[1, 7, 2, 5, 6, 4]]])
    predict = fixed([[0.1, 0.7, 0.2, 0.8, 0.9, 0.3]], tokens)
    state, _ = run(predict, blank(1, 6), StopAt(SemiAutoregressive(6, 6, 1), ((5, 6), (7,))))
    assert state.tokens.tolist() == [[[1, 7, MASK, 5, 6, MASK]]]


def test_a_stop_that_never_comes_changes_nothing():
    for stop in ((40, 41), tuple(range(9))):
        stopped, _ = run(Noise(1), blank(1, 6), StopAt(SemiAutoregressive(3, 3, 2), (stop,)))
        plain, _ = run(Noise(1), blank(1, 6), SemiAutoregressive(4, 3, 2))
        assert not stopped.masked.any()
        assert stopped.tokens.shape == plain.tokens.shape


# Adaptive rules.


def test_threshold_commits_what_is_sure_enough():
    rule = Adaptive(4, Threshold(0.8), 4)
    first = history(fixed([[0.9, 0.3, 0.81, 0.7]]), blank(1, 4), rule)[0]
    assert first.masked.tolist() == [[[False, True, False, True]]]


@pytest.mark.parametrize("value", [0.3, 1.0, 2.0])
def test_factor_commits_the_longest_prefix_by_its_inequality(value):
    confidence = [0.99, 0.7, 0.95, 0.9, 0.2]
    accepted = Factor(value)(prediction([confidence]), torch.ones(1, 1, 5, dtype=torch.bool))
    ordered, count = sorted(confidence, reverse=True), 0
    while count < 5 and (count + 2) * (1 - ordered[count]) < value:
        count += 1
    assert sorted(np.array(confidence)[accepted[0, 0].numpy()]) == sorted(ordered[:count])


@pytest.mark.parametrize("value", [0.0, 0.5, 1.2, 3.0, 99.0])
def test_entropy_bound_commits_while_all_but_the_largest_fit(value):
    confidence = [0.99, 0.7, 0.95, 0.9, 0.55]
    made = prediction([confidence])
    entropies = [-c * math.log(c) - (1 - c) * math.log((1 - c) / (VOCAB - 1)) for c in confidence]
    assert made.entropy()[0, 0].tolist() == pytest.approx(entropies)
    accepted = EntropyBound(value)(made, torch.ones(1, 1, 5, dtype=torch.bool))[0, 0]
    chosen, order = set(), sorted(range(5), key=lambda i: entropies[i])
    for place, i in enumerate(order):
        if sum(entropies[j] for j in order[:place]) <= value:
            chosen.add(i)
    assert set(torch.where(accepted)[0].tolist()) == chosen


@pytest.mark.parametrize("accept", [Threshold(0.0), Factor(100.0), EntropyBound(100.0)])
def test_only_eligible_positions_are_accepted(accept):
    eligible = torch.tensor([[[True, False, True, False]]])
    accepted = accept(prediction([[0.9, 0.9, 0.8, 0.7]]), eligible)
    assert torch.equal(accepted, eligible)


@pytest.mark.parametrize("accept", [Threshold(1.0), Factor(0.0), EntropyBound(0.0)])
@pytest.mark.parametrize("steps", [1, 3, 7, 50])
def test_the_budget_is_kept_however_unsure(accept, steps):
    state, forwards = run(Noise(3, scale=0.1), blank(3, 8), Adaptive(steps, accept, 8))
    assert not state.masked.any()
    assert int(forwards) <= min(steps, 8)


@pytest.mark.parametrize("block", [2, 3, 8])
def test_the_budget_is_kept_across_blocks(block):
    state, forwards = run(Noise(3, scale=0.1), blank(2, 8), Adaptive(3, Threshold(1.0), block))
    assert not state.masked.any() and int(forwards) <= 3


def test_no_group_starves_another():
    """One region is always surer than the other; both move at every step."""
    predict = fixed([[0.7] * 6, [0.05] * 6])
    states = history(predict, blank(2, 6), Adaptive(6, Threshold(0.9), 6))
    left = [s.masked.sum(-1)[0].tolist() for s in states]
    assert left == [[5, 5], [4, 4], [3, 3], [2, 2], [1, 1], [0, 0]]


def test_a_group_ends_at_its_end_of_turn():
    tokens = torch.tensor([[[1, EOT, 2, 3], [4, 5, 6, 7]]])
    predict = fixed([[0.3, 0.9, 0.2, 0.1], [0.4, 0.3, 0.2, 0.1]], tokens)
    states = history(predict, blank(2, 4), Adaptive(4, Threshold(0.8), 4, EOT))
    assert states[0].tokens.tolist()[0][0] == [MASK, EOT, EOT, EOT]
    assert states[-1].tokens.tolist() == [[[1, EOT, EOT, EOT], [4, 5, 6, 7]]]
    unending = Adaptive(4, Threshold(0.8), 4, None)
    assert run(predict, blank(2, 4), unending)[0].tokens.tolist()[0][0] == [1, EOT, 2, 3]


def test_all_sure_finishes_in_one_pass():
    _, forwards = run(fixed([[0.99] * 4] * 3), blank(3, 4), Adaptive(32, Threshold(0.9), 4))
    assert int(forwards) == 1


def test_passes_of_a_batch_finish_apart():
    sure, unsure = fixed([[0.99] * 4]), fixed([[0.1] * 4])
    both = torch.cat([sure(None, 0), unsure(None, 0)])
    seen = []
    state, forwards, _ = denoise(
        lambda tokens, step: both,
        blank(1, 4, batch=2),
        Adaptive(4, Threshold(0.9), 4),
        Sampler(),
        MASK,
        on_step=lambda step, now: seen.append(now.tokens[0].clone()),
    )
    assert forwards.tolist() == [1, 4]
    assert all(torch.equal(tokens, seen[0]) for tokens in seen)


def test_verify_masks_what_is_no_longer_believed():
    early, late = prediction([[0.95, 0.2, 0.3, 0.1]]), prediction([[0.95, 0.6, 0.3, 0.1]])
    late.logits[0, 0, 0] = late.logits[0, 0, 0].roll(5)  # token 0 of position 0 is believed no more
    logits = [early.logits] + [late.logits] * 9
    predict = lambda tokens, step: logits[step]  # noqa: E731
    without = history(predict, blank(1, 4), Adaptive(8, Threshold(0.9), 4))
    doubting = history(predict, blank(1, 4), Adaptive(8, Threshold(0.9), 4, remask_below=0.5))
    assert not without[1].masked[0, 0, 0] and bool(doubting[1].masked[0, 0, 0])
    assert int(without[-1].tokens[0, 0, 0]) == 0 and int(doubting[-1].tokens[0, 0, 0]) == 5
    assert not doubting[-1].masked.any()


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_verify_keeps_the_budget(steps):
    rule = Adaptive(steps, Threshold(0.5), 8, remask_below=1.0)
    state, forwards = run(Noise(9), blank(2, 8), rule)
    assert not state.masked.any() and int(forwards) <= steps


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"threshold": 0.8}, Threshold(0.8)),
        ({"factor": 2}, Factor(2.0)),
        ({"entropy_bound": 0.5}, EntropyBound(0.5)),
    ],
)
def test_rules_are_chosen_by_option(options, expected):
    assert DiffusionOptions(**options).region_rule("image", EOT).accept == expected


# Sampling.


def logits_of(*shape, seed=0, scale=2.0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


def test_greedy_takes_the_argmax_and_its_probability():
    logits = logits_of(2, 3, 4, VOCAB)
    made = Sampler()(logits)
    probabilities = logits.double().softmax(-1)
    assert torch.equal(made.tokens, probabilities.argmax(-1))
    assert torch.allclose(made.confidence, probabilities.max(-1).values)


def test_probabilities_near_one_are_told_apart_in_single_precision():
    logits = torch.zeros(1, 1, 6, 500)
    logits[..., 0] = torch.arange(18, 24)
    doubts = 1 - Sampler()(logits).confidence[0, 0]
    assert torch.allclose(doubts, 1 - logits.double().softmax(-1)[0, 0, :, 0], rtol=1e-6, atol=0)
    assert (doubts[1:] < doubts[:-1]).all()


def test_banned_tokens_are_never_chosen_and_take_no_probability():
    logits = logits_of(1, 1, 50, VOCAB)
    banned = logits.argmax(-1).unique()
    made = Sampler(suppressed=banned)(logits)
    rest = [i for i in range(VOCAB) if i not in set(banned.tolist())]
    probabilities = logits[..., rest].double().softmax(-1)
    assert torch.equal(made.tokens, torch.tensor(rest)[probabilities.argmax(-1)])
    assert torch.allclose(made.confidence, probabilities.max(-1).values)


def test_temperature_follows_lladas_formula():
    logits = logits_of(1, 2, 5, VOCAB)
    made = Sampler(temperature=0.7, noise=drawn(3))(logits)
    uniform = torch.rand(
        logits.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64
    )
    expected = (logits.double().exp() / (-uniform.log()) ** 0.7).argmax(-1)
    assert torch.equal(made.tokens, expected)
    chosen = logits.double().softmax(-1).gather(-1, expected[..., None])[..., 0]
    assert torch.allclose(made.confidence, chosen)


def test_temperature_one_samples_the_softmax():
    logits = logits_of(1, 1, 1, 6, scale=1.0)
    draws = Sampler(temperature=1.0, noise=drawn(0))(logits.expand(1, 1, 20_000, 6)).tokens
    counts = torch.bincount(draws.flatten(), minlength=6).numpy()
    expected = logits.flatten().double().softmax(-1).numpy() * 20_000
    assert chisquare(counts, expected).pvalue > 1e-3


def test_loud_logits_do_not_overflow():
    made = Sampler(temperature=1.0, noise=drawn(0))(logits_of(1, 1, 9, VOCAB, scale=1e4))
    assert bool(made.confidence.isfinite().all())


@pytest.mark.parametrize("k", [1, 3, VOCAB, 1000])
def test_top_k_keeps_the_k_likeliest(k):
    logits = logits_of(2, 3, VOCAB)
    kept = keep_top_k(logits, k).isfinite().numpy()
    for row, mask in zip(logits.numpy().reshape(-1, VOCAB), kept.reshape(-1, VOCAB), strict=True):
        assert set(np.where(mask)[0]) == set(np.argsort(-row)[:k])


@pytest.mark.parametrize("p", [1e-9, 0.3, 0.9, 1.0])
def test_top_p_keeps_the_likeliest_until_they_hold_p(p):
    logits = logits_of(2, 3, VOCAB)
    kept = keep_top_p(logits, p).isfinite().numpy()
    for row, mask in zip(logits.numpy().reshape(-1, VOCAB), kept.reshape(-1, VOCAB), strict=True):
        order = np.argsort(-row)
        probabilities = np.exp(row.astype(np.float64)[order])
        before = (
            np.cumsum(probabilities / probabilities.sum()) - probabilities / probabilities.sum()
        )
        assert set(np.where(mask)[0]) == set(order[before < p])


def test_random_confidence_is_uniform_and_repeats():
    made = [
        Sampler(remasking="random", noise=drawn(s))(logits_of(1, 1, 1000, VOCAB)) for s in (0, 0, 1)
    ]
    assert torch.equal(made[0].confidence, made[1].confidence)
    assert not torch.equal(made[0].confidence, made[2].confidence)
    assert float(made[0].confidence.mean()) == pytest.approx(0.5, abs=0.05)
    assert torch.equal(made[0].tokens, logits_of(1, 1, 1000, VOCAB).argmax(-1))


def test_the_loop_shows_the_network_masks_where_nothing_is_committed():
    network = Noise(4)
    states = history(network, blank(2, 5), RemaskLowConfidence(5))
    assert bool((network.calls[0] == MASK).all())
    for shown, state in zip(network.calls[1:], states, strict=False):
        assert torch.equal(shown == MASK, state.masked)
        assert torch.equal(shown, state.tokens)
