"""Memory and speed of opening and saving model files: `python -m benchmarks.model_files [megabytes]`.

Each case runs in a process of its own. Memory is what the process holds itself (anonymous pages, sampled), above what
it held before and beside the model that results; a share of 0.3 is 30 % of the file. Linux only.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Freed memory goes back at once, so that what is held is what is needed.
ENVIRONMENT = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
DTYPES = {"fp32": "float32", "fp16": "float16"}


def held() -> int:
    """Bytes of anonymous memory of this process."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise SystemExit("this benchmark reads /proc/self/status, which this system does not have")


def measured(work: Callable[[], Any]) -> tuple[Any, float, int, int]:
    """(result, seconds, peak above the start, held at the end above the start), bytes."""
    start, peak, done = held(), [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.001):
            peak[0] = max(peak[0], held())

    watcher = threading.Thread(target=watch)
    watcher.start()
    began = time.perf_counter()
    try:
        result = work()
    finally:
        seconds = time.perf_counter() - began
        done.set()
        watcher.join()
    return result, seconds, max(0, peak[0] - start), max(0, held() - start)


def make_model(megabytes: int) -> Any:
    """A random SDXL model of about this size in float32, most of it in the U-Net."""
    import torch

    from library.models.dimensions import TextDimensions, VaeDimensions
    from library.models.family import LoadedModel
    from library.models.text_encoders import PROJECTING, empty_text_encoder, text_config
    from library.models.unet_config import SIZE_EMBED_DIM, SdxlUNetConfig
    from library.models.unet_sdxl import from_config
    from library.models.vae import empty_vae, vae_config

    width = 64
    second = TextDimensions(width, 2, 2 * width, activation="gelu", projection=width)
    text = [
        empty_text_encoder(text_config(TextDimensions(width, 2, 2 * width))),
        empty_text_encoder(text_config(second, PROJECTING)),
    ]
    vae = empty_vae(vae_config(VaeDimensions((32, 32)), 0.13025))
    base = {"cross_attention_dim": 2 * width, "projection_class_embeddings_input_dim": width + 6 * SIZE_EMBED_DIM}

    def unet(step: int) -> Any:
        widths = (64 * step, 64 * step, 128 * step)
        heads = tuple(side // 64 for side in widths)
        config = SdxlUNetConfig(
            block_out_channels=widths, attention_head_dim=heads, transformer_layers_per_block=(1, 1, 2), **base
        )
        with torch.device("meta"):
            return from_config(config)

    def size(module: Any) -> int:
        return sum(p.numel() for p in module.parameters()) * 4

    step = 1
    while size(unet(step)) < megabytes * 1e6 - sum(size(module) for module in (*text, vae)):
        step += 1
    modules = [*text, vae, unet(step)]
    for module in modules:
        module.to_empty(device="cpu").requires_grad_(False)
        for parameter in module.parameters():
            parameter.normal_(std=0.02)
    return LoadedModel(text_encoders=modules[:2], vae=modules[2], unet=modules[3], version="sdxl_base_v1-0")


def plain_read(path: Path) -> float:
    """Seconds of a sequential read of a file into new memory."""
    began = time.perf_counter()
    with open(path, "rb", buffering=0) as file:
        file.readinto(bytearray(path.stat().st_size))
    return time.perf_counter() - began


def case(path: Path, dtype_name: str) -> dict[str, float]:
    """Open and save one file; shares of the file's size and of a plain read's speed."""
    import torch

    from library.models.checkpoint import open_checkpoint
    from library.models.family import family
    from library.models.sdxl_loading import file_parts

    dtype, own, size = getattr(torch, DTYPES[dtype_name]), family("sdxl"), path.stat().st_size
    plain = min(plain_read(path) for _ in range(3))
    file_parts(path, dtype, latent_scale=own.latent_scale, with_vae=True)  # the imports
    model, seconds, peak, kept = measured(lambda: own.load(path, dtype=dtype))
    reads = []
    for _ in range(3):
        began = time.perf_counter()
        for _name, _tensor in open_checkpoint(path).stream():
            pass
        reads.append(time.perf_counter() - began)
    target = path.with_name(f"saved{path.suffix}")
    safetensors = path.suffix == ".safetensors"
    _, save_seconds, save_peak, _ = measured(
        lambda: own.save(model, target, stability_layout=True, safetensors=safetensors)
    )
    target.unlink()
    return {
        "megabytes": size / 1e6,
        "open: seconds": seconds,
        "open: peak beside the model / file": (peak - kept) / size,
        "open: peak / file": peak / size,
        "save: seconds": save_seconds,
        "save: peak beside the model / file": save_peak / size,
        "read speed / plain read": plain / min(reads),
    }


def main() -> None:
    """Print one block of numbers per kind of file."""
    megabytes = int(sys.argv[1]) if len(sys.argv) > 1 else 200
    if len(sys.argv) > 2:
        print(json.dumps(case(Path(sys.argv[2]), sys.argv[3])))
        return
    import torch

    from library.models.family import family

    model = make_model(megabytes)
    with tempfile.TemporaryDirectory() as folder:
        for suffix in ("safetensors", "ckpt"):
            for word, name in DTYPES.items():
                path = Path(folder) / f"{word}.{suffix}"
                family("sdxl").save(
                    model, path, stability_layout=True, safetensors=suffix == "safetensors", dtype=getattr(torch, name)
                )
                command = [sys.executable, "-m", "benchmarks.model_files", str(megabytes), str(path), word]
                output = subprocess.run(
                    command, capture_output=True, text=True, check=True, env={**os.environ, **ENVIRONMENT}
                ).stdout
                print(f"{path.name}:")
                for label, value in json.loads(output.splitlines()[-1]).items():
                    print(f"  {label:36} {value:8.2f}")
                path.unlink()


if __name__ == "__main__":
    main()
