"""Text output caches: the original's files, each caption encoded once, what is kept and what is made anew."""

from __future__ import annotations

import json
import os
import shutil

import numpy as np
import pytest
import torch

from library.data.loader import make_loader
from library.data.text_cache import cache_text_outputs
from library.data.text_file import SUFFIX, CachedText, TextOrigin, read_text, write_text
from library.messages import UserError
from tests.data.conftest import same, side_by_side
from tests.data.test_cache import described, gradient

ORIGIN = TextOrigin(77, (4, 6, 6), "encoders a", "float32")


class Encoder:
    """Stands for two text encoders: numbers made of a caption's bytes; remembers what it was asked."""

    def __init__(self, length: int = 77, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> None:
        self.length, self.dtype, self.scale = length, dtype, scale
        self.asked: list[list[str]] = []

    def __call__(self, captions: list[str]) -> CachedText:
        self.asked.append(captions)
        numbers = torch.tensor([sum(text.encode()) / 1000 + len(text) for text in captions]) * self.scale
        shapes = ((self.length, 4), (self.length, 6), (6,))
        return CachedText(*(numbers.reshape(-1, *[1] * len(s)).expand(-1, *s).to(self.dtype) for s in shapes))

    @property
    def captions(self) -> list[str]:
        return [text for batch in self.asked for text in batch]


@pytest.fixture(scope="module")
def recorded(golden):
    return json.loads((golden / "datasets_npz.json").read_text(encoding="utf-8"))["text_encoder_outputs"]


def batches(group):
    return list(make_loader(group, group.plan(1, 1)))


def test_files_and_batches_equal_the_original(recorded, tmp_path, make_group):
    assert len(recorded) == 3
    for number, case in enumerate(recorded):
        folder = tmp_path / str(number)
        folder.mkdir()
        gradient(folder / case["image"], (64, 64))
        (folder / "a.txt").write_text("a cat")
        length = (case["max_token_length"] or 75) + 2
        for to_disk in (False, True):
            group = make_group(folder, sizes=(64,), num_repeats=1)
            cache_text_outputs(group.datasets, Encoder(length), TextOrigin(length), to_disk=to_disk)
            [batch] = batches(group)
            example = described(batch)
            assert {name: example[name] for name in case["example"]} == case["example"]
            assert batch["captions"] == ["a cat"]
        assert sorted(set(os.listdir(folder)) - {"a.png", "a.txt"}) == case["files"]
        with np.load(folder / case["files"][0]) as file:
            assert file.files == [*case["array_order"], "cache_key"]
            for name, told in case["arrays"].items():
                assert {"shape": list(file[name].shape), "dtype": str(file[name].dtype)} == told
        real = case["real_sdxl_shapes"]
        origin = TextOrigin(length, (768, 1280, 1280))
        assert origin.shapes() == [tuple(real[name]) for name in ("hidden_state1", "hidden_state2", "pool2")]


def test_the_originals_file_is_read_and_kept(golden, shapes, make_group, caplog):
    from library import messages

    messages.log.propagate = True
    recorded = golden / "datasets_te_outputs.npz"
    entry = read_text(recorded)
    with np.load(recorded) as file:
        for tensor, name in zip(entry.tensors(), ("hidden_state1", "hidden_state2", "pool2"), strict=True):
            assert tensor.dtype == torch.float32 and np.array_equal(tensor.numpy(), file[name])
    stems = [path.with_suffix("") for path in sorted(shapes.glob("*.png"))]
    shutil.copy(recorded, f"{stems[0]}{SUFFIX}")
    group, encoder = make_group(shapes), Encoder()
    report = cache_text_outputs(group.datasets, encoder, ORIGIN, to_disk=True)
    assert (report.kept, report.made) == (1, len(stems) - 1)
    assert "1 text cache files come from another program" in caplog.text
    first = next(item for item in group.datasets[0].items if item.path == f"{stems[0]}.png")
    assert torch.equal(read_text(first.text_npz).hidden1, entry.hidden1)


def test_memory_and_disk_give_the_same(shapes, make_group):
    results = []
    for to_disk in (False, True, True):
        group, encoder = make_group(shapes, caption_prefix="style x,"), Encoder()
        cache_text_outputs(group.datasets, encoder, ORIGIN, to_disk=to_disk, batch_size=4)
        results.append((batches(group), encoder))
    for batch, again, kept in zip(*(made for made, _ in results), strict=True):
        assert same(batch, again) and same(batch, kept)
        assert batch["input_ids"] is None and all(text.startswith("style x, ") for text in batch["captions"])
    asked = results[0][1].captions
    assert sorted(asked) == sorted(set(asked)), "a caption was encoded twice"
    assert results[1][1].captions == asked and results[2][1].captions == []


def test_values_of_a_picture_are_those_of_its_caption(shapes, make_group):
    group = make_group(shapes)
    cache_text_outputs(group.datasets, Encoder(), ORIGIN, to_disk=True)
    for batch in batches(group):
        for row, text in enumerate(batch["captions"]):
            wanted = Encoder()([text]).row(0)
            for key, tensor in zip(("outputs1_list", "outputs2_list", "pool2_list"), wanted.tensors(), strict=True):
                assert torch.equal(batch[f"text_encoder_{key}"][row], tensor)


def test_a_shared_caption_is_encoded_once(shapes, make_group):
    for path in shapes.glob("*.txt"):
        path.write_text("all the same")
    for to_disk in (False, True):
        encoder = Encoder()
        cache_text_outputs(make_group(shapes).datasets, encoder, ORIGIN, to_disk=to_disk)
        assert encoder.captions == ["all the same"]


STALE = {
    "caption changed": lambda shapes, stem: (shapes / f"{stem}.txt").write_text("another caption"),
    "broken file": lambda shapes, stem: (shapes / f"{stem}{SUFFIX}").write_bytes(b"PK nothing"),
    "arrays missing": lambda shapes, stem: write_text(shapes / f"{stem}{SUFFIX}", CachedText(torch.zeros(77, 4)), "{}"),
    "other length or model": lambda shapes, stem: write_text(
        shapes / f"{stem}{SUFFIX}", CachedText(torch.zeros(152, 4), torch.zeros(152, 6), torch.zeros(6))
    ),
}


@pytest.mark.parametrize("reason", STALE)
def test_what_no_longer_holds_is_made_anew(reason, shapes, make_group):
    cache_text_outputs(make_group(shapes).datasets, Encoder(), ORIGIN, to_disk=True)
    stem = sorted(shapes.glob("*.png"))[0].stem
    STALE[reason](shapes, stem)
    group = make_group(shapes)
    report = cache_text_outputs(group.datasets, Encoder(), ORIGIN, to_disk=True)
    assert dict(report.rebuilt) == {reason: 1} and report.made == 0
    again = cache_text_outputs(make_group(shapes).datasets, Encoder(), ORIGIN, to_disk=True)
    assert not again.rebuilt


@pytest.mark.parametrize(
    ("change", "reason"),
    [({"encoders": "encoders b"}, "other text encoders"), ({"dtype": "bfloat16"}, "other precision")],
)
def test_other_encoders_make_everything_anew(change, reason, shapes, make_group):
    import dataclasses

    cache_text_outputs(make_group(shapes).datasets, Encoder(), ORIGIN, to_disk=True)
    other = dataclasses.replace(ORIGIN, **change)
    report = cache_text_outputs(make_group(shapes).datasets, Encoder(), other, to_disk=True)
    assert dict(report.rebuilt) == {reason: 6}
    encoder = Encoder()
    cache_text_outputs(make_group(shapes).datasets, encoder, ORIGIN, to_disk=True, skip_check=True)
    assert encoder.captions == []


def test_two_captions_of_one_picture_have_two_files(shapes, make_group):
    from library.data.group import DatasetGroup

    def groups():
        parts = [make_group(shapes, caption_prefix=prefix).datasets[0] for prefix in ("one", "two")]
        return DatasetGroup(parts)

    for expected in (12, 0):
        group, encoder = groups(), Encoder()
        cache_text_outputs(group.datasets, encoder, ORIGIN, to_disk=True)
        assert len(encoder.captions) == expected
        for dataset in group.datasets:
            for item in dataset.items:
                assert torch.equal(
                    read_text(item.text_npz).pooled, Encoder()([dataset.fixed_caption(item)]).row(0).pooled
                )


def test_a_kill_leaves_the_old_file_or_the_new_one(shapes, make_group, monkeypatch):
    cache_text_outputs(make_group(shapes).datasets, Encoder(), ORIGIN, to_disk=True)
    path = sorted(shapes.glob(f"*{SUFFIX}"))[0]
    before = path.read_bytes()

    def broken(file, **arrays):
        with open(file, "wb") as partial:
            partial.write(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(np, "savez", broken)
    with pytest.raises(KeyboardInterrupt):
        write_text(path, read_text(path))
    assert path.read_bytes() == before and len(list(shapes.glob(f"*{SUFFIX}*"))) == 6


@pytest.mark.parametrize(
    "setting",
    [
        {"caption_dropout_rate": 0.1},
        {"shuffle_caption": True},
        {"token_warmup_step": 3},
        {"caption_tag_dropout_rate": 0.1},
    ],
)
def test_captions_that_change_are_refused(setting, shapes, make_group):
    [name] = setting
    group = make_group(shapes, **setting)
    with pytest.raises(UserError, match=rf"cannot be cached with {name}, which .*shapes uses.*turn off {name}"):
        cache_text_outputs(group.datasets, Encoder(), ORIGIN)
    assert not group.is_text_encoder_output_cacheable()


@pytest.mark.parametrize("to_disk", [False, True])
def test_every_caption_of_a_picture_is_encoded(to_disk, shapes, make_group):
    for path in shapes.glob("*.txt"):
        path.write_text(f"{path.stem} {{red|blue}}\n{path.stem} alone")
    group, encoder = make_group(shapes, enable_wildcard=True, num_repeats=12, batch_size=4), Encoder()
    cache_text_outputs(group.datasets, encoder, ORIGIN, to_disk=to_disk)
    assert len(encoder.captions) == 3 * 6 and "{" not in "".join(encoder.captions)
    seen = set()
    for batch in batches(group):
        seen |= set(batch["captions"])
        for row, text in enumerate(batch["captions"]):
            assert torch.equal(batch["text_encoder_pool2_list"][row], Encoder()([text]).row(0).pooled)
    assert seen == set(encoder.captions)
    assert len(list(shapes.glob(f"*{SUFFIX}"))) == (18 if to_disk else 0)
    again = Encoder()
    cache_text_outputs(make_group(shapes, enable_wildcard=True).datasets, again, ORIGIN, to_disk=to_disk)
    assert len(again.captions) == (0 if to_disk else 18)


def test_captions_of_too_many_forms_name_their_picture(shapes, make_group):
    path = sorted(shapes.glob("*.txt"))[0]
    path.write_text("{a|b|c|d} {e|f|g|h} {i|j|k|l} {m|n}")
    with pytest.raises(UserError, match=f"1 captions have more than 64 forms .*{path.stem}"):
        cache_text_outputs(make_group(shapes, enable_wildcard=True).datasets, Encoder(), ORIGIN)


def test_dropout_every_n_epochs_is_told_to_do_nothing(shapes, make_group, caplog):
    from library import messages

    messages.log.propagate = True
    group = make_group(shapes, caption_dropout_every_n_epochs=1)
    cache_text_outputs(group.datasets, Encoder(), ORIGIN)
    assert "caption_dropout_every_n_epochs has no effect" in caplog.text
    assert all(all(batch["captions"]) for batch in batches(group))


def test_values_that_are_not_finite_name_the_caption(shapes, make_group):
    with pytest.raises(UserError, match="not finite for the caption"):
        cache_text_outputs(make_group(shapes).datasets, Encoder(scale=float("nan")), ORIGIN)


def test_processes_share_the_work(shapes, make_group):
    encoders = [Encoder(), Encoder()]

    def process(rank, wait):
        group = make_group(shapes)
        report = cache_text_outputs(
            group.datasets, encoders[rank], ORIGIN, to_disk=True, rank=rank, processes=2, wait=wait
        )
        assert all(item.text_npz for item in group.datasets[0].items)
        return report.made

    assert side_by_side(process) == [6, 6]
    assert len(encoders[0].captions) == len(encoders[1].captions) == 3
    assert not set(encoders[0].captions) & set(encoders[1].captions)


def test_a_share_that_was_not_made_is_noticed(shapes, make_group):
    with pytest.raises(UserError, match="another process did not make"):
        cache_text_outputs(make_group(shapes).datasets, Encoder(), ORIGIN, to_disk=True, rank=0, processes=2)


def test_the_group_asks_its_encoding_function_and_foreign_members(shapes, make_group):
    calls = []

    class Foreign:
        def cache_text_encoder_outputs(self, *arguments):
            calls.append(arguments)

    group = make_group(shapes)
    with pytest.raises(RuntimeError, match="cache_text"):
        group.cache_text_encoder_outputs([], [], "cpu", torch.float32)
    group.datasets.append(Foreign())
    group.cache_text = lambda *arguments: calls.append(arguments)
    group.cache_text_encoder_outputs(["t"], ["e"], "cpu", torch.float16, True, False)
    assert calls[0] == (group.datasets, ["t"], ["e"], "cpu", torch.float16, True)
    assert calls[1] == (["t"], ["e"], "cpu", torch.float16, True, False)
