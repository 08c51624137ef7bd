"""The fused head against plain logits and log-softmax, and the scorer around it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from backtalk.engines.torch import head as torch_head
from backtalk.engines.torch.head import head_logprobs
from backtalk.engines.torch.logprobs import TokenScorer, has_separate_head

N, D, V = 23, 8, 50


@pytest.fixture(params=[1000, 5, 1])  # chunk sizes: all at once, a few with a rest, one by one
def chunks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    monkeypatch.setattr(torch_head, "MAX_LOGITS", V * request.param)
    return request.param


class Case:
    """An input of the head, with plain tensor operations as the reference; float64 unless given."""

    def __init__(self, *, dtype: torch.dtype = torch.float64, bias: bool = False, frozen: bool = False) -> None:
        noise = torch.Generator().manual_seed(0)
        self.states = torch.randn(N, D, generator=noise, dtype=torch.float64).to(dtype).requires_grad_()
        self.weight = torch.randn(V, D, generator=noise, dtype=torch.float64).to(dtype).requires_grad_(not frozen)
        self.bias = torch.randn(V, generator=noise, dtype=torch.float64).to(dtype).requires_grad_() if bias else None
        self.ids = torch.randint(V, (N,), generator=noise)
        self.temperature = torch.where(torch.arange(N) % 3 == 0, 0.7, 1.0).double()
        self.upstream = torch.randn(N, generator=noise, dtype=torch.float64).masked_fill(torch.arange(N) % 4 == 1, 0)

    def plain(self) -> Tensor:
        bias = 0 if self.bias is None else self.bias.double()
        logits = (self.states.double() @ self.weight.double().T + bias) / self.temperature[:, None]
        return torch.log_softmax(logits, -1).gather(-1, self.ids[:, None])[:, 0]

    def fused(self, grad_hint: Tensor | None = None) -> Tensor:
        return head_logprobs(self.states, self.weight, self.bias, self.ids, self.temperature, grad_hint)

    def gradients(self, logprobs: Tensor, upstream: Tensor | None = None) -> list[Tensor]:
        wanted = [t for t in (self.states, self.weight, self.bias) if t is not None and t.requires_grad]
        return list(torch.autograd.grad(logprobs, wanted, (self.upstream if upstream is None else upstream)))


def assert_same(found: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a.double(), b.double(), rtol=0, atol=tolerance)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("frozen", [False, True])
def test_value_and_gradient_are_those_of_plain_logits(chunks: int, bias: bool, frozen: bool) -> None:
    case = Case(bias=bias, frozen=frozen)
    found, expected = case.fused(), case.plain()
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-13)
    assert_same(case.gradients(found), case.gradients(expected), 1e-13)
    with torch.no_grad():
        assert torch.equal(case.fused(), found)


def test_bfloat16_weights_keep_float32_sums(chunks: int) -> None:
    case = Case(dtype=torch.bfloat16)
    found, expected = case.fused(), case.plain()
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=0.1)  # logits of size 10 in steps of 1/16
    upstream = case.upstream.float()
    grads, plain = case.gradients(found, upstream), case.gradients(expected)
    assert [g.dtype for g in grads] == [torch.bfloat16, torch.bfloat16]
    for a, b in zip(grads, plain, strict=True):
        assert (a.double() - b.double()).norm() < 0.03 * b.double().norm()


@pytest.mark.parametrize("known", ["right", "some", "wrong", "nothing"])
def test_a_foreseen_gradient_changes_no_result(chunks: int, known: str) -> None:
    case = Case(bias=True)
    grad_hint = {
        "right": case.upstream,
        "some": case.upstream.masked_fill(torch.arange(N) % 2 == 0, 0),
        "wrong": case.upstream.flip(0) + 1,
        "nothing": torch.zeros(N, dtype=torch.float64),
    }[known]
    found, expected = case.fused(grad_hint), case.plain()
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-13)
    assert_same(case.gradients(found), case.gradients(expected), 1e-12)


def test_a_graph_that_is_kept_gives_the_same_twice(chunks: int) -> None:
    for case, grad_hint in ((Case(), Case().upstream), (Case(), None), (Case(frozen=True), None)):
        wanted = [t for t in (case.states, case.weight) if t.requires_grad]
        logprobs = case.fused(grad_hint)
        first = torch.autograd.grad(logprobs, wanted, case.upstream, retain_graph=True)
        again = torch.autograd.grad(logprobs, wanted, 2 * case.upstream)
        assert_same([2 * g for g in first], list(again), 1e-12)


def products(case: Case, grad_hint: Tensor | None) -> int:
    """Count matrix products in units of N rows times the head, forward and backward."""
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as seen:
        case.gradients(case.fused(grad_hint))
    rows = 0
    for event in seen.events():
        if event.name in ("aten::mm", "aten::addmm_"):
            shapes = [shape for shape in event.input_shapes if len(shape) == 2]
            sizes = {size for shape in shapes for size in shape} - {V, D}
            rows += sizes.pop()
    assert rows % N == 0
    return rows // N


def test_a_matrix_product_is_saved_where_the_gradient_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_head, "MAX_LOGITS", V * 6)
    case = Case()
    case.upstream = torch.arange(1.0, N + 1, dtype=torch.float64)
    assert products(case, case.upstream) == 3
    assert products(Case(frozen=True), None) == 2
    monkeypatch.setattr(torch_head, "MAX_LOGITS", V * N)
    assert products(case, None) == 3  # all in one chunk, whose softmax is still there
    monkeypatch.setattr(torch_head, "MAX_LOGITS", V)
    case.upstream[-1] = 0
    rows_again = N - 1  # a gradient of 0 asks for nothing
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        case.gradients(case.fused())
    assert sum(event.name in ("aten::mm", "aten::addmm_") for event in seen.events()) == N + 3 * rows_again


def test_never_more_than_a_chunk_of_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_head, "MAX_LOGITS", V * 4)
    case, largest = Case(), 0
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True, profile_memory=True) as seen:
        case.gradients(case.fused(case.upstream / 2))
    largest = max(event.cpu_memory_usage for event in seen.events() if event.name == "aten::empty")
    assert 0 < largest <= V * max(4, D) * 8  # bytes: a chunk of logits, or the gradient of the weight


def test_no_token_at_all() -> None:
    case = Case()
    none = case.states[:0]
    logprobs = head_logprobs(none, case.weight, None, case.ids[:0], case.temperature[:0])
    assert logprobs.shape == (0,)
    (gradient,) = torch.autograd.grad(logprobs.sum(), [case.weight])
    assert not gradient.any()


def scorer_of(kind: str) -> TokenScorer:
    from transformers import Gemma2Config, Gemma2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

    sizes: dict[str, Any] = dict(vocab_size=V, hidden_size=16, intermediate_size=16, num_hidden_layers=1, head_dim=8)
    heads: dict[str, Any] = dict(num_attention_heads=2, num_key_value_heads=1)
    torch.manual_seed(0)
    if kind == "capped":
        model: Any = Gemma2ForCausalLM(Gemma2Config(**sizes, **heads, final_logit_softcapping=2.0))
    else:
        model = Qwen3ForCausalLM(Qwen3Config(**sizes, **heads))
    return TokenScorer(model.double().eval(), try_packing=True)


@pytest.mark.parametrize("kind", ["plain", "capped"])
def test_scores_are_the_models_own_logits(kind: str) -> None:
    """Check value and gradient of a model that caps its logits, and of a plain one."""
    scorer = scorer_of(kind)
    assert scorer.has_separate_head == (kind == "plain") == has_separate_head(scorer.model)
    ids_BT = torch.tensor([[3, 4, 5, 6, 7], [8, 9, 10, 0, 0]])
    trained_BT = torch.tensor([[1, 1, 0, 1, 0], [0, 0, 1, 0, 0]]).bool()
    measured_BT = torch.tensor([[1, 1, 1, 1, 0], [1, 1, 1, 0, 0]]).bool()
    temperature_BT = torch.tensor([[1, 0.5, 1, 1, 1], [1, 1, 2.0, 1, 1]]).double()
    arguments = dict(trained_BT=trained_BT, measured_BT=measured_BT, temperature_BT=temperature_BT)
    scores = scorer.scores(ids_BT, torch.tensor([5, 3]), [1, 1], **arguments).keep_gradients()

    logits_BTV = scorer.model(ids_BT).logits
    expected_BT = torch.zeros(2, 5, dtype=torch.float64)
    for b, t in measured_BT.nonzero().tolist():
        if t > 0:
            row_V = torch.log_softmax(logits_BTV[b, t - 1] / temperature_BT[b, t], -1)
            expected_BT[b, t] = row_V[ids_BT[b, t]]
    torch.testing.assert_close(scores.logprobs_BT, expected_BT, rtol=0, atol=1e-12)

    trained_BT[:, 0] = False
    parameters = list(scorer.model.parameters())
    plain = torch.autograd.grad((expected_BT * trained_BT).sum(), parameters)
    scores.logprobs_BT.sum().backward()  # measured tokens have no gradient
    assert_same([p.grad for p in parameters if p.grad is not None], list(plain), 1e-12)
    assert scores.states_ND is not None and scores.states_ND.grad is not None
    assert len(scores.states_ND.grad) == 3 and scores.trained_BT.sum() == 3


def test_nothing_trained_leaves_no_graph() -> None:
    scorer, ids_BT = scorer_of("plain"), torch.tensor([[3, 4, 5]])
    ones_BT, none_BT = torch.ones(1, 3).bool(), torch.zeros(1, 3).bool()
    only_first = torch.tensor([[True, False, False]])  # nothing comes before it, so it has no probability
    for trained_BT in (none_BT, only_first):
        arguments = dict(trained_BT=trained_BT, measured_BT=ones_BT, temperature_BT=ones_BT.double())
        scores = scorer.scores(ids_BT, torch.tensor([3]), [1], **arguments)
        assert not scores.logprobs_BT.requires_grad and scores.states_ND is None
        assert scores.logprobs_BT[0, 0] == 0 and (scores.logprobs_BT[0, 1:] < 0).all()


def test_the_head_of_a_saved_model_is_its_own(tmp_path: Path) -> None:
    from backtalk.engines.torch.config import TorchConfig
    from backtalk.engines.torch.engine import TorchEngine
    from tiny import tiny_model_dir

    for tied in (True, False):
        folder = tiny_model_dir(tmp_path / str(tied), tie_word_embeddings=tied)
        engine = TorchEngine(TorchConfig(model=str(folder), device="cpu", dtype="float32"))
        assert has_separate_head(engine.model)
