"""The decode step as a CUDA graph, without CUDA: a tape that repeats operations on the same memory stands in for it."""

import pytest
import torch
from torch import Tensor

import families
import virft
from extras import graph
from families import FAMILIES, batch, prompts
from tape import record
from test_families import FORBIDDEN, TEMPERATURE, G

EOS = torch.arange(8, 24)  # rows end at different times


def sampled(name: str, capture=None, tokens: int = 24) -> tuple[Tensor, Tensor]:
    """Under bf16 autocast, as a rollout on a GPU does."""
    more = {"capture": capture} if capture else {}
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        noise = virft.sampling_noise(["a", "b"], G, tokens)
        return virft.sample(
            families.model(name), batch(prompts(name)), G, noise, tokens, EOS, TEMPERATURE, FORBIDDEN, **more
        )


@pytest.mark.parametrize("name", FAMILIES)
def test_the_sampler_in_bf16_differs_from_the_scorer_by_rounding(name):
    ids, sampled_logp = sampled(name)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        logp, _ = families.scored(families.model(name), batch(prompts(name)), ids, TEMPERATURE, FORBIDDEN)
    gap = (sampled_logp - logp)[virft.completion_mask(ids, EOS)].abs()
    assert gap.mean() < 0.1, gap.mean()


@pytest.mark.parametrize("name", FAMILIES)
def test_a_recorded_step_samples_the_same_tokens(name, monkeypatch, capsys):
    """Record a step once per shape, and again when the batch is halved."""
    monkeypatch.setattr(virft, "LOOK_EVERY", 6)
    recorded, replays, captured = graph.Graphs(record), [], []

    def counted(step):
        replay = record(step)
        replays.append(0)

        def count():
            replays[-1] += 1
            replay()

        return count

    recorded.record = counted

    def capture(step):
        captured.append(step)
        return recorded.capture(step)

    plain, graphed = sampled(name), sampled(name, capture)
    assert torch.equal(plain[0], graphed[0])
    torch.testing.assert_close(plain[1], graphed[1], atol=1e-6, rtol=0)
    assert recorded.works and capsys.readouterr().out == ""
    assert 1 <= len(replays) <= len(captured) and replays[0] >= 2, (len(captured), replays)
    if name == "LLaVA":
        assert len(captured) == 2, "halved once"


@pytest.mark.parametrize(
    "flaw, says", [("fails", "cannot be recorded: operation not permitted"), ("differs", "differs from the step")]
)
def test_what_cannot_be_recorded_goes_on_eagerly_and_says_so_once(flaw, says, capsys):
    tries = []

    def bad(step):
        tries.append(step)
        if flaw == "fails":
            raise RuntimeError("operation not permitted when stream is capturing\nmore lines")
        return lambda: None  # a replay that computes nothing

    recorded, plain = graph.Graphs(bad), sampled("LLaVA")
    for _ in range(2):
        graphed = sampled("LLaVA", recorded.capture)
        assert all(map(torch.equal, plain, graphed))
    assert len(tries) == 1 and not recorded.works
    out = capsys.readouterr().out
    assert out.count("\n") == 1 and says in out


def test_a_step_that_freezes_a_number_is_found(capsys):
    """What the comparison is for: Python's count of tokens, frozen when the step is recorded."""
    state, taken = torch.zeros(3), 0

    def step():
        nonlocal taken
        taken += 1
        state.add_(taken)

    advance = graph.Graphs(record).capture(step)
    for _ in range(8):
        advance()
    assert "differs" in capsys.readouterr().out


def test_what_a_step_hands_on_is_found():
    """Find state even if the step read it through a view first; leave out what it made or wrote by index_copy_."""
    state, keys, place = torch.zeros(3), torch.zeros(2, 3), torch.tensor([1])

    def step():
        seen = state[:2].sum()
        own = torch.ones(3)
        own.mul_(2)
        state.add_(own + seen)
        keys.index_copy_(0, place, state[None])

    with graph.Written() as written:
        step()
    assert len(written.tensors) == 1 and written.tensors[0] is state
