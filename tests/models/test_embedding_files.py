"""Embedding files: every public layout is read, what is written is what the original wrote, bad files are named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from library.messages import UserError
from library.models.embedding_files import (
    PLAIN,
    SDXL,
    XTI,
    XTI_LAYERS,
    read_embedding,
    tables_for_encoders,
    tables_for_layers,
    write_embedding,
)

ROWS = torch.arange(8.0).reshape(2, 4)


class Opens:
    """A pickle that would write a file when it is read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (Path.touch, (self.path,))


PLAIN_FORMS = {
    "emb_params": {"emb_params": ROWS},
    "string_to_param": {"string_to_param": {"*": ROWS}, "string_to_token": {"*": 265}, "name": "x", "step": 3},
    "Parameter": {"string_to_param": {"*": nn.Parameter(ROWS)}},
    "ParameterDict": {"string_to_param": nn.ParameterDict({"*": nn.Parameter(ROWS)}), "sd_checkpoint": None},
    "any name": {"<word>": nn.Parameter(ROWS)},
    "bare tensor": ROWS,
    "bare parameter": nn.Parameter(ROWS),
}


@pytest.mark.parametrize("form", PLAIN_FORMS)
def test_plain_pickles(tmp_path: Path, form: str) -> None:
    torch.save(PLAIN_FORMS[form], tmp_path / "word.pt")
    stored = read_embedding(tmp_path / "word.pt")
    assert (stored.kind, stored.count) == (PLAIN, 2)
    assert torch.equal(stored.tensors["emb_params"], ROWS)


@pytest.mark.parametrize("content", [{"<word>": ROWS[1]}, ROWS[1], {"string_to_param": {"*": ROWS[1]}}])
def test_one_axis_is_one_vector(tmp_path: Path, content: Any) -> None:
    torch.save(content, tmp_path / "learned_embeds.bin")
    (table,) = tables_for_encoders(read_embedding(tmp_path / "learned_embeds.bin"), [4])
    assert torch.equal(table, ROWS[1:])


@pytest.mark.parametrize("keys", [("clip_l", "clip_g"), ("text_encoders_0", "text_encoders_1")])
@pytest.mark.parametrize("suffix", [".safetensors", ".SAFETENSORS", ".pt"])
def test_sdxl(tmp_path: Path, keys: tuple[str, str], suffix: str) -> None:
    wide = torch.cat([ROWS, ROWS], dim=1)
    path = tmp_path / f"word{suffix}"
    content = {keys[1]: wide, keys[0]: ROWS}
    torch.save(content, path) if suffix == ".pt" else save_file(content, path)
    stored = read_embedding(path)
    assert stored.kind == SDXL
    first, second = tables_for_encoders(stored, [4, 8])
    assert torch.equal(first, ROWS)
    assert torch.equal(second, wide)


def test_one_side_of_sdxl(tmp_path: Path) -> None:
    save_file({"clip_g": ROWS}, tmp_path / "word.safetensors")
    first, second = tables_for_encoders(read_embedding(tmp_path / "word.safetensors"), [3, 4])
    assert first is None
    assert torch.equal(second, ROWS)


@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
def test_xti_is_read_by_name(tmp_path: Path, suffix: str) -> None:
    content = {layer: ROWS + number for number, layer in enumerate(XTI_LAYERS)}
    shuffled = dict(sorted(content.items(), reverse=True))
    torch.save(shuffled, tmp_path / "x.pt")
    save_file(shuffled, tmp_path / "x.safetensors")
    stored = read_embedding(tmp_path / f"x.{suffix}")
    assert stored.kind == XTI
    assert list(stored.tensors) == list(XTI_LAYERS)
    tables = tables_for_layers(stored, 4)
    assert all(torch.equal(table, ROWS + number) for number, table in enumerate(tables))


BAD = {
    "an SDXL embedding, an embedding for one": ({"clip_l": ROWS, "clip_g": ROWS}, [4]),
    "one text encoder .* an SDXL embedding is needed": ({"emb_params": ROWS}, [4, 4]),
    "XTI_embeddings": (dict.fromkeys(XTI_LAYERS, ROWS), [4]),
    "4 numbers, the text encoder of this model has 5": ({"emb_params": ROWS}, [5]),
    r"1280 numbers \(those of the second text encoder of SDXL\)": ({"emb_params": torch.zeros(1, 1280)}, [768]),
    "clip_l 2, clip_g 1": ({"clip_l": ROWS, "clip_g": ROWS[:1]}, [4, 4]),
    "without the layers OUT11": (dict.fromkeys(XTI_LAYERS[:-1], ROWS), [4]),
    "its keys are a, b": ({"a": ROWS, "b": ROWS}, [4]),
    "it holds a list": ([ROWS], [4]),
    "emb_params is str": ({"x": "text"}, [4]),
    r"\(1, 2, 4\)": ({"x": ROWS[None]}, [4]),
    "torch.int64": ({"x": torch.arange(4)}, [4]),
    "not finite": ({"x": ROWS / 0}, [4]),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_content(tmp_path: Path, message: str) -> None:
    content, widths = BAD[message]
    torch.save(content, tmp_path / "word.pt")
    with pytest.raises(UserError, match=message) as raised:
        tables_for_encoders(read_embedding(tmp_path / "word.pt"), widths)
    assert "word.pt" in raised.value.problem
    assert raised.value.remedy


def test_other_layouts_are_no_xti_file(tmp_path: Path) -> None:
    torch.save({"emb_params": ROWS}, tmp_path / "word.pt")
    with pytest.raises(UserError, match="an XTI file is needed"):
        tables_for_layers(read_embedding(tmp_path / "word.pt"), 4)


def test_missing_and_dangerous_files(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        read_embedding(tmp_path / "none.pt")
    (tmp_path / "cut.safetensors").write_bytes(b"12345")
    with pytest.raises(UserError, match=r"cut\.safetensors"):
        read_embedding(tmp_path / "cut.safetensors")
    torch.save({"emb_params": ROWS, "name": Opens(tmp_path / "opened")}, tmp_path / "evil.pt")
    with pytest.raises(UserError, match="wants to run code"):
        read_embedding(tmp_path / "evil.pt")
    assert not (tmp_path / "opened").exists()


RECORDED = {"ti_sd1.safetensors": PLAIN, "ti_sd1.pt": PLAIN, "ti_sdxl.safetensors": SDXL, "xti.safetensors": XTI}


@pytest.mark.parametrize("name", RECORDED)
def test_files_of_the_original(golden: Path, tmp_path: Path, name: str) -> None:
    """They are read, and written again they are the same."""
    path = golden / f"embeddings_file_{name}"
    stored = read_embedding(path)
    assert stored.kind == RECORDED[name]
    copy = tmp_path / name
    if path.suffix == ".pt":
        write_embedding(copy, stored.tensors)
        before, after = (torch.load(p, weights_only=True) for p in (path, copy))
        assert type(after) is dict
    else:
        with safe_open(path, "pt") as file:
            metadata = file.metadata()
        write_embedding(copy, stored.tensors, None, metadata)
        before, after = load_file(path), load_file(copy)
        with safe_open(copy, "pt") as file:
            assert file.metadata() == metadata
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) and before[key].dtype == after[key].dtype for key in before)


def test_number_format(tmp_path: Path) -> None:
    write_embedding(tmp_path / "word.safetensors", {"emb_params": nn.Parameter(ROWS)}, torch.float16)
    assert load_file(tmp_path / "word.safetensors")["emb_params"].dtype == torch.float16


def test_layers_are_those_of_the_original(golden: Path) -> None:
    recorded = json.loads((golden / "embeddings_xti_routing.json").read_text(encoding="utf-8"))
    assert list(XTI_LAYERS) == recorded["layers"]
