"""Noise, timesteps, targets, losses and weights against the original's numbers."""

from __future__ import annotations

import random

import pytest
import torch
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode

from library.diffusion import noise, objective
from library.diffusion.schedule import make_schedule
from library.diffusion.timesteps import draw_timesteps, validation_timesteps
from library.options.objective import ObjectiveConfig
from tests.conftest import GOLDEN, load_json

NOISE_CASES = load_json(GOLDEN / "training_objective.json")["cases"]
WEIGHTS = load_json(GOLDEN / "training_weights.json")
LATER = load_json(GOLDEN / "training_later.json")
EPSILON = ObjectiveConfig()


@pytest.fixture(scope="module")
def tensors() -> dict[str, torch.Tensor]:
    return load_file(GOLDEN / "training_objective.safetensors")


def close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("zero_terminal", [False, True])
def test_schedule_tables(zero_terminal):
    golden = load_file(GOLDEN / "training_schedule.safetensors")
    prefix = "zero_terminal." if zero_terminal else ""
    schedule = make_schedule(zero_terminal_snr=zero_terminal)
    for name, table in (("betas", schedule.betas), ("alphas_cumprod", schedule.alphas_cumprod)):
        close(table, golden[prefix + name])
    close(1 - schedule.betas, golden[prefix + "alphas"])
    close(schedule.snr, golden[prefix + ("all_snr_used" if zero_terminal else "all_snr")])


def test_zero_terminal_schedule_ends_in_pure_noise():
    schedule = make_schedule(zero_terminal_snr=True)
    assert schedule.betas[-1] == 1
    assert schedule.alphas_cumprod[-1] == 0


class RecordedDraws:
    """Hands out a golden case's draws in their order and complains when another kind is asked for."""

    def __init__(self, case, tensors):
        self.draws, self.tensors = list(case["draws"]), tensors

    def random(self):
        kind, value = self.draws.pop(0)
        assert kind == "python"
        return value

    def randn(self, shape, device, generator):
        kind, name = self.draws.pop(0)
        assert kind in ("randn", "randn_like")
        assert tuple(self.tensors[name].shape) == tuple(shape)
        return self.tensors[name]


@pytest.mark.parametrize("case", NOISE_CASES, ids=lambda c: c["name"])
def test_noise_and_noised_latents(case, tensors, monkeypatch):
    draws = RecordedDraws(case, tensors)
    monkeypatch.setattr(noise, "randn", draws.randn)
    config = ObjectiveConfig(**case["options"])
    latents = tensors[f"{case['name']}.latents"]

    drawn = noise.draw_noise(latents, config, None, draws)
    close(drawn, tensors[f"{case['name']}.noise"])

    kind, name = draws.draws.pop(0)
    assert kind == "randint"
    timesteps = tensors[name]
    assert torch.equal(timesteps, tensors[f"{case['name']}.timesteps"])
    noisy = noise.noisy_input(latents, drawn, timesteps, make_schedule(), config)
    close(noisy, tensors[f"{case['name']}.noisy_latents"])
    assert not draws.draws


def test_noise_is_float32_for_half_latents():
    """The original draws in the latents' format; here training noise is float32."""
    latents = torch.ones(1, 4, 8, 8, dtype=torch.float16)
    drawn = noise.draw_noise(latents, ObjectiveConfig(noise_offset=0.1, multires_noise_iterations=2))
    noisy = noise.noisy_input(latents, drawn, torch.tensor([5]), make_schedule(), EPSILON)
    assert drawn.dtype == noisy.dtype == torch.float32


@pytest.mark.parametrize("name", ["noise_offset", "ip_noise_gamma"])
def test_random_strength_is_one_uniform_draw_before_the_noise(name):
    latents = torch.zeros(2, 4, 8, 8)
    timesteps = torch.tensor([900, 100])
    schedule = make_schedule()

    def run(strength, **options):
        config = ObjectiveConfig(**{name: strength}, **options)
        generator = torch.Generator().manual_seed(4)
        if name == "noise_offset":
            return noise.draw_noise(latents, config, generator)
        base = torch.zeros_like(latents)
        return noise.noisy_input(latents, base, timesteps, schedule, config, generator)

    generator = torch.Generator().manual_seed(4)
    plain = torch.randn(latents.shape, generator=generator) if name == "noise_offset" else torch.zeros_like(latents)
    strength = 0.5 * torch.rand((), generator=generator)
    if name == "noise_offset":
        expected = plain + strength * torch.randn((2, 4, 1, 1), generator=generator)
    else:
        perturbed = strength * torch.randn(latents.shape, generator=generator)
        expected = schedule.add_noise(latents, perturbed, timesteps)
    close(run(0.5, **{f"{name}_random_strength": True}), expected)
    assert not torch.allclose(run(0.5), expected)


def test_draws_depend_on_their_generators_alone():
    config = ObjectiveConfig(noise_offset=0.1, multires_noise_iterations=4)
    latents = torch.zeros(2, 4, 8, 8)

    def draw():
        return noise.draw_noise(latents, config, torch.Generator().manual_seed(1), random.Random(2))

    first = draw()
    torch.manual_seed(99)
    random.seed(99)
    assert torch.equal(first, draw())


def test_timesteps_stay_in_their_range():
    config = ObjectiveConfig(min_timestep=200, max_timestep=204)
    drawn = draw_timesteps(400, config, torch.Generator().manual_seed(0))
    assert drawn.dtype == torch.int64
    assert set(drawn.tolist()) == {200, 201, 202, 203}
    everything = draw_timesteps(20000, EPSILON, torch.Generator().manual_seed(0))
    assert (everything.min(), everything.max()) == (0, 999)


def test_validation_timesteps():
    assert validation_timesteps(EPSILON) == [200, 400, 600, 800]
    assert validation_timesteps(ObjectiveConfig(min_timestep=100, max_timestep=203)) == [120, 141, 161, 182]


@pytest.mark.parametrize("zero_terminal", [False, True])
def test_noised_latents_and_velocity(zero_terminal, tensors):
    schedule = make_schedule(zero_terminal_snr=zero_terminal)
    prefix = "zero_terminal." if zero_terminal else ""
    latents, noise_, steps = tensors["latents"], tensors["noise"], tensors["timesteps"]
    close(schedule.add_noise(latents, noise_, steps), tensors[prefix + "noisy_latents"])
    close(objective.target(latents, noise_, steps, schedule, True), tensors[prefix + "velocity"])
    assert objective.target(latents, noise_, steps, schedule, False) is noise_


def weight(name: str, snr: torch.Tensor) -> torch.Tensor:
    """The weight that a golden entry's name stands for."""
    name = name.removeprefix("zero_terminal.")
    head, _, number = name.rpartition("_")
    if head == "min_snr_gamma":
        return objective.min_snr_weight(snr, float(number), v_prediction=False)
    if head == "v_pred_like_loss":
        return objective.v_like_weight(snr, float(number))
    assert name in ("scale_v_pred_loss_like_noise_pred", "snr_scale")
    return objective.noise_like_weight(snr)


@pytest.mark.parametrize("name", WEIGHTS["weights"])
def test_weights(name):
    schedule = make_schedule(zero_terminal_snr=name.startswith("zero_terminal."))
    snr = schedule.snr[torch.tensor(WEIGHTS["timesteps"])]
    close(weight(name, snr), torch.tensor(WEIGHTS["weights"][name]))


@pytest.mark.parametrize("index", range(len(WEIGHTS["chains"])))
def test_chains_of_weights(index, tensors):
    chain = WEIGHTS["chains"][index]
    schedule = make_schedule(zero_terminal_snr=chain["zero_terminal_snr"])
    v_prediction = chain["v_parameterization"]
    names = ("min_snr_gamma", "scale_v_pred_loss_like_noise_pred", "v_pred_like_loss")
    config = ObjectiveConfig(**{name: chain[name] for name in names})
    steps = tensors["timesteps"]
    wanted = objective.target(tensors["latents"], tensors["noise"], steps, schedule, v_prediction)
    loss_weights = tensors["loss_weights"] if chain["loss_weights_used"] else torch.ones(4)
    losses = objective.loss_per_sample(
        tensors["pred"], wanted, steps, schedule, config, v_prediction=v_prediction, loss_weights=loss_weights
    )
    expected = torch.tensor(chain["per_sample"])
    if v_prediction and config.min_snr_gamma:
        # The recorded chains weigh velocity like noise; the later formula divides by snr + 1 instead of snr.
        snr = schedule.snr[steps]
        expected = expected * snr / (snr + 1)
    else:
        close(losses.mean(), torch.tensor(chain["loss"]))
    close(losses, expected)


def test_later_weights():
    snr = make_schedule().snr[torch.tensor(LATER["timesteps"])]
    ours = {
        "min_snr_5": objective.min_snr_weight(snr, 5.0, False),
        "min_snr_5_v": objective.min_snr_weight(snr, 5.0, True),
        "debiased": objective.debiased_weight(snr, False),
        "debiased_v": objective.debiased_weight(snr, True),
    }
    assert set(ours) == set(LATER["weights"])
    for name, values in LATER["weights"].items():
        close(ours[name], torch.tensor(values))


@pytest.mark.parametrize("index", range(len(LATER["huber_thresholds"])))
def test_huber_thresholds(index):
    case = LATER["huber_thresholds"][index]
    config = ObjectiveConfig(**{name: case[name] for name in ("loss_type", "huber_schedule", "huber_c", "huber_scale")})
    expected = torch.tensor(case["threshold"])
    if config.huber_schedule == "snr":
        expected = expected * config.huber_scale  # the recorded function forgets the scale here
    close(objective.huber_threshold(torch.tensor(LATER["timesteps"]), make_schedule(), config), expected)


def test_element_losses():
    inputs = LATER["loss_inputs"]
    pred, wanted = (torch.tensor(inputs[name]).reshape(inputs["shape"]) for name in ("pred", "target"))
    c = torch.tensor(inputs["huber_c"]).reshape(-1, 1, 1, 1)
    assert set(LATER["losses"]) == {"l1", "l2", "huber", "smooth_l1"}
    for name, values in LATER["losses"].items():
        if name in ("l1", "l2"):
            config = ObjectiveConfig(loss_type=name)
            losses = objective.element_loss(pred, wanted, torch.zeros(3, dtype=torch.int64), make_schedule(), config)
        else:
            losses = objective.pseudo_huber(pred - wanted, c, name)
        close(losses.flatten(), torch.tensor(values))


@pytest.mark.parametrize("loss_type", ["huber", "smooth_l1"])
def test_huber_losses_use_each_pictures_threshold(loss_type):
    config = ObjectiveConfig(loss_type=loss_type, huber_schedule="exponential")
    schedule, steps = make_schedule(), torch.tensor([0, 900])
    pred = torch.full((2, 4, 2, 2), 0.7)
    losses = objective.element_loss(pred, torch.zeros_like(pred), steps, schedule, config)
    for i in range(2):
        c = objective.huber_threshold(steps[i : i + 1], schedule, config)
        close(losses[i], objective.pseudo_huber(pred[i], c, loss_type))
    assert losses[0, 0, 0, 0] != losses[1, 0, 0, 0]


@pytest.mark.parametrize("kind", ["conditioning", "alpha"])
def test_masks(kind):
    golden = LATER["masked"]
    loss = torch.tensor(golden["loss"]).reshape(golden["loss_shape"])
    if kind == "conditioning":
        images = torch.tensor(golden["conditioning_images"]).reshape(golden["conditioning_shape"])
        mask = images[:, :1] / 2 + 0.5
    else:
        mask = torch.tensor(golden["alpha_masks"]).reshape(loss.shape[0], 1, 8, 8)
    expected = torch.tensor(golden[f"result_{kind}"]).reshape(loss.shape).mean(dim=(1, 2, 3))
    losses = objective.loss_per_sample(
        loss.sqrt(),
        torch.zeros_like(loss),
        torch.tensor([1, 2]),
        make_schedule(),
        EPSILON,
        v_prediction=False,
        loss_weights=torch.ones(2),
        mask=mask,
    )
    close(losses, expected)


def test_debiased_estimation_is_applied_with_the_others():
    config = ObjectiveConfig(min_snr_gamma=5.0, debiased_estimation_loss=True, v_pred_like_loss=0.5)
    schedule, steps = make_schedule(), torch.tensor([50, 700])
    pred = torch.randn(2, 4, 4, 4)
    kwargs = {"v_prediction": False, "loss_weights": torch.tensor([1.0, 0.3])}
    losses = objective.loss_per_sample(pred, torch.zeros_like(pred), steps, schedule, config, **kwargs)
    snr = schedule.snr[steps]
    plain = (pred**2).mean(dim=(1, 2, 3)) * torch.tensor([1.0, 0.3])
    expected = plain * (5 / snr).clamp(max=1) * (1 + 0.5 * (snr + 1) / snr) / snr.sqrt()
    close(losses, expected)


class HostReads(TorchDispatchMode):
    """Counts reads of device values by the host."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += "_local_scalar_dense" in str(func)
        return func(*args, **(kwargs or {}))


def test_the_objective_reads_nothing_back_from_the_device():
    config = ObjectiveConfig(
        noise_offset=0.1,
        noise_offset_random_strength=True,
        adaptive_noise_scale=0.1,
        multires_noise_iterations=3,
        ip_noise_gamma=0.1,
        ip_noise_gamma_random_strength=True,
        min_snr_gamma=5.0,
        v_pred_like_loss=0.5,
        debiased_estimation_loss=True,
        loss_type="huber",
    )
    schedule, latents = make_schedule(), torch.randn(2, 4, 8, 8)
    with HostReads() as reads:
        drawn = noise.draw_noise(latents, config)
        steps = draw_timesteps(2, config)
        noisy = noise.noisy_input(latents, drawn, steps, schedule, config)
        wanted = objective.target(latents, drawn, steps, schedule, False)
        mask, weights = torch.ones(2, 1, 64, 64), torch.ones(2)
        losses = objective.loss_per_sample(
            noisy, wanted, steps, schedule, config, v_prediction=False, loss_weights=weights, mask=mask
        )
        assert reads.count == 0
        losses.sum().item()
    assert reads.count == 1


WEIGHTED = [
    {"min_snr_gamma": 5.0},
    {"min_snr_gamma": 5.0, "scale_v_pred_loss_like_noise_pred": True},
    {"debiased_estimation_loss": True},
    {"loss_type": "huber", "huber_schedule": "snr", "min_snr_gamma": 5.0},
    {"loss_type": "smooth_l1", "huber_schedule": "snr"},
    {},
]


@pytest.mark.parametrize("options", WEIGHTED, ids=str)
def test_weights_at_zero_terminal_snr(options):
    """Velocity learns from pure noise too: the weights take the signal-to-noise ratio of the ordinary schedule there.

    With the rescaled schedule's own ratio, 0, min-SNR would leave the last timestep without any weight.
    """
    schedule, ordinary = make_schedule(zero_terminal_snr=True), make_schedule()
    timesteps = torch.arange(1000)
    ones = torch.ones(1000, 4, 2, 2)
    config = ObjectiveConfig(**options)
    values = {"v_prediction": True, "loss_weights": torch.ones(())}
    losses = objective.loss_per_sample(ones, ones * 0, timesteps, schedule, config, **values)
    assert schedule.alphas_cumprod[-1] == 0
    assert losses.isfinite().all()
    assert (losses > 0).all()
    if options.get("huber_schedule") != "snr" or options.get("loss_type") not in objective.HUBER_LOSSES:
        close(losses, objective.loss_per_sample(ones, ones * 0, timesteps, ordinary, config, **values))
