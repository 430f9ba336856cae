"""The epoch plan's promises, for any data set."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from library.data.buckets import Buckets, bucket_rule, sort_into_buckets
from library.data.plan import batches_per_epoch, make_plan
from library.messages import UserError


@dataclass
class Counts:
    """A data set of which only buckets and batch size are known."""

    buckets: Buckets
    plan_batch_size: int


@st.composite
def data_sets(draw):
    """Up to three data sets with repeated items in a few buckets."""
    made = []
    for _ in range(draw(st.integers(1, 3))):
        repeats = draw(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 4)), max_size=12))
        members = {}
        for index, (bucket, times) in enumerate(repeats):
            members.setdefault((64 * (bucket + 1), 64), []).extend([index] * times)
        sizes = sorted(members)
        made.append(Counts(Buckets(sizes, [members[size] for size in sizes]), draw(st.integers(1, 4))))
    return made


def entries(plan, ranks=None):
    ranks = plan.batches if ranks is None else ranks
    return [
        (batch.dataset, batch.bucket, item, occurrence)
        for batches in ranks
        for batch in batches
        for item, occurrence in zip(batch.items, batch.occurrences, strict=True)
    ]


def expected(datasets):
    found = []
    for index, dataset in enumerate(datasets):
        for size, members in zip(dataset.buckets.sizes, dataset.buckets.members, strict=True):
            for item, times in Counter(members).items():
                found += [(index, size, item, occurrence) for occurrence in range(times)]
    return found


@given(datasets=data_sets(), seed=st.integers(0, 2**32), epoch=st.integers(1, 50))
def test_each_item_once_in_batches_of_one_bucket(datasets, seed, epoch):
    plan = make_plan(datasets, seed=seed, epoch=epoch)
    assert sorted(entries(plan)) == sorted(expected(datasets))
    assert all(1 <= len(b.items) <= datasets[b.dataset].plan_batch_size for b in plan.batches[0])
    assert len(plan) == batches_per_epoch(datasets)
    assert plan == make_plan(datasets, seed=seed, epoch=epoch)


@given(datasets=data_sets(), seed=st.integers(0, 9), processes=st.integers(1, 5))
def test_processes_share_the_work(datasets, seed, processes):
    plan = make_plan(datasets, seed=seed, epoch=1, processes=processes)
    assert len(plan.batches) == processes
    assert {len(rank) for rank in plan.batches} == {batches_per_epoch(datasets, processes)}
    for position in zip(*plan.batches, strict=True):
        assert len({(batch.dataset, batch.bucket) for batch in position}) == 1
        sizes = [len(batch.items) for batch in position]
        assert min(sizes) >= 1 and max(sizes) - min(sizes) <= 1
        assert max(sizes) <= datasets[position[0].dataset].plan_batch_size
    counts = Counter(entries(plan))
    assert set(counts) == set(expected(datasets))
    # Filling: per bucket fewer entries come again than there are processes.
    extra = Counter(entry[:2] for entry in counts.elements())
    for index, dataset in enumerate(datasets):
        for size, members in zip(dataset.buckets.sizes, dataset.buckets.members, strict=True):
            assert 0 <= extra[index, size] - len(members) < processes


@given(datasets=data_sets(), seed=st.integers(0, 9), processes=st.integers(2, 4))
def test_processes_see_the_rounds_of_one_with_larger_batches(datasets, seed, processes):
    shared = make_plan(datasets, seed=seed, epoch=2, processes=processes)
    larger = [Counts(d.buckets, d.plan_batch_size * processes) for d in datasets]
    alone = make_plan(larger, seed=seed, epoch=2)
    assert len(shared) == len(alone)
    for position, batch in zip(zip(*shared.batches, strict=True), alone.batches[0], strict=True):
        together = set(entries(shared, [[part] for part in position]))
        assert together >= set(entries(alone, [[batch]]))


def test_order_changes_with_seed_and_epoch():
    buckets = Buckets([(64, 64), (64, 128)], [list(range(20)), list(range(20, 30))])
    plans = [make_plan([Counts(buckets, 2)], seed=s, epoch=e).batches for s, e in [(1, 1), (1, 2), (2, 1)]]
    assert plans[0] != plans[1] and plans[0] != plans[2] and plans[1] != plans[2]


def test_batch_size_below_one_is_refused():
    with pytest.raises(UserError, match="batch size"):
        make_plan([Counts(Buckets(), 0)], seed=0, epoch=1)


def test_batches_per_bucket_equal_the_original(golden):
    compared = 0
    for case in json.loads((golden / "datasets_repeats.json").read_text(encoding="utf-8"))["cases"]:
        rule = bucket_rule((64, 64), enable=True, smallest=32, largest=128, step=8)
        sizes = [tuple(size) for size in case["image_sizes_cycled"]]
        fits = [rule.fit(sizes[int(key.rpartition("/")[2].split(".")[0]) % len(sizes)]) for key in case["registered"]]
        buckets = sort_into_buckets(fits, case["registered"].values())
        dataset = Counts(buckets, case["batch_size"])
        found = [
            {"resolution": list(size), "count": len(m), "batches": -(-len(m) // case["batch_size"])}
            for size, m in zip(buckets.sizes, buckets.members, strict=True)
        ]
        assert found == case["buckets"], case
        plan = make_plan([dataset], seed=0, epoch=1)
        per_bucket = Counter(batch.bucket for batch in plan.batches[0])
        assert [per_bucket[tuple(b["resolution"])] for b in case["buckets"]] == [b["batches"] for b in case["buckets"]]
        assert len(plan) == case["dataset_length"]
        compared += 1
    assert compared == 39
