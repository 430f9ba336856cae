"""The data side: opening a large data set, memory, making latent caches, reading batches from them.

    python -m benchmarks.data [scan memory cache batches] [--pictures 100000] [--cached 200] [--batches 300]

`scan`: sizes of all pictures: Pillow opening each, the first start here, and the second one, which has the index.
The files are hard links to a few realistic ones (photographs with EXIF data and colour profiles, PNG with text,
WebP). `memory`: what 100,000 pictures with captions take. `cache`: pictures to latent files against the plain loop
(decode, encode, save, one after the other). `batches`: batches per second from cached latents and text with 0 and 2
workers. Times of `scan` are those of the process, the others those of the clock.
"""

from __future__ import annotations

import argparse
import io
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image, ImageCms
from PIL.PngImagePlugin import PngInfo

CAPTION = "a photograph of a red house by the river number {}, trees, morning light, high detail, wide angle, people"
DIFFERENT = 8
REPEATS = 3
TURNS = 3
# Times of a picture in the stand-in for a VAE, as multiples of what reading and writing it take.
FACTORS = (0.5, 1.0, 2.0)
# Channels of a stand-in that computes.
WIDTHS = (24,)
# Of 20 pictures, how many are of each kind.
MIX = {"photograph.jpg": 8, "plain.jpg": 3, "text.png": 5, "picture.webp": 4}


def natural_picture(size: tuple[int, int], seed: int) -> Image.Image:
    """Smooth colours with some grain, which compresses about as photographs do."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 255, (12, 16, 3), dtype=np.uint8)).resize(size, Image.Resampling.BICUBIC)
    grain = rng.normal(0, 6, (size[1], size[0], 1))
    return Image.fromarray(np.clip(np.asarray(coarse, dtype=np.float32) + grain, 0, 255).astype(np.uint8))


def encoded(kind: str, seed: int) -> bytes:
    """A picture file of one of the kinds of `MIX`."""
    picture = natural_picture((1024 + 64 * (seed % 3), 768 + 64 * (seed % 5)), seed)
    stream = io.BytesIO()
    if kind == "photograph.jpg":
        exif = Image.Exif()
        exif[0x010F], exif[0x0110], exif[0x0112] = "Maker", "Model", 1
        thumbnail = io.BytesIO()
        picture.resize((160, 120)).save(thumbnail, "JPEG")
        profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
        picture.save(stream, "JPEG", quality=88, exif=exif.tobytes() + thumbnail.getvalue(), icc_profile=profile)
    elif kind == "plain.jpg":
        picture.save(stream, "JPEG", quality=88)
    elif kind == "text.png":
        info = PngInfo()
        info.add_text("parameters", CAPTION * 4)
        picture.save(stream, "PNG", pnginfo=info)
    else:
        picture.save(stream, "WEBP", quality=80)
    return stream.getvalue()


def make_pictures(folder: Path, count: int, mix: dict[str, int], captions: bool) -> None:
    """Pictures that are hard links to `DIFFERENT` files of each kind, far from the limit of links to one file."""
    order = [kind for kind, share in mix.items() for _ in range(share)]
    originals = {}
    for index in range(count):
        kind = order[index % len(order)]
        place = kind, index // len(order) % DIFFERENT, index // 30_000
        target = folder / f"{index:06}{Path(kind).suffix}"
        if place in originals:
            os.link(originals[place], target)
        else:
            target.write_bytes(encoded(kind, place[1]))
            originals[place] = target
        if captions:
            target.with_suffix(".txt").write_text(CAPTION.format(index), encoding="utf-8")
    for path in set(originals.values()):
        os.utime(path, (1, 1))


def with_pillow(folder: Path, captions: bool) -> int:
    """Open each picture for its size, and read the first line of its caption."""
    seen = 0
    for name in sorted(name for name in os.listdir(folder) if not name.endswith(".txt")):
        path = os.path.join(folder, name)
        with Image.open(path) as image:
            seen += image.size[0] > 0
        if captions:
            with open(os.path.splitext(path)[0] + ".txt", encoding="utf-8") as file:
                file.readline().strip()
    return seen


def open_data_set(folder: Path) -> int:
    """What happens here before a training: list, sizes, captions, tags, notes."""
    from library.data.records import DatasetSettings, SubsetSettings
    from library.data.sources import scan

    subset = SubsetSettings(image_dir=str(folder), caption_extension=".txt", class_tokens="picture")
    return len(scan(DatasetSettings(resolution=(512, 512), subsets=(subset,))).items)


def cpu_seconds(function: Callable[[], int], expected: int, repeats: int = REPEATS) -> float:
    """Best time of the process; the result must be the number of pictures."""
    best = float("inf")
    for _ in range(repeats):
        start = time.process_time()
        count = function()
        best = min(best, time.process_time() - start)
        assert count == expected, f"{count} pictures instead of {expected}"
    return best


def scan_benchmark(count: int) -> None:
    mixes: Sequence[tuple[str, dict[str, int], int, bool]] = (
        ("mixed formats", MIX, count, False),
        ("mixed formats with caption files", MIX, count // 4, True),
        *((f"only {kind}", {kind: 1}, count // 20, False) for kind in MIX),
    )
    for title, mix, number, captions in mixes:
        with tempfile.TemporaryDirectory() as name:
            folder, index = Path(name, "pictures"), Path(name, "index")
            folder.mkdir()
            os.environ["SD_TOOLKIT_CACHE"] = str(index)
            make_pictures(folder, number, mix, captions)
            pillow = cpu_seconds(lambda folder=folder, captions=captions: with_pillow(folder, captions), number)
            time.sleep(2.1)  # files this fresh are not remembered yet
            firsts = []
            for _ in range(REPEATS):
                for file in index.rglob("*.index"):
                    file.unlink()
                firsts.append(cpu_seconds(lambda folder=folder: open_data_set(folder), number, 1))
            second = cpu_seconds(lambda folder=folder: open_data_set(folder), number)
            first = min(firsts)
        unit = 1e6 / number
        print(
            f"scan of {number} pictures, {title}: Pillow {pillow * unit:.1f} us each, first start {first * unit:.1f} us"
            f" ({pillow / first:.1f} times as fast), second {second * unit:.1f} us ({pillow / second:.1f} times)"
        )


MEMORY = """
import os, resource, sys
from library.data.group import build_group
from library.data.records import DatasetSettings, Item, ScanResult, SubsetSettings

def used():
    pages = int(open("/proc/self/statm").read().split()[1])
    return pages * resource.getpagesize()

count, caption = int(sys.argv[1]), sys.argv[2]
settings = DatasetSettings(resolution=(1024, 1024), enable_bucket=True, max_bucket_reso=2048, batch_size=4,
                           subsets=(SubsetSettings(image_dir="/data/pictures/1_name"),))
sizes = [(640 + number % 1500, 512 + number % 1100) for number in range(2000)]
build_group([settings], [ScanResult()], tokenize=None, seed=0).plan(0, 1)
before = used()
items = []
for number in range(count):
    path = f"/data/pictures/1_name/some_longer_file_name_{number:06}.webp"
    items.append(Item(path, path, caption.format(number), sizes[number % len(sizes)]))
group = build_group([settings], [ScanResult(items=items, num_train_images=count)], tokenize=None, seed=0)
opened = used() - before
for item in group.datasets[0].items:
    item.latents_npz = item.path[:-5] + "_1024x1024_sdxl.npz"
plan = group.plan(0, 1)
print(opened, used() - before)
"""


def memory_benchmark() -> None:
    command = [sys.executable, "-c", MEMORY, "100000", CAPTION]
    opened, planned = map(int, subprocess.run(command, check=True, capture_output=True, text=True).stdout.split())
    print(
        f"memory of 100000 pictures with captions of {len(CAPTION)} letters: {opened / 1e6:.0f} MB opened, "
        f"{planned / 1e6:.0f} MB with names of cache files and the plan of an epoch (limit 150)"
    )


class StandIn:
    """Stands for a VAE.

    Args:
        seconds: how long a picture takes on a device, for which the process only waits.
        width: channels of a few convolutions on the CPU where it does not wait.
    """

    def __init__(self, seconds: float = 0.0, width: int = 1) -> None:
        import torch

        torch.manual_seed(0)
        self.wait = seconds
        self.layers = torch.nn.Sequential(
            torch.nn.Conv2d(3, width, 3, stride=2, padding=1),
            torch.nn.SiLU(),
            torch.nn.Conv2d(width, width, 3, stride=2, padding=1),
            torch.nn.SiLU(),
            torch.nn.Conv2d(width, 4, 3, stride=2, padding=1),
        ).requires_grad_(False)
        self.seconds = 0.0

    def __call__(self, pictures: object) -> object:
        start = time.perf_counter()
        if not self.wait:
            latents = self.layers(pictures)
        else:
            latents = pictures[:, [0, 1, 2, 0], ::8, ::8].clone()  # type: ignore[index]
            time.sleep(self.wait * len(latents))
        self.seconds += time.perf_counter() - start
        return latents


def plain_loop(group: object, encode: StandIn, folder: Path) -> None:
    """Decode, resize, encode and save one picture after the other."""
    import torch

    from library.data import images

    for item in group.datasets[0].items:  # type: ignore[attr-defined]
        pixels = np.asarray(Image.open(item.path).convert("RGB"))
        pixels, _ = images.crop_to_bucket(pixels, item.bucket, item.resized)
        latents = encode(images.to_tensor(pixels)[None])
        assert isinstance(latents, torch.Tensor)
        np.savez(folder / f"{Path(item.path).stem}.npz", latents=latents[0].numpy(), original_size=np.array(item.size))


@contextmanager
def pictures_to_cache(count: int, resolution: int) -> Iterator[tuple[object, Path]]:
    """A data set of photographs of two megapixels, and its folder."""
    from library.data.group import build_group
    from library.data.records import DatasetSettings, SubsetSettings
    from library.data.sources import scan

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for number in range(count):
            if number < DIFFERENT:
                natural_picture((1728, 1152), number).save(folder / f"{number:04}.jpg", quality=90)
            else:
                os.link(folder / f"{number % DIFFERENT:04}.jpg", folder / f"{number:04}.jpg")
        settings = DatasetSettings(
            resolution=(resolution, resolution),
            enable_bucket=True,
            batch_size=4,
            max_bucket_reso=2 * resolution,
            subsets=(SubsetSettings(image_dir=name),),
        )
        yield build_group([settings], [scan(settings)], tokenize=None, seed=0), folder


def cache_benchmark(count: int) -> None:
    import torch

    torch.set_num_threads(1)
    with pictures_to_cache(count, 768) as (group, folder):
        cpu = min(race(group, folder, StandIn(1e-9))[0] for _ in range(2)) / count
        for factor in FACTORS:
            report_race(f"a device that takes {cpu * factor * 1e3:.0f} ms", group, folder, StandIn(cpu * factor))
        for width in WIDTHS:
            report_race(f"{width} channels on one core", group, folder, StandIn(width=width))


def race(group: object, folder: Path, encode: StandIn) -> tuple[float, float, float]:
    """Seconds of the plain loop, of its VAE, and of the cacher here."""
    from library.data.cache import cache_latents

    encode.seconds, start = 0.0, time.perf_counter()
    plain_loop(group, encode, folder)
    plain, alone = time.perf_counter() - start, encode.seconds
    forget(group, folder)
    start = time.perf_counter()
    cache_latents(group.datasets, encode, to_disk=True)  # type: ignore[attr-defined, arg-type]
    ours = time.perf_counter() - start
    forget(group, folder)
    return plain, alone, ours


def report_race(title: str, group: object, folder: Path, encode: StandIn) -> None:
    # in turn, so that other programs disturb both
    times = [race(group, folder, encode) for _ in range(TURNS)]
    plain, alone = min((plain, alone) for plain, alone, _ in times)
    ours = min(ours for _, _, ours in times)
    count = len(group.datasets[0].items)  # type: ignore[attr-defined]
    print(
        f"caching {count} pictures, VAE stand-in {title}, {alone / plain:.0%} of the plain loop: plain "
        f"{count / plain:.1f} pictures/s, here {count / ours:.1f}, {plain / ours:.2f} times as fast "
        f"(the VAE alone: {count / alone:.1f})"
    )


def forget(group: object, folder: Path) -> None:
    """As if nothing had been cached."""
    for path in folder.glob("*.npz"):
        path.unlink()
    for item in group.datasets[0].items:  # type: ignore[attr-defined]
        item.latents_npz = None


def batches_benchmark(count: int, step: float) -> None:
    import torch

    from library.data.cache import cache_latents
    from library.data.loader import make_loader
    from library.data.text_cache import cache_text_outputs
    from library.data.text_file import CachedText, TextOrigin

    def text(captions: list[str]) -> CachedText:
        size = len(captions)
        return CachedText(torch.zeros(size, 77, 768), torch.zeros(size, 77, 1280), torch.zeros(size, 1280))

    torch.set_num_threads(1)
    with pictures_to_cache(count, 1024) as (group, _):
        shape = group.datasets[0].items[0].bucket  # type: ignore[attr-defined]
        stored = torch.randn(1, 4, shape[1] // 8, shape[0] // 8)
        cache_latents(group.datasets, lambda p: stored.expand(len(p), -1, -1, -1), to_disk=True)  # type: ignore
        cache_text_outputs(group.datasets, text, TextOrigin(77), to_disk=True)  # type: ignore[attr-defined]
        plan = group.plan(0, 1)  # type: ignore[attr-defined]
        for workers in (0, 2):
            batches = iter(make_loader(group, plan, workers=workers))  # type: ignore[arg-type]
            next(batches)  # workers have started
            start = time.perf_counter()
            rate = sum(1 for _ in batches) / (time.perf_counter() - start)
            print(
                f"batches of 4 with cached latents and text of SDXL at 1024, {workers} workers: {rate:.1f}/s; a step "
                f"of {step} s needs {1 / step:.1f}/s, {rate * step:.1f} times as many"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", default=["scan", "memory", "cache", "batches"])
    parser.add_argument("--pictures", type=int, default=100_000, help="of `scan`")
    parser.add_argument("--cached", type=int, default=16, help="pictures of `cache`")
    parser.add_argument("--batches", type=int, default=100, help="of `batches`")
    parser.add_argument("--step_seconds", type=float, default=0.3, help="time of a training step")
    options = parser.parse_args()
    for part in options.parts:
        if part == "scan":
            scan_benchmark(options.pictures)
        elif part == "memory":
            memory_benchmark()
        elif part == "cache":
            cache_benchmark(options.cached)
        elif part == "batches":
            batches_benchmark(4 * options.batches, options.step_seconds)
        else:
            parser.error(f"unknown part {part}")


if __name__ == "__main__":
    main()
