"""Every record of the registries names something real."""

from __future__ import annotations

import importlib

import pytest

from library.options.registries import (
    LOSSES,
    NETWORKS,
    OPTIMIZERS,
    SAMPLER_NAMES,
    SAMPLERS,
    SCHEDULES,
    find_optimizer,
    find_schedule,
    nearest,
)
from library.options.scripts import find_script
from library.options.values import int_or_ratio, key_values, resolve_ratio

KNOWN = {option.dest: option for option in find_script("train_network.py").options()}


@pytest.mark.parametrize("record", OPTIMIZERS, ids=lambda r: r.name)
def test_optimizer(record) -> None:
    module, _, name = record.path.rpartition(".")
    assert record.note
    assert set(record.forbids) <= set(KNOWN)
    for spelling in (record.name, *record.aliases):
        assert find_optimizer(spelling.upper()) is record
    if record.package in ("bitsandbytes",):
        pytest.skip(f"{record.package} is an extra that the tests do not install")
    assert isinstance(getattr(importlib.import_module(module), name), type)


@pytest.mark.parametrize("record", SCHEDULES, ids=lambda r: r.name)
def test_schedule(record) -> None:
    assert set(record.takes) <= set(KNOWN)
    assert set(record.forbids) <= set(KNOWN)
    assert set(record.needs) <= set(KNOWN) | set(record.arguments)
    assert find_schedule(record.name) is record
    assert record.note
    assert record.formula


def test_adafactor_with_a_rate_is_a_schedule() -> None:
    assert find_schedule("adafactor:0.001") is find_schedule("adafactor")
    assert find_schedule("Cosine") is None


@pytest.mark.parametrize("record", SAMPLERS, ids=lambda r: r.name)
def test_sampler(record) -> None:
    import diffusers

    assert hasattr(diffusers, record.scheduler)
    assert record.note


def test_sampler_names_are_the_choices() -> None:
    assert KNOWN["sample_sampler"].choices == SAMPLER_NAMES


def test_losses_are_the_choices() -> None:
    assert KNOWN["loss_type"].choices == tuple(record.name for record in LOSSES)
    assert all(set(record.takes) <= set(KNOWN) for record in LOSSES)


@pytest.mark.parametrize("record", NETWORKS, ids=lambda r: r.name)
def test_network(record) -> None:
    module = importlib.import_module(record.name)
    assert hasattr(module, "create_network")
    assert hasattr(module, "create_network_from_weights")
    assert record.note


def test_nearest() -> None:
    assert nearest("ADAMW8BITS", [r.name for r in OPTIMIZERS])[0] == "AdamW8bit"
    assert nearest("qqqq", ["AdamW"]) == []


RATIOS = [
    ("10", 10),
    ("0", 0),
    ("0.1", 0.1),
    ("5%", 0.05),
    ("0.999", 0.999),
    ("1", 1),
    ("100%", 1.0),
    ("1.0", None),
    ("2.5", None),
    ("abc", None),
    ("150%", None),
    ("-1", None),
    ("-0.5", None),
    ("1e2", None),
]


@pytest.mark.parametrize(("text", "value"), RATIOS)
def test_int_or_ratio(text: str, value: float | None) -> None:
    if value is None:
        with pytest.raises(ValueError, match=r"."):
            int_or_ratio(text)
    else:
        assert int_or_ratio(text) == value
        assert type(int_or_ratio(text)) is type(value)


def test_resolve_ratio() -> None:
    assert resolve_ratio(7, 1000) == 7
    assert resolve_ratio(0.25, 1000) == 250


def test_key_values() -> None:
    assert key_values(["a=1", "betas=0.9,0.99", "flag=true", "text='x=y'", "none=None"], "--x") == {
        "a": 1,
        "betas": (0.9, 0.99),
        "flag": True,
        "text": "x=y",
        "none": None,
    }
