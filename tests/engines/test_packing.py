"""Several samples in one row: nothing leaks, and no way of laying out a step changes it."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from backtalk.engines.torch import engine as torch_engine
from backtalk.engines.torch.config import TorchConfig
from backtalk.engines.torch.engine import TorchEngine
from backtalk.engines.torch.logprobs import TokenScorer
from backtalk.engines.torch.packing import Layout, packing_isolates_samples, plan_micro_batches
from backtalk.errors import ConfigError
from backtalk.objective.batch import Batch, TokenCounts
from backtalk.objective.config import ObjectiveConfig
from backtalk.objective.samples import Sample, build_samples
from backtalk.trajectory import Segment, TokenRole, Trajectory, TrajectoryGroup
from tiny import tiny_tokenizer

SMALL: dict[str, Any] = dict(vocab_size=90, hidden_size=16, num_hidden_layers=2)
HEADS: dict[str, Any] = dict(intermediate_size=24, num_attention_heads=2, num_key_value_heads=1, head_dim=8)


def sample_of(length: int) -> Sample:
    ids = torch.arange(length)
    return Sample(
        token_ids=ids, roles=torch.zeros(length, dtype=torch.int8), turns=ids.int(), sampled=ids < 0,
        sampling_logprobs=ids.float(), advantage=0.0, has_reward=True,
    )  # fmt: skip


def lengths_of(samples: list[Sample], max_tokens: int, packing: bool = True) -> list[list[list[int]]]:
    return [
        [[len(s) for s in row] for row in part] for part in plan_micro_batches(samples, max_tokens, packing=packing)
    ]


def test_first_fit_decreasing_by_hand() -> None:
    samples = [sample_of(n) for n in (3, 10, 5, 0, 2, 7, 3)]
    # Rows of 10, two of them: 10 | 7 + 3. The 5 fits into neither, so a new micro-batch has rows of 5: 5 | 3 + 2.
    assert lengths_of(samples, 20) == [[[10], [7, 3]], [[5], [3, 2]]]
    assert lengths_of(samples, 4) == [[[10]], [[7]], [[5]], [[3]], [[3]], [[2]]]
    assert lengths_of(samples, 20, packing=False) == [[[10], [7]], [[5], [3], [3], [2]]]
    uneven = [sample_of(n) for n in (3, 9, 1, 4, 4, 20, 0)]
    assert lengths_of(uneven, 12, packing=False) == [[[20]], [[9]], [[4], [4], [3]], [[1]]]
    assert lengths_of([], 20) == []


@given(st.lists(st.integers(0, 40), max_size=30), st.integers(1, 120))
@settings(deadline=None)
def test_a_plan_holds_every_sample_once_within_the_budget(lengths: list[int], max_tokens: int) -> None:
    samples = [sample_of(n) for n in lengths]
    parts = plan_micro_batches(samples, max_tokens, packing=True)
    held = [sample for part in parts for row in part for sample in row]
    assert sorted(map(id, held)) == sorted(id(s) for s in samples if len(s))
    for part in parts:
        longest = max(len(sample) for row in part for sample in row)
        assert all(sum(map(len, row)) <= longest for row in part)
        assert len(part) * longest <= max(max_tokens, longest)
    padded = sum(
        len(part) * max(len(s) for r in part for s in r)
        for part in plan_micro_batches(samples, max_tokens, packing=False)
    )
    assert sum(len(part) * max(sum(map(len, row)) for row in part) for part in parts) <= padded


def test_a_layout_by_hand() -> None:
    ids_BT = torch.tensor([[1, 2, 3, 4], [5, 6, 0, 0], [7, 0, 0, 0]])
    layout = Layout.of(ids_BT, torch.tensor([4, 2, 1]), [1, 2])
    assert layout.token_ids_RL.tolist() == [[1, 2, 3, 4], [5, 6, 7, 0]]
    assert layout.position_ids_RL is not None and layout.position_ids_RL.tolist() == [[0, 1, 2, 3], [0, 1, 0, 1]]
    assert (layout.rows_B.tolist(), layout.starts_B.tolist()) == ([0, 1, 1], [0, 0, 2])
    plain = Layout.of(ids_BT, torch.tensor([4, 2, 1]), [1, 1, 1])
    assert plain.position_ids_RL is None and plain.token_ids_RL is ids_BT


def model_of(kind: str, attention: str = "eager") -> Any:
    import transformers as tf

    torch.manual_seed(0)
    windows: dict[str, Any] = dict(sliding_window=4, use_sliding_window=True, max_window_layers=0)
    match kind:
        case "llama":
            config: Any = tf.LlamaConfig(**SMALL, **HEADS)
        case "qwen3":
            config = tf.Qwen3Config(**SMALL, **HEADS)
        case "qwen3 with windows":
            config = tf.Qwen3Config(**SMALL, **HEADS, **windows, layer_types=["sliding_attention", "full_attention"])
        case "mistral with windows":
            config = tf.MistralConfig(**SMALL, **HEADS, sliding_window=4)
        case "gemma 2":
            config = tf.Gemma2Config(**SMALL, **HEADS, sliding_window=4)
        case "gpt 2":  # absolute positions
            config = tf.GPT2Config(vocab_size=90, n_embd=16, n_layer=2, n_head=2, n_positions=64)
        case "bloom":  # positions come from the attention mask
            config = tf.BloomConfig(vocab_size=90, hidden_size=16, n_layer=2, n_head=2)
        case "mamba":  # a state along the row
            config = tf.MambaConfig(vocab_size=90, hidden_size=16, num_hidden_layers=2, state_size=4)
        case "recurrent gemma":  # a state in some layers, attention in others
            config = tf.RecurrentGemmaConfig(**SMALL, intermediate_size=24, num_attention_heads=2, lru_width=16)
        case _:
            raise AssertionError(kind)
    config._attn_implementation = attention
    return tf.AutoModelForCausalLM.from_config(config).double().eval()


APART = ("llama", "qwen3", "qwen3 with windows", "mistral with windows", "gemma 2", "gpt 2")


@pytest.mark.parametrize(
    ("kind", "attention"), [(k, a) for k in APART for a in ("sdpa", "eager") if (k, a) != ("gemma 2", "sdpa")]
)
def test_nothing_leaks_between_samples_of_a_row(kind: str, attention: str) -> None:
    model = model_of(kind, attention)
    tolerance = 1e-12 if attention == "sdpa" else 1e-6  # eager takes its softmax in float32 in a float64 model too
    scorer = TokenScorer(model, try_packing=True)
    assert scorer.packs
    lengths_B = torch.tensor([11, 6, 1, 9])
    ids_BT = torch.randint(90, (4, 11), generator=torch.Generator().manual_seed(1))
    real_BT = torch.arange(11) < lengths_B[:, None]

    def logprobs(token_ids_BT: Tensor, row_sizes: list[int]) -> Tensor:
        ones_BT = torch.ones(4, 11, dtype=torch.float64)
        arguments = dict(trained_BT=real_BT, measured_BT=real_BT, temperature_BT=ones_BT)
        return scorer.scores(token_ids_BT, lengths_B, row_sizes, **arguments).logprobs_BT

    packed, apart = logprobs(ids_BT, [1, 3]), logprobs(ids_BT, [1, 1, 1, 1])
    torch.testing.assert_close(packed, apart, rtol=0, atol=tolerance)
    others = ids_BT.clone()
    others[1] = (others[1] + 13) % 90  # the first of its row, which must not affect the others
    assert torch.equal(logprobs(others, [1, 3])[2:], packed[2:])
    assert not torch.equal(logprobs(others, [1, 3])[1], packed[1])

    embedding = model.get_input_embeddings()  # nor does any gradient cross
    kept: list[Tensor] = []
    handle = embedding.register_forward_hook(lambda module, inputs, output: kept.append(output))
    last = logprobs(ids_BT, [1, 3])[3].sum()
    handle.remove()
    (gradient_RLD,) = torch.autograd.grad(last, kept)
    assert not gradient_RLD[0].any() and not gradient_RLD[1, :7].any() and gradient_RLD[1, 7:15].any()


@pytest.mark.parametrize("kind", ["bloom", "mamba", "recurrent gemma"])
def test_models_that_leak_are_found(kind: str) -> None:
    assert not packing_isolates_samples(model_of(kind))


def test_the_probe_sees_a_leak_in_every_type() -> None:
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        assert packing_isolates_samples(model_of("qwen3").to(dtype))
        assert not packing_isolates_samples(model_of("bloom").to(dtype))


def make_samples(config: ObjectiveConfig, count: int = 8) -> list[Sample]:
    """Make rollouts of very uneven length."""
    noise = random.Random(3)

    def ids(n: int) -> tuple[int, ...]:
        return tuple(noise.randrange(7, 400) for _ in range(n))

    def trajectory(index: int) -> Trajectory:
        segments = [Segment(TokenRole.CONTEXT, ids(5))]
        for turn in range(1 + index % 3):
            n = noise.randrange(1, 6)
            segments += [
                Segment(TokenRole.ACTION, ids(n), tuple(-6.2 + noise.random() / 4 for _ in range(n)), turn=turn),
                Segment(TokenRole.TEMPLATE, ids(2), turn=turn),
                Segment(TokenRole.ENV_OUTPUT, ids(noise.randrange(1, 24)), turn=turn, tool="bash"),
            ]
        return Trajectory(task_id="t", sample_index=index, segments=tuple(segments), reward=index % 2 / 1)

    group = TrajectoryGroup("t", tuple(trajectory(i) for i in range(count)))
    return build_samples(group, config, temperature=0.8)


def step_of(engine: TorchEngine, samples: list[Sample], config: ObjectiveConfig) -> tuple[float, list[Tensor], int]:
    """Return loss and gradient of a step without an update, and its number of micro-batches."""
    engine._optimizer.zero_grad()
    losses, _, _ = engine._accumulate(samples, TokenCounts.of(samples, config.world_loss_target), config)
    grads = [p.grad.clone() for p in engine.model.parameters() if p.grad is not None]
    return losses["total_loss"], grads, len(engine._micro_batches(samples))


def wider(batch: Batch, columns: int) -> Batch:
    names = ("token_ids_BT", "roles_BT", "turns_BT", "sampled_BT", "sampling_logprobs_BT", "world_scale_BT")
    return replace(batch, **{name: torch.nn.functional.pad(getattr(batch, name), (0, columns)) for name in names})


@pytest.mark.parametrize("normalizer", ["sequence_mean", "token_mean"])
def test_no_layout_of_a_step_changes_it(model_dir: Path, normalizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Vary packing, number of micro-batches, order of the rows and amount of padding; float64."""
    config = ObjectiveConfig(world_model_coeff=0.3, policy_normalizer=normalizer, world_normalizer=normalizer)
    samples = make_samples(config)
    counts: set[int] = set()

    def check(seen: tuple[float, list[Tensor], int]) -> None:
        counts.add(seen[2])
        assert seen[0] == pytest.approx(loss, abs=1e-12)
        assert len(seen[1]) == len(grads)
        for a, b in zip(seen[1], grads, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)

    def engine_with(**settings: Any) -> TorchEngine:
        return TorchEngine(TorchConfig(model=str(model_dir), dtype="float64", device="cpu", **settings))

    loss, grads, _ = step_of(engine_with(packing="off"), samples, config)
    for packing in ("on", "off"):
        for max_tokens in (1, 64, 100, 160, 400):
            engine = engine_with(packing=packing, max_tokens_per_microbatch=max_tokens)
            check(step_of(engine, samples, config))
            check(step_of(engine, samples[::-1], config))
    assert {1, 2, 4, 8} <= counts

    collate = torch_engine.collate
    monkeypatch.setattr(torch_engine, "collate", lambda part, pad: wider(collate(part, pad), 9))
    for packing in ("on", "off"):
        check(step_of(engine_with(packing=packing, max_tokens_per_microbatch=160), samples, config))


async def test_packing_is_used_where_it_can_be(model_dir: Path) -> None:
    engine = TorchEngine(TorchConfig(model=str(model_dir), device="cpu", packing="on", max_tokens_per_microbatch=400))
    rows = [row for part in engine._micro_batches(make_samples(ObjectiveConfig())) for row in part]
    assert len(rows) < sum(map(len, rows)) == 8
    groups = [
        Trajectory(task_id="t", sample_index=0, segments=(Segment(TokenRole.CONTEXT, (9,) * n),)) for n in (4, 9, 3)
    ]
    packed = await engine.score(groups)
    padded = await TorchEngine(TorchConfig(model=str(model_dir), device="cpu", packing="off")).score(groups)
    for a, b in zip(packed, padded, strict=True):
        assert a == pytest.approx(b, abs=1e-5)
    attention = engine.model.config._attn_implementation
    assert attention == "sdpa"  # computes hidden pairs too, so padding is faster
    assert not TorchEngine(TorchConfig(model=str(model_dir), device="cpu"))._scorer.packs


def test_packing_on_is_refused_where_it_leaks(tmp_path: Path) -> None:
    import transformers as tf

    tokenizer = tiny_tokenizer()
    config = tf.BloomConfig(vocab_size=len(tokenizer), hidden_size=16, n_layer=1, n_head=2)
    tf.BloomForCausalLM(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    settings: dict[str, Any] = dict(model=str(tmp_path), device="cpu", dtype="float32")
    with pytest.raises(ConfigError, match=r"packing='on', but BloomForCausalLM.*packing='auto'"):
        TorchEngine(TorchConfig(**settings, packing="on"))
    assert not TorchEngine(TorchConfig(**settings))._scorer.packs
    with pytest.raises(ConfigError, match="packing='maybe'"):
        TorchConfig(packing="maybe")  # type: ignore[arg-type]
