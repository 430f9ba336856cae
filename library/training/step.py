"""The objective of one micro-batch: latents, text, noise, forward, loss (training.md 8.2 to 8.4)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from library.diffusion import objective

if TYPE_CHECKING:
    from library.data.batch import Batch
    from library.training.draws import Place
    from library.training.run import Run


def objective_loss(run: Run, batch: Batch, place: Place) -> tuple[torch.Tensor, torch.Tensor]:
    """The batch's mean loss (a scalar with gradients) and its timesteps (B,)."""
    latents = run.latents(batch, place)
    text = run.target.encode_text(batch)
    prediction, wanted, timesteps = predict_and_target(run, latents, text, batch, place)
    losses = per_sample_loss(run, prediction, wanted, timesteps, batch)
    losses = run.target.post_process_loss(losses, timesteps)
    run.log.note_samples(losses, timesteps)
    return losses.mean(), timesteps


def predict_and_target(
    run: Run, latents: torch.Tensor, text: Any, batch: Batch, place: Place
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Noise the latents (B, 4, h, w) and ask the U-Net.

    Returns:
        Prediction and what it should have been, both (B, 4, h, w), and timesteps (B,).
    """
    config, schedule = run.objective, run.noise_schedule
    noise = run.draws.noise(place, latents, config)
    timesteps = run.draws.timesteps(place, latents.shape[0], config)
    noisy = run.draws.noisy_input(place, latents, noise, timesteps, schedule, config)
    with run.autocast():
        prediction = run.target.predict(noisy, timesteps, text, batch)
    wanted = objective.target(latents, noise, timesteps, schedule, run.v_prediction)
    with run.autocast():
        wanted = run.target.preserved(wanted, noisy, timesteps, text, batch)
    return prediction, wanted, timesteps


def per_sample_loss(
    run: Run, prediction: torch.Tensor, wanted: torch.Tensor, timesteps: torch.Tensor, batch: Batch
) -> torch.Tensor:
    """Weighted loss of each sample, float32 (B,)."""
    device = prediction.device
    return objective.loss_per_sample(
        prediction.float(),
        wanted.float(),
        timesteps,
        run.noise_schedule,
        run.objective,
        v_prediction=run.v_prediction,
        loss_weights=run.feed.loss_weights(batch, device),
        mask=run.feed.loss_mask(batch, device),
    )
