"""CLIP tokenizers from the shipped vocabulary, and captions as token ids in chunks of 77.

All CLIP text encoders of the supported families share one vocabulary (OpenAI's, MIT licence, `data/`); they differ
in the padding token only, so nothing has to be downloaded.
"""

from __future__ import annotations

import functools
import gzip
import inspect
import json
import re
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from library.messages import UserError
from library.runtime.files import atomic_folder

CHUNK = 77
BOS, EOS = "<|startoftext|>", "<|endoftext|>"
_MERGES_FILE = Path(__file__).parent / "data" / "clip_merges.txt.gz"
_SPECIAL = re.compile(r"(<\|startoftext\|>|<\|endoftext\|>)")


@dataclass(frozen=True)
class TokenizerKind:
    """One published tokenizer: its hub name, the padding token of its files, the padding id after loading."""

    repository: str
    pad_token: str
    pad_id: int
    subfolder: str = ""

    @property
    def cache_name(self) -> str:
        """Folder name below `--tokenizer_cache_dir`."""
        return self.repository.replace("/", "_")


CLIP_L = TokenizerKind("openai/clip-vit-large-patch14", EOS, 49407)
OPENCLIP_H = TokenizerKind("stabilityai/stable-diffusion-2", "!", 0, subfolder="tokenizer")
OPENCLIP_BIGG = TokenizerKind("laion/CLIP-ViT-bigG-14-laion2B-39B-b160k", EOS, 0)
# What SDXL's diffusers folders hold: the same padding without a change after loading.
SDXL_FOLDER = TokenizerKind("stabilityai/stable-diffusion-xl-base-1.0", "!", 0, subfolder="tokenizer_2")


@functools.cache
def merges_text() -> str:
    """The byte-pair merges as `merges.txt` has them: a header line, then 48,894 merges."""
    return gzip.decompress(_MERGES_FILE.read_bytes()).decode("utf-8")


@functools.cache
def merges() -> tuple[tuple[str, str], ...]:
    """The merges, best first."""
    lines = merges_text().rstrip("\n").split("\n")[1:]
    return tuple((left, right) for left, _, right in (line.partition(" ") for line in lines))


@functools.cache
def vocabulary() -> dict[str, int]:
    """Token -> id: byte characters, the same at the end of a word, one per merge, begin and end (49,408)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    characters = [chr(byte) for byte in printable] + [chr(256 + i) for i in range(len(others))]
    tokens = characters + [c + "</w>" for c in characters] + [a + b for a, b in merges()] + [BOS, EOS]
    return {token: i for i, token in enumerate(tokens)}


def write_tokenizer_folder(folder: Path, kind: TokenizerKind) -> None:
    """Write the four files that transformers and other programs read a CLIP tokenizer from."""
    folder.mkdir(parents=True, exist_ok=True)
    special = {"bos_token": BOS, "eos_token": EOS, "unk_token": EOS, "pad_token": kind.pad_token}
    config = {
        **special,
        "add_prefix_space": False,
        "do_lower_case": True,
        "errors": "replace",
        "model_max_length": CHUNK,
        "tokenizer_class": "CLIPTokenizer",
    }
    (folder / "vocab.json").write_text(json.dumps(vocabulary(), ensure_ascii=False), encoding="utf-8")
    (folder / "merges.txt").write_text(merges_text(), encoding="utf-8", newline="\n")
    (folder / "special_tokens_map.json").write_text(json.dumps(special, indent=2), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")


def _fast_class() -> Any:
    """The tokenizer class on the Rust backend: `CLIPTokenizer` since transformers 5, before `CLIPTokenizerFast`."""
    import transformers

    if "vocab" in inspect.signature(transformers.CLIPTokenizer.__init__).parameters:
        return transformers.CLIPTokenizer
    return transformers.CLIPTokenizerFast


def _build(kind: TokenizerKind) -> Any:
    """A tokenizer of this kind from the shipped vocabulary."""
    fast = _fast_class()
    if "vocab" in inspect.signature(fast.__init__).parameters:
        return fast(
            vocab=vocabulary(), merges=list(merges()), model_max_length=CHUNK, pad_token=kind.pad_token, unk_token=EOS
        )
    with tempfile.TemporaryDirectory() as folder:
        write_tokenizer_folder(Path(folder), kind)
        return fast.from_pretrained(folder)


def load_tokenizer(kind: TokenizerKind, cache_dir: str | Path | None = None) -> Any:
    """A CLIP tokenizer: from `cache_dir/<hub name>` if it is there, else from the shipped vocabulary.

    Args:
        kind: which published tokenizer.
        cache_dir: `--tokenizer_cache_dir`; a tokenizer that is not there yet is saved there.

    Raises:
        UserError: the cached folder cannot be read.
    """
    folder = Path(cache_dir) / kind.cache_name if cache_dir else None
    if folder is not None and folder.is_dir():
        tokenizer = tokenizer_from_folder(folder)
    else:
        tokenizer = _build(kind)
        if folder is not None:
            with atomic_folder(folder) as partial:
                write_tokenizer_folder(partial, kind)
    if tokenizer.pad_token_id != kind.pad_id:
        tokenizer.pad_token_id = kind.pad_id
    return tokenizer


def tokenizer_from_folder(folder: str | Path) -> Any:
    """A CLIP tokenizer from a local folder (a cache, or the `tokenizer` part of a diffusers folder)."""
    try:
        return _fast_class().from_pretrained(str(folder), local_files_only=True)
    except Exception as error:  # the Rust tokenizer raises plain Exception
        first_line = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"the tokenizer in {folder} cannot be read ({first_line})", "delete that folder; it is written again"
        ) from error


@functools.cache
def _ftfy_fix() -> Any:
    """`ftfy.fix_text`, or None where ftfy is not installed."""
    try:
        import ftfy
    except ImportError:
        return None
    return ftfy.fix_text


def clean_text(text: str) -> str:
    """Repair a text as CLIP's own tokenizer does (mojibake, HTML entities, curly quotes), special tokens left alone."""
    fix = _ftfy_fix()
    # Plain ASCII holds nothing for ftfy to mend, and ftfy is slow.
    if fix is None or (text.isascii() and text.isprintable() and "&" not in text):
        return text
    return "".join(part if _SPECIAL.fullmatch(part) else fix(part) for part in _SPECIAL.split(text))


def text_ids(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of each text without begin, end, padding or truncation, in one call of the tokenizer."""
    if not texts:
        return []
    cleaned = [clean_text(text) for text in texts]
    return tokenizer(cleaned, add_special_tokens=False, padding=False, truncation=False, verbose=False)["input_ids"]


def _rows(tokenizer: Any, captions: Sequence[str], length: int) -> np.ndarray:
    """Padded rows: BOS, ids, EOS cut to `length` (the last id stays EOS), then the padding id. int64 (B, length)."""
    rows = np.full((len(captions), length), tokenizer.pad_token_id, dtype=np.int64)
    rows[:, 0] = tokenizer.bos_token_id
    for row, ids in zip(rows, text_ids(tokenizer, captions), strict=True):
        ids = ids[: length - 2]
        row[1 : 1 + len(ids)] = ids
        row[1 + len(ids)] = tokenizer.eos_token_id
    return rows


def split_chunks(rows: np.ndarray, *, pad_id: int, eos_id: int) -> np.ndarray:
    """Rows (B, 75 n + 2) -> chunks (B, n, 77) that each begin with BOS and end as the text encoder expects.

    Where padding and end differ (SD 2.x, SDXL's second tokenizer): a chunk without an end in its last two places
    gets one in its last, and a chunk that would begin with padding begins with an end.
    """
    count = (rows.shape[1] - 2) // 75
    chunks = np.empty((rows.shape[0], count, CHUNK), dtype=np.int64)
    for c in range(count):
        chunks[:, c, 0] = rows[:, 0]
        chunks[:, c, 1:-1] = rows[:, 1 + 75 * c : 76 + 75 * c]
        chunks[:, c, -1] = rows[:, -1]
    if pad_id != eos_id:
        before_last = chunks[..., -2]
        chunks[..., -1] = np.where((before_last != eos_id) & (before_last != pad_id), eos_id, chunks[..., -1])
        chunks[..., 1] = np.where(chunks[..., 1] == pad_id, eos_id, chunks[..., 1])
    return chunks


def input_ids(tokenizer: Any, captions: Sequence[str], max_token_length: int | None = None) -> torch.Tensor:
    """Captions -> token ids as the text encoder takes them.

    Args:
        tokenizer: of the encoder; its padding id decides how chunks end.
        captions: B texts.
        max_token_length: None (or 75) for one chunk, 150 for two, 225 for three.

    Returns:
        int64 (B, n, 77).
    """
    chunks = count_chunks(max_token_length)
    rows = _rows(tokenizer, captions, 75 * chunks + 2)
    if chunks == 1:
        return torch.from_numpy(rows)[:, None]
    return torch.from_numpy(split_chunks(rows, pad_id=tokenizer.pad_token_id, eos_id=tokenizer.eos_token_id))


def without_padding(input_ids: torch.Tensor, eos_id: int) -> torch.Tensor:
    """Padded ids (B, 1, 77) on the CPU -> (B, longest), up to the first end token of the longest row."""
    rows = input_ids[:, 0]
    longest = int((rows == eos_id).int().argmax(dim=1).max()) + 1
    return rows[:, :longest].contiguous()


def count_chunks(max_token_length: int | None) -> int:
    """Chunks of 75 tokens that `--max_token_length` asks for."""
    if max_token_length is None:
        return 1
    if max_token_length < 75 or max_token_length % 75:
        raise UserError(f"max_token_length {max_token_length} is not a multiple of 75", "use 75, 150 or 225")
    return max_token_length // 75
