r"""The library behind the Symmetric VAE book: equations as functions, methods, training and records."""

__version__ = "0.1.0"
