"""Old import path of the VAE that works in slices."""

from library.porch import porch

NAMES = {"SlicingAutoencoderKL": "library.models.vae_slicing:sliced_autoencoder"}
__getattr__, __dir__ = porch(__name__, NAMES)
