"""Number formats: what the options' words mean, autocast, and one cast in place of many."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

_DTYPES = {
    "no": torch.float32,
    "float": torch.float32,
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
}


def dtype_of(word: str) -> torch.dtype:
    """`float`/`fp32`/`no`, `fp16` or `bf16` -> the torch dtype.

    Raises:
        UserError: another word.
    """
    from library.messages import UserError

    if word not in _DTYPES:
        raise UserError(f"unknown number format '{word}'", f"use one of {', '.join(_DTYPES)}")
    return _DTYPES[word]


def weight_dtype(mixed_precision: str | None) -> torch.dtype:
    """Format of frozen weights and activations under `--mixed_precision`: no -> float32, fp16, bf16."""
    return dtype_of(mixed_precision or "no")


def save_dtype(save_precision: str | None) -> torch.dtype | None:
    """Format of saved tensors under `--save_precision`; None keeps each tensor's own."""
    return None if save_precision is None else dtype_of(save_precision)


def autocast(device: str | torch.device, dtype: torch.dtype | None) -> contextlib.AbstractContextManager[object]:
    """Automatic mixed precision on `device`; nothing for float32 or None."""
    if dtype is None or dtype == torch.float32:
        return contextlib.nullcontext()
    return torch.autocast(torch.device(device).type, dtype=dtype)


def autocast_dtype(x: torch.Tensor) -> torch.dtype | None:
    """The format that autocast is on for where `x` lies, or None."""
    kind = x.device.type
    # torch raises for devices that know no autocast; shapes are worked out on "meta".
    if kind == "meta":
        return _pretended
    if not torch.is_autocast_enabled(kind):
        return None
    return torch.get_autocast_dtype(kind)


_pretended: torch.dtype | None = None


@contextlib.contextmanager
def pretended_autocast(dtype: torch.dtype | None) -> Iterator[None]:
    """Tensors without memory behave as if autocast were on in this format."""
    global _pretended
    before, _pretended = _pretended, dtype
    try:
        yield
    finally:
        _pretended = before


def cast_once(x: torch.Tensor) -> torch.Tensor:
    """Cast an input that several layers share to autocast's format, so that they do not each cast it.

    Without autocast, and for tensors that autocast leaves alone, `x` itself.
    """
    dtype = autocast_dtype(x)
    return x if dtype is None or not x.is_floating_point() else x.to(dtype)


def allow_half_gradients(scaler: torch.amp.GradScaler) -> None:
    """Let a gradient scaler unscale float16 gradients, which it refuses by itself (`--full_fp16`)."""
    unscale = scaler._unscale_grads_
    scaler._unscale_grads_ = lambda optimizer, inv_scale, found_inf, _: unscale(optimizer, inv_scale, found_inf, True)
