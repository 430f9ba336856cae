"""The embedding target by itself: rows alone against whole tables, with every optimizer that may have them alone."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from library.options.optimizer import OptimizerConfig
from library.options.parser import parse, resolve
from library.training.ema import MovingAverage
from library.training.new_word import NewWord
from library.training.optimizers import make_optimizer
from library.training.recipes.embedding import takes_rows_alone
from library.training.targets.embedding import NUMBER_BY_NUMBER, EmbeddingTarget

WORDS, NEW, WIDTH = 50, 2, 8
PROCESSES = SimpleNamespace(all_reduce_gradients=lambda parameters: None)


class Encoder(nn.Module):
    def __init__(self, seed: int) -> None:
        super().__init__()
        self.embeddings = nn.Module()
        self.embeddings.token_embedding = nn.Embedding(WORDS + NEW, WIDTH)
        weight = torch.randn(WORDS + NEW, WIDTH, generator=torch.Generator().manual_seed(seed))
        self.embeddings.token_embedding.weight = nn.Parameter(weight, requires_grad=False)


def make(rows_alone: bool, encoders: int = 2) -> EmbeddingTarget:
    return EmbeddingTarget(
        hooks=SimpleNamespace(),
        args=None,
        accelerator=None,
        family=SimpleNamespace(),
        model=SimpleNamespace(text_encoders=[Encoder(seed) for seed in range(encoders)]),
        word=NewWord("w", ("w", "w1"), (WORDS, WORDS + 1)),
        weight_dtype=torch.float32,
        rows_alone=rows_alone,
    )


def micro_step(target: EmbeddingTarget, number: int) -> None:
    """A loss that looks at old and new rows."""
    generator = torch.Generator().manual_seed(number)
    ids = torch.tensor([3, 7, WORDS, WORDS + 1, WORDS])
    for table in target.tables:
        states = nn.functional.embedding(ids, table)
        (states * torch.randn(states.shape, generator=generator)).sum().backward()


def train(target: EmbeddingTarget, optimizer: torch.optim.Optimizer, steps: int = 3) -> list[float]:
    """Updates as the loop makes them, two micro-steps each; the norms before clipping."""
    norms = []
    for step in range(steps):
        micro_step(target, 2 * step)
        target.on_step_end()
        micro_step(target, 2 * step + 1)
        target.reduce_gradients(PROCESSES)
        norms.append(nn.utils.clip_grad_norm_(target.trainable_parameters(), 0.5).item())
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        target.on_step_end()
    return norms


@pytest.mark.parametrize("name", sorted(NUMBER_BY_NUMBER))
def test_rows_alone_learn_the_same(name: str) -> None:
    if name == "lion":
        pytest.importorskip("lion_pytorch")
    names = {"adamw": "AdamW", "sgdnesterov": "SGDNesterov", "lion": "Lion", "nadam": "NAdam", "radam": "RAdam"}
    names |= {"adam": "Adam", "adamax": "Adamax", "rmsprop": "RMSprop", "sgd": "SGD"}
    results = []
    for rows_alone in (True, False):
        target = make(rows_alone)
        before = [table.detach().clone() for table in target.tables]
        (group,), _ = target.parameter_groups()
        assert sum(p.numel() for p in group["params"]) == 2 * (NEW if rows_alone else NEW + WORDS) * WIDTH
        arguments = [] if name == "lion" else ["weight_decay=0.1"]
        config = OptimizerConfig(optimizer_type=names[name], learning_rate=0.1, optimizer_args=arguments)
        optimizer = make_optimizer([group], config).optimizer
        results.append((train(target, optimizer), target.state_dict()))
        for table, old in zip(target.tables, before, strict=True):
            assert torch.equal(table[:WORDS], old[:WORDS])
            assert not torch.equal(table[WORDS:], old[WORDS:])
            assert table.grad is None
    (norms, rows), (whole_norms, whole_rows) = results
    assert norms == pytest.approx(whole_norms, rel=1e-6)
    for key, value in whole_rows.items():
        torch.testing.assert_close(rows[key], value, rtol=1e-6, atol=1e-7)


def test_state_goes_back_into_the_tables() -> None:
    target, other = make(True), make(False)
    train(target, torch.optim.SGD(target.parameter_groups()[0][0]["params"], lr=0.1), steps=1)
    state = {key: value.clone() for key, value in target.state_dict().items()}
    other.load_state_dict(state)
    assert all(torch.equal(a[WORDS:], b[WORDS:]) for a, b in zip(target.tables, other.tables, strict=True))
    with pytest.raises(ValueError, match="numbers instead of"):
        other.load_state_dict({key: value[:1] for key, value in state.items()})


def test_the_average_is_of_the_new_rows() -> None:
    target = make(True)
    before = [table.detach().clone() for table in target.tables]
    average = MovingAverage(target.averaged_parameters(), decay=0.5)
    train(target, torch.optim.SGD(target.parameter_groups()[0][0]["params"], lr=0.1), steps=1)
    after = [table.detach().clone() for table in target.tables]
    with average.in_place():
        assert all(torch.equal(table, old) for table, old in zip(target.tables, before, strict=True))
    assert all(torch.equal(table, new) for table, new in zip(target.tables, after, strict=True))


def test_optimizer_state_of_whole_tables_is_taken() -> None:
    whole, alone = make(False), make(True)
    first = torch.optim.AdamW(whole.parameter_groups()[0][0]["params"], lr=0.1)
    second = torch.optim.AdamW(alone.parameter_groups()[0][0]["params"], lr=0.1)
    train(whole, first, steps=1)
    alone.load_state_dict(whole.state_dict())
    second.load_state_dict(alone.prepared_optimizer_state(copy.deepcopy(first.state_dict())))
    train(whole, first, steps=2)
    train(alone, second, steps=2)
    for key, value in whole.state_dict().items():
        torch.testing.assert_close(alone.state_dict()[key], value)


@pytest.mark.parametrize(
    ("options", "alone"),
    [
        ([], True),
        (["--optimizer_type", "SGDNesterov"], True),
        (["--use_lion_optimizer"], True),
        (["--optimizer_type", "AdamW8bit"], False),
        (["--optimizer_type", "AdaFactor"], False),
        (["--optimizer_type", "Prodigy"], False),
        (["--optimizer_type", "some.module.Class"], False),
        (["--mixed_precision", "fp16"], False),
        (["--mixed_precision", "bf16"], True),
    ],
)
def test_who_gets_rows_alone(options: list[str], alone: bool) -> None:
    argv = ["--pretrained_model_name_or_path", "m", "--output_dir", "o", "--train_data_dir", "d"]
    args: Any = parse("train_textual_inversion.py", [*argv, "--token_string", "w", *options])
    assert takes_rows_alone(resolve(args, "train_textual_inversion.py")) is alone
