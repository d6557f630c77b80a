"""Based: language models with a fixed-size memory that recall like attention."""

__version__ = "0.1.0"
