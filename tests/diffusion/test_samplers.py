"""The set-up of the samplers: names, classes, settings."""

from __future__ import annotations

import pytest
import torch

from library.diffusion.samplers import make_sampler, sampler_info, sampler_step, set_steps
from library.messages import UserError
from library.options.registries import SAMPLER_NAMES
from tests.conftest import GOLDEN, load_json

CONFIGS = load_json(GOLDEN / "training_samples.json")["samplers"]


@pytest.mark.parametrize("key", CONFIGS)
def test_golden_configs(key):
    name, _, suffix = key.partition("|")
    if name == "other":
        # the original takes DDIM for an unknown name; here it is refused
        with pytest.raises(UserError, match="unknown sampler"):
            make_sampler(name)
        return
    expected = CONFIGS[key]
    sampler = make_sampler(name, v_prediction=suffix == "v")
    assert type(sampler).__name__ == expected["class"]
    # The recorded sample pictures clip the predicted latents and have no step offset; both are mended here.
    mended = {"clip_sample": False, "steps_offset": 1}
    for setting, value in expected["config"].items():
        value = mended.get(setting, float("-inf") if value == "-inf" else value)
        assert sampler.config[setting] == value, setting


@pytest.mark.parametrize("name", SAMPLER_NAMES)
@pytest.mark.parametrize("steps", [1, 4, 5, 10])
def test_every_name_samples(name, steps):
    sampler = make_sampler(name)
    if name == "pndm" and steps < 4:
        with pytest.raises(UserError, match="at least 4"):
            set_steps(sampler, steps)
        return
    set_steps(sampler, steps)
    assert sampler.timesteps.device.type == "cpu"
    generators = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
    sample = torch.randn(2, 4, 4, 2) * sampler.init_noise_sigma
    for timestep in sampler.timesteps:
        output = 0.1 * sampler.scale_model_input(sample, timestep)
        sample = sampler_step(sampler, output, timestep, sample, generators)
    assert sample.isfinite().all()


@pytest.mark.parametrize("name", ["euler_a", "dpm_2_a", "dpmsolver++", "ddim"])
def test_a_picture_does_not_depend_on_its_batch(name):
    start = torch.randn(2, 4, 4, 2, generator=torch.Generator().manual_seed(0))

    def run(rows):
        sampler = make_sampler(name)
        set_steps(sampler, 4)
        generators = [torch.Generator().manual_seed(row) for row in rows]
        sample = start[rows] * sampler.init_noise_sigma
        for timestep in sampler.timesteps:
            output = 0.1 * sampler.scale_model_input(sample, timestep)
            sample = sampler_step(sampler, output, timestep, sample, generators)
        return sample

    torch.testing.assert_close(run([0, 1])[1:], run([1]))


@pytest.mark.parametrize(
    ("name", "calls"), [("ddim", 6), ("heun", 11), ("dpm_2_a", 11), ("pndm", 15), ("dpmsingle", 6)]
)
def test_number_of_calls(name, calls):
    sampler = make_sampler(name)
    set_steps(sampler, 6)
    assert len(sampler.timesteps) == calls


def test_aliases_share_a_record():
    assert sampler_info("k_dpm_2_a") is sampler_info("dpm_2_a")
    assert sampler_info("dpm_2_a").noise_draws == 2
