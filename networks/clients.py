"""Which programs read which network files: a table, and the line about it when a network is saved.

Sources: the programs' loaders as of 2026 (diffusers 0.36 and later, ComfyUI, A1111 webui 1.10, LyCORIS 3.3, peft).
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from networks import names

Verdict = Literal["loads", "partly", "no"]
CLIENTS = ("diffusers", "ComfyUI", "A1111", "LyCORIS", "peft")
CONVERT = "networks/convert_lora.py"


@dataclass(frozen=True, slots=True)
class FileKind:
    """One kind of network file.

    Attributes:
        name: as it is called in messages.
        loads: programs that load it whole.
        partly: programs that load a part or change it, with what is lost.
        remedy: what makes it readable elsewhere, or "".
        pattern: over the keys; any match makes a file this kind. Empty: told by other means.
    """

    name: str
    loads: tuple[str, ...]
    partly: Mapping[str, str] = field(default_factory=dict)
    remedy: str = ""
    pattern: str = ""

    def verdict(self, client: str) -> Verdict:
        """Whether a program loads the file."""
        return "loads" if client in self.loads else "partly" if client in self.partly else "no"


_ALL_BUT_PEFT = ("diffusers", "ComfyUI", "A1111", "LyCORIS")
_LYCORIS = ("ComfyUI", "A1111", "LyCORIS")
_FOR_PEFT = f"{CONVERT} --to peft makes a folder for it"
_TO_KOHYA = f"{CONVERT} --to kohya makes a file for them"
LORA = FileKind("LoRA", _ALL_BUT_PEFT, remedy=_FOR_PEFT)
SDXL_DIFFUSERS_NAMES = FileKind("SDXL LoRA in diffusers names", ("diffusers", "ComfyUI"), remedy=_TO_KOHYA)
SD_STABILITY_NAMES = FileKind("SD 1.x/2.x LoRA in Stability names", ("ComfyUI",), remedy=_TO_KOHYA)
MIXED_NAMES = FileKind(
    "LoRA in both styles of U-Net names",
    ("ComfyUI",),
    {
        "diffusers": "modules in Stability names are dropped",
        "A1111": "modules in diffusers names are left out for SDXL",
    },
    _TO_KOHYA,
)
UNKNOWN = FileKind("unknown file", ())

# First match wins.
KINDS: tuple[FileKind, ...] = (
    FileKind("ControlNet-LLLite", (), pattern=r"^lllite_unet_"),
    FileKind("OFT", ("A1111",), pattern=r"^oft_unet_"),
    FileKind("LoRA with an embedding in it", ("A1111",), pattern=r"^bundle_emb\."),
    FileKind("embedding", ("diffusers", "ComfyUI", "A1111"), pattern=r"^(emb_params|string_to_param)\b"),
    FileKind(
        "SDXL embedding",
        ("ComfyUI", "A1111"),
        {"diffusers": "each of clip_l and clip_g must be given by itself"},
        pattern=r"^clip_[lg]$",
    ),
    FileKind("XTI embedding", (), pattern=r"^(IN0\d|MID|OUT\d\d)$"),
    FileKind("LyCORIS OFT", ("ComfyUI", "A1111", "LyCORIS"), pattern=r"\.oft_(blocks|diag)$"),
    FileKind("LoHa", _LYCORIS, pattern=r"\.hada_"),
    FileKind("LoKr", _LYCORIS, pattern=r"\.lokr_"),
    FileKind("GLoRA", _LYCORIS, pattern=r"\.(a1|a2|b1|b2)\.weight$"),
    FileKind("(IA)^3", ("A1111", "LyCORIS"), pattern=r"\.on_input$"),
    FileKind("LoCon with Tucker decomposition", _LYCORIS, pattern=r"\.lora_mid\."),
    FileKind("full weights or norms", _LYCORIS, pattern=r"\.(w_norm|b_norm|diff|diff_b)$"),
    FileKind("DoRA", _LYCORIS, {"diffusers": "dora_scale is dropped, so pictures differ"}, pattern=r"\.dora_scale$"),
    FileKind("LoRA of peft", ("peft", "ComfyUI"), remedy=_TO_KOHYA, pattern=r"^base_model\.model\."),
    FileKind(
        "LoRA of diffusers",
        ("diffusers", "ComfyUI"),
        remedy=_TO_KOHYA,
        pattern=r"^(unet|text_encoder|text_encoder_2)\..*(lora_[AB]|lora\.(up|down)|_lora\.(up|down)|linear_layer\.(up|down))\b",
    ),
)
ALL_KINDS = (*KINDS, LORA, SDXL_DIFFUSERS_NAMES, SD_STABILITY_NAMES, MIXED_NAMES, UNKNOWN)
_SDXL = re.compile(r"^lora_te[12]_|^lora_unet_(label_emb|add_embedding)|_transformer_blocks_[1-9]")


def file_kind(keys: Iterable[str]) -> FileKind:
    """The kind of a file by its keys."""
    keys = list(keys)
    for kind in KINDS:
        if any(re.search(kind.pattern, key) for key in keys):
            return kind
    if not any(".lora_down." in key for key in keys):
        return UNKNOWN
    styles = {names.style_of((key,)) for key in keys if key.startswith("lora_unet_")} - {None}
    if len(styles) > 1:
        return MIXED_NAMES
    is_sdxl = any(_SDXL.search(key) for key in keys)
    if is_sdxl and styles == {"diffusers"}:
        return SDXL_DIFFUSERS_NAMES
    if styles == {"stability"} and not is_sdxl:
        return SD_STABILITY_NAMES
    return LORA


def report(keys: Iterable[str]) -> dict[str, Verdict]:
    """Whether each of the programs loads a file with these keys."""
    kind = file_kind(keys)
    return {client: kind.verdict(client) for client in CLIENTS}


def line(keys: Collection[str]) -> str:
    """One line: which programs load a file with these keys, which do not, and what helps."""
    kind = file_kind(keys)
    by_verdict: dict[str, list[str]] = {"loads": [], "partly": [], "no": []}
    for client in CLIENTS:
        verdict = kind.verdict(client)
        by_verdict[verdict].append(f"{client} ({kind.partly[client]})" if verdict == "partly" else client)
    parts = [f"{kind.name} loads in {_listed(by_verdict['loads'])}"]
    if by_verdict["partly"]:
        parts.append(f"partly in {_listed(by_verdict['partly'])}")
    if by_verdict["no"]:
        parts.append(f"not in {_listed(by_verdict['no'])}" + (f" ({kind.remedy})" if kind.remedy else ""))
    return "; ".join(parts)


def _listed(clients: list[str]) -> str:
    return ", ".join(clients) or "none of the other programs"
