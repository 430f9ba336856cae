"""The loader gives the same batches whatever the workers, processes and starting point."""

from __future__ import annotations

import multiprocessing
import os
import signal

import pytest
import torch
from PIL import Image

from library.data.group import DatasetGroup
from library.data.loader import close_loaders, make_loader
from library.data.records import Item
from library.messages import UserError
from tests.data.conftest import same

RANDOM = {"flip_aug": True, "color_aug": True, "random_crop": True, "shuffle_caption": True, "token_warmup_step": 6}
RANDOM |= {"caption_tag_dropout_rate": 0.3, "sizes": (128, 192), "bucket_reso_steps": 32}


def load(group, plan, **options):
    return list(make_loader(group, plan, **options))


def equal(a, b):
    return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("workers", [1, 4])
def test_workers_do_not_change_batches(shapes, make_group, workers):
    group = make_group(shapes, **RANDOM)
    plan = group.plan(7, 1)
    alone = load(group, plan)
    assert len(alone) == len(plan) > 8
    assert any(any(batch["flippeds"]) for batch in alone)
    assert equal(alone, load(group, plan, workers=workers))


def test_persistent_workers_serve_every_epoch(shapes, make_group):
    group = make_group(shapes, **RANDOM)
    try:
        for epoch in (1, 2):
            plan = group.plan(7, epoch)
            step = (epoch - 1) * len(plan)
            assert equal(
                load(group, plan, first_step=step), load(group, plan, first_step=step, workers=2, persistent=True)
            )
    finally:
        close_loaders()


def test_epochs_and_seeds_differ(shapes, make_group):
    group = make_group(shapes, **RANDOM)
    first, second = (load(group, group.plan(7, epoch)) for epoch in (1, 2))
    assert not equal(first, second)
    assert not equal(first, load(make_group(shapes, seed=8, **RANDOM), group.plan(7, 1)))


@pytest.mark.parametrize("workers", [0, 2])
def test_start_in_the_middle_gives_the_rest(shapes, make_group, workers):
    group = make_group(shapes, **RANDOM)
    plan = group.plan(7, 2)
    whole = load(group, plan, first_step=20, accumulation=2)
    assert equal(whole[4:], load(group, plan, start=4, first_step=22, accumulation=2, workers=workers))
    assert load(group, plan, start=len(plan)) == []


def test_two_processes_make_the_batches_of_one_twice_as_large(shapes, make_group):
    settings = {**RANDOM, "num_repeats": 4}
    shared, alone = make_group(shapes, batch_size=2, **settings), make_group(shapes, batch_size=4, **settings)
    ranks = [load(shared, shared.plan(7, 1, processes=2), rank=rank) for rank in (0, 1)]
    larger = load(alone, alone.plan(7, 1))
    assert len(ranks[0]) == len(ranks[1]) == len(larger)
    for first, second, both in zip(*ranks, larger, strict=True):
        rows = {}
        for batch in (first, second):
            for i, key in enumerate(batch["image_keys"]):
                rows.setdefault((key, batch["captions"][i]), []).append(batch["images"][i])
        for i, key in enumerate(both["image_keys"]):
            candidates = rows[key, both["captions"][i]]
            assert any(torch.equal(both["images"][i], picture) for picture in candidates)


def test_samples_do_not_depend_on_batch_size(shapes, make_group):
    settings = {**RANDOM, "num_repeats": 1, "sizes": (128,)}

    def pictures(batch_size):
        group = make_group(shapes, batch_size=batch_size, **settings)
        batches = load(group, group.plan(7, 1), first_step=9, accumulation=1000)
        return {key: b["images"][i] for b in batches for i, key in enumerate(b["image_keys"])}

    one, three = pictures(1), pictures(3)
    assert one.keys() == three.keys() and len(one) == 6
    assert all(torch.equal(one[key], three[key]) for key in one)


def test_token_warm_up_counts_updates(shapes, make_group):
    for file in shapes.glob("*.txt"):
        file.write_text("a, b, c, d, e", encoding="utf-8")
    group = make_group(shapes, token_warmup_min=1, token_warmup_step=8)
    plan = group.plan(7, 1)
    parts = [len(batch["captions"][0].split(",")) for batch in make_loader(group, plan, first_step=4, accumulation=2)]
    assert parts == [int((4 + i // 2) * (4 / 8)) + 1 if 4 + i // 2 < 8 else 5 for i in range(len(plan))]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_broken_picture_is_named_in_one_line(shapes, make_group, workers):
    group = make_group(shapes)
    plan = group.plan(7, 1)
    (shapes / "c.png").write_bytes((shapes / "c.png").read_bytes()[:200])
    with pytest.raises(UserError, match=r"c\.png") as caught:
        load(group, plan, workers=workers)
    assert "\n" not in str(caught.value) and "Traceback" not in str(caught.value)


def test_a_picture_that_changed_its_size_is_named(shapes, make_group):
    group = make_group(shapes)
    Image.new("RGB", (50, 90)).save(shapes / "a.png")
    with pytest.raises(UserError, match=r"a\.png is 50x90"):
        load(group, group.plan(7, 1))


class Killer(DatasetGroup):
    """Its worker is killed, as the system does when memory runs out."""

    def batch(self, planned, *, epoch, step):
        os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.skipif(os.name == "nt", reason="no SIGKILL")
def test_a_killed_worker_is_explained(shapes, make_group):
    group = make_group(shapes)
    with pytest.raises(UserError, match="worker was killed"):
        load(Killer(group.datasets), group.plan(7, 1), workers=1)


def test_an_unforeseen_error_names_the_picture(shapes, make_group, monkeypatch):
    group = make_group(shapes)
    monkeypatch.setattr(type(group.datasets[0]), "_caption", lambda *_: 1 / 0)
    with pytest.raises(RuntimeError, match=r"preparing .*\.png failed"):
        load(group, group.plan(7, 1))


def test_global_generators_are_left_alone(shapes, make_group):
    group = make_group(shapes, **RANDOM)
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    load(group, group.plan(7, 1), workers=1)
    assert torch.equal(torch.rand(1), expected)


def test_leaving_early_ends_the_workers(shapes, make_group):
    group = make_group(shapes, num_repeats=20)
    others = multiprocessing.active_children()
    batches = make_loader(group, group.plan(7, 1), workers=2)
    next(batches)
    workers = [child for child in multiprocessing.active_children() if child not in others]
    assert len(workers) == 2
    batches.close()
    del batches
    for worker in workers:
        worker.join(30)
    assert not [worker for worker in workers if worker.is_alive()]


def test_items_too_small_for_a_bucket_are_left_out(shapes, make_group, caplog):
    Image.new("RGB", (30, 90)).save(shapes / "tiny.png")
    (shapes / "tiny.txt").write_text("tiny", encoding="utf-8")
    with caplog.at_level("WARNING"):
        group = make_group(shapes, bucket_no_upscale=True)
    assert "tiny.png (30x90)" in caplog.text
    assert all(isinstance(item, Item) and "tiny" not in item.key for item in group.datasets[0].items)
