"""How many floating-point operations per second a device can do at most, from its maker's data sheet.

Dense matrix products in float16 or bfloat16 with float32 sums; no sparsity.
"""

from __future__ import annotations

import re

import torch

TERA = 1e12

# Words of the device's name -> operations per second; the first that fits counts.
HALF_PRECISION: tuple[tuple[str, float], ...] = (
    ("B200", 2250 * TERA),
    ("H200", 989 * TERA),
    ("GH200", 989 * TERA),
    ("H100 PCIe", 756 * TERA),
    ("H100 NVL", 835 * TERA),
    ("H100", 989 * TERA),
    ("H800", 989 * TERA),
    ("A100", 312 * TERA),
    ("A800", 312 * TERA),
    ("A40", 150 * TERA),
    ("A30", 165 * TERA),
    ("A10G", 70 * TERA),
    ("A10", 125 * TERA),
    ("L40S", 362 * TERA),
    ("L40", 181 * TERA),
    ("L4", 121 * TERA),
    ("RTX A6000", 155 * TERA),
    ("RTX A5000", 111 * TERA),
    ("RTX 5090", 210 * TERA),
    ("RTX 4090", 165 * TERA),
    ("RTX 4080", 97 * TERA),
    ("RTX 3090", 71 * TERA),
    ("RTX 3080", 60 * TERA),
    ("V100", 125 * TERA),
    ("T4", 65 * TERA),
    ("MI300X", 1307 * TERA),
    ("MI250", 362 * TERA),
)


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """The device's peak in this number format, None where it is not known (float32, CPUs, other cards)."""
    if device.type != "cuda" or dtype not in (torch.float16, torch.bfloat16):
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in HALF_PRECISION if re.search(rf"\b{part}\b", name)), None)
