"""The VAE that works in slices, as a class that other programs construct."""

from __future__ import annotations

from diffusers import AutoencoderKL
from diffusers.configuration_utils import register_to_config

from library.models.vae_slicing import slice_convolutions


class SlicingAutoencoderKL(AutoencoderKL):
    """diffusers' AutoencoderKL, its convolutions computed in `num_slices` horizontal slices."""

    @register_to_config
    def __init__(
        self,
        in_channels: int = 3,
        out_channels: int = 3,
        down_block_types: tuple[str, ...] = ("DownEncoderBlock2D",),
        up_block_types: tuple[str, ...] = ("UpDecoderBlock2D",),
        block_out_channels: tuple[int, ...] = (64,),
        layers_per_block: int = 1,
        act_fn: str = "silu",
        latent_channels: int = 4,
        norm_num_groups: int = 32,
        sample_size: int = 32,
        num_slices: int = 16,
    ) -> None:
        super().__init__(
            in_channels=in_channels,
            out_channels=out_channels,
            down_block_types=down_block_types,
            up_block_types=up_block_types,
            block_out_channels=block_out_channels,
            layers_per_block=layers_per_block,
            act_fn=act_fn,
            latent_channels=latent_channels,
            norm_num_groups=norm_num_groups,
            sample_size=sample_size,
        )
        slice_convolutions(self, num_slices)
