"""The two caching tools against the original's runs with stand-in models; where its runs show faults, the new rules.

Faults of the original in these runs: repeats are encoded again and again, a second run encodes everything anew,
batches of the VAE never exceed those of the training, subsets that flip differently stop it, random crops are frozen,
and the options that name the cache are required.
"""

from __future__ import annotations

import contextlib
import json
import types
from collections import Counter

import numpy as np
import pytest
import torch

from library.data.support import SUPPORT
from library.data.text_file import CachedText, TextOrigin
from library.messages import UserError, log
from library.options.parser import parse, resolve
from library.training import caching, data_setup, text_outputs
from tests.conftest import GOLDEN, load_json
from tests.data.conftest import block_means
from tests.data.test_cache import gradient
from tools import cache_latents, cache_text_encoder_outputs

RUNS = load_json(GOLDEN / "tools_cache.json")["runs"]
COMMON = ["--pretrained_model_name_or_path", "m", "--resolution", "128", "--max_data_loader_n_workers", "0"]
COMMON += ["--seed", "1", "--caption_extension", ".txt"]
# What the original did without a word and is refused here, as a training refuses it -> what the message names.
REFUSED = {
    "random crop is not refused": "random_crop",
    "color augmentation is not refused": "color_aug",
    "shuffle is not refused": "shuffle_caption",
    "refused without sdxl": "--sdxl",
    "corrupt picture": "1_b/z.jpg",
    "no pictures": "no pictures",
}


class Stub(torch.nn.Module):
    """Stands for a VAE whose posterior has no width; remembers what it is asked."""

    def __init__(self, calls):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))
        self.calls = calls

    dtype = property(lambda self: self.weight.dtype)
    device = property(lambda self: self.weight.device)

    def encode(self, pictures):
        self.calls.append((tuple(pictures.shape), str(pictures.dtype)))
        mean = block_means(pictures.float()).to(pictures.dtype)
        return types.SimpleNamespace(latent_dist=types.SimpleNamespace(mean=mean, std=torch.zeros_like(mean)))


class Captions:
    """Stands for the text encoders."""

    def __init__(self, calls):
        self.calls = calls

    def __call__(self, family, tokenizers, encoders, length, device, dtype):
        def encode(captions):
            self.calls.append((tuple(captions), length, dtype))
            rows = (length or 75) + 2
            shapes = ((rows, 4), (rows, 6), (6,))
            return CachedText(*(torch.ones(len(captions), *shape, dtype=dtype) for shape in shapes))

        return encode


@pytest.fixture
def calls(monkeypatch):
    """What the stand-ins are asked."""
    asked = []
    processes = types.SimpleNamespace(
        rank=0, count=1, is_main=True, device=torch.device("cpu"), barrier=lambda: None, in_turn=contextlib.nullcontext
    )
    monkeypatch.setattr(caching, "start_processes", lambda **_: processes)
    monkeypatch.setattr(caching, "require_family", lambda source, sdxl: None)
    monkeypatch.setattr(caching, "load_vae", lambda source, scaling_factor: Stub(asked))
    monkeypatch.setattr(caching, "load_sdxl_text_encoders", lambda source, dtype, device: [])
    monkeypatch.setattr(text_outputs, "CaptionEncoder", Captions(asked))
    monkeypatch.setattr(text_outputs, "origin_of", lambda t, e, length, dtype: TextOrigin((length or 75) + 2))
    return asked


def named(tool, case):
    (run,) = (run for run in RUNS if (run["tool"], run["case"]) == (tool, case))
    return run


def lay_out(run, folder):
    """The pictures of a recorded run, and its arguments."""
    (folder / "d").mkdir()
    for name, size in run["pictures"].items():
        path = folder / "d" / name
        path.parent.mkdir(exist_ok=True)
        gradient(path, size)
        if name in run["bad"]:
            path.write_bytes(b"no picture")
        path.with_suffix(".txt").write_text(f"caption of {name}")
    argv = [*COMMON, *run["argv"]]
    if run["metadata"] is not None:
        (folder / "m.json").write_text(json.dumps(run["metadata"]))
    if run["dataset_config"] is None:
        return [*argv, "--train_data_dir", "d"]
    (folder / "config.toml").write_text(run["dataset_config"])
    return [*argv, "--dataset_config", "config.toml"]


def start(tool, argv):
    module = cache_latents if tool == "latents" else cache_text_encoder_outputs
    module.cache_to_disk(parse(module.SCRIPT, argv))


@pytest.mark.parametrize("run", RUNS, ids=lambda run: f"{run['tool']}: {run['case']}")
def test_recorded_runs(run, calls, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    argv = lay_out(run, tmp_path)
    if run["case"] in REFUSED:
        with pytest.raises(UserError, match=REFUSED[run["case"]]):
            start(run["tool"], argv)
        assert not calls and not list(tmp_path.rglob("*.npz"))
        return
    start(run["tool"], argv)
    # What was refused there and works here gives the files of the plain case.
    recorded = (
        run
        if run["files"]
        else named(run["tool"], "default: every repeat is encoded" if run["tool"] == "latents" else "default")
    )
    if "different flips" in run["case"]:
        recorded = named("latents", "config file")
    made = {path.relative_to(tmp_path / "d").as_posix() for path in tmp_path.rglob("*.npz")}
    assert made == set(recorded["files"])
    check = check_latents if run["tool"] == "latents" else check_text
    check(recorded, calls, tmp_path, argv)
    calls.clear()
    start(run["tool"], argv)
    assert not calls, "files that hold are kept"


def check_latents(recorded, calls, folder, argv):
    pictures = Counter()
    for name, arrays in recorded["files"].items():
        with np.load(folder / "d" / name) as file:
            told = {key: [list(file[key].shape), str(file[key].dtype)] for key in file.files if key != "cache_key"}
        assert told == arrays
        _, height, width = arrays["latents"][0]
        pictures[height * 8, width * 8] += 1 + ("latents_flipped" in arrays)
    # Every picture once, and once more mirrored.
    seen = Counter()
    for (batch, _, height, width), _ in calls:
        seen[height, width] += batch
    assert seen == pictures
    (dtype,) = (value for kind, value in recorded["calls"] if kind == "dtype")
    assert {dtype for _, dtype in calls} == {f"torch.{dtype}"}
    size = int(argv[argv.index("--vae_batch_size") + 1]) if "--vae_batch_size" in argv else 1
    assert max(shape[0] for shape, _ in calls) == min(size, max(pictures.values()))


def check_text(recorded, calls, folder, argv):
    asked = [caption for captions, _, _ in calls for caption in captions]
    assert sorted(asked) == sorted(f"caption of {name}" for name in recorded["pictures"])
    (kinds,) = {(call[4], call[5]) for call in recorded["calls"] if call[0] == "text"}
    assert {(length, str(dtype).removeprefix("torch.")) for _, length, dtype in calls} == {kinds}
    for name in recorded["files"]:
        with np.load(folder / "d" / name) as file:
            assert file["hidden_state1"].shape == ((kinds[0] or 75) + 2, 4) and file["pool2"].dtype == np.float32


def test_exceptions_are_recorded_cases():
    assert set(REFUSED) <= {run["case"] for run in RUNS}


def test_text_batches(calls, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    argv = lay_out(named("text", "default"), tmp_path)
    start("text", [*argv, "--text_encoder_batch_size", "3"])
    assert [len(captions) for captions, _, _ in calls] == [3, 1]


def test_given_options_without_effect_are_named(calls, tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    argv = lay_out(named("latents", "no buckets"), tmp_path)
    with caplog.at_level("INFO"):
        start("latents", [*argv, "--save_every_n_epochs", "2", "--sdpa", "--vae_batch_size", "2", "--skip_existing"])
    assert "without effect on caches: --save_every_n_epochs, --sdpa, --skip_existing" in caplog.text
    assert "latent cache: 4 new" in caplog.text


def test_verify_and_prune(calls, tmp_path, monkeypatch, caplog):
    caplog.set_level("INFO")
    monkeypatch.chdir(tmp_path)
    argv = lay_out(named("latents", "no buckets"), tmp_path)
    argv = argv[2:]  # no model
    start("latents", [*argv, "--verify"])
    assert "0 hold, 4 missing, 0 do not hold" in caplog.text
    start("latents", [*argv, "--vae", "v"])
    start("latents", [*argv, "--verify"])
    assert "4 hold, 0 missing, 0 do not hold" in caplog.text
    # The last bytes of the numbers: only reading them all finds that.
    damaged = tmp_path / "d" / "2_a" / "x.npz"
    data = bytearray(damaged.read_bytes())
    data[1500] ^= 255
    damaged.write_bytes(data)
    (tmp_path / "d" / "2_a" / "y.png").unlink()
    np.savez(tmp_path / "d" / "2_a" / "other.npz", latents=np.zeros(3))  # of somebody else
    with pytest.raises(UserError, match="1 cache files do not hold"):
        start("latents", [*argv, "--verify"])
    assert f"{damaged}: broken file" in caplog.text
    calls.clear()
    start("latents", [*argv, "--prune", "--flip_aug"])  # files without mirrored latents may serve another run
    assert f"{damaged}: broken file" in caplog.text and "y.npz: its picture is gone" in caplog.text
    assert "2 cache files deleted" in caplog.text and not calls
    assert sorted(path.name for path in tmp_path.rglob("*.npz")) == ["other.npz", "w.v1.npz", "z.npz"]
    start("latents", [*argv, "--vae", "v"])
    assert "2 kept, 1 new" in caplog.text


def test_without_a_model_or_with_another_one(tiny_sd15, tiny_sdxl, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    argv = lay_out(named("latents", "no buckets"), tmp_path)[2:]
    with pytest.raises(UserError, match="pretrained_model_name_or_path missing"):
        start("latents", argv)
    with pytest.raises(UserError, match="add --sdxl"):
        start("latents", [*argv, "--pretrained_model_name_or_path", str(tiny_sdxl)])
    with pytest.raises(UserError, match="leave out --sdxl"):
        start("latents", [*argv, "--sdxl", "--pretrained_model_name_or_path", str(tiny_sd15)])
    with pytest.raises(UserError, match="bucket_reso_steps is 8"):
        start(
            "latents",
            [*argv, "--sdxl", "--enable_bucket", "--min_bucket_reso", "64", "--bucket_reso_steps", "8", "--vae", "v"],
        )


def test_a_training_keeps_what_the_tools_made(tiny_sdxl, tmp_path, monkeypatch, caplog):
    """The VAE and encoders that the tools open alone are known as those of the whole model."""
    caplog.set_level("INFO")
    monkeypatch.chdir(tmp_path)
    run = named("latents", "no buckets")
    argv = lay_out({**run, "argv": ["--sdxl", "--mixed_precision", "bf16"]}, tmp_path)
    argv[1] = str(tiny_sdxl)
    start("latents", argv)
    start("text", argv)
    assert "latent cache: 4 new" in caplog.text and "text output cache: 4 new" in caplog.text
    options = resolve(parse(cache_latents.SCRIPT, argv), cache_latents.SCRIPT)
    family = caching.family("sdxl")
    model = family.load(tiny_sdxl)
    group = data_setup.build_data(options, SUPPORT[cache_latents.SCRIPT], model.tokenizers, 1)
    processes = caching._start(options)
    data_setup.cache_group_latents(
        group,
        options.replace(cache_latents_to_disk=True),
        family,
        model,
        caching.Draws(1, processes.device),
        processes,
        torch.bfloat16,
    )
    encoders = [encoder.to(torch.bfloat16) for encoder in model.text_encoders]
    group.cache_text = text_outputs.TextCacher(family)
    group.cache_text_encoder_outputs(model.tokenizers, encoders, "cpu", torch.bfloat16, True)
    assert "latent cache: 4 kept" in caplog.text and "text output cache: 4 kept" in caplog.text
    assert not log.disabled
