"""`BasedConfig`: a `DecoderConfig` as transformers wants it."""

from __future__ import annotations

from dataclasses import asdict, field, fields
from typing import Any, ClassVar, no_type_check

from transformers import AutoConfig, PreTrainedConfig

from based.errors import BasedError
from based.mixers.registry import mixer_class
from based.models.checkpoint import MODEL_TYPE
from based.models.config import DecoderConfig
from based.models.presets import WINDOW, based_360m

DEFAULT = based_360m()


# Transformers makes a dataclass of it whose __init__ takes more than the signature says.
@no_type_check
class BasedConfig(PreTrainedConfig):
    """The fields of `DecoderConfig` and those of every Hugging Face model; default based-360m."""

    model_type: ClassVar[str] = MODEL_TYPE
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["cache", "past_key_values"]

    vocab_size: int = DEFAULT.vocab_size
    hidden_size: int = DEFAULT.hidden_size
    intermediate_size: int = DEFAULT.intermediate_size
    mixers: list[str] = field(default_factory=lambda: list(DEFAULT.mixers))
    mixer_options: dict[str, dict[str, Any]] = field(
        default_factory=lambda: asdict(DEFAULT)["mixer_options"]
    )
    norm_eps: float = DEFAULT.norm_eps
    initializer_range: float = DEFAULT.initializer_range
    use_cache: bool = True
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None
    tie_word_embeddings: bool = True

    def __post_init__(self, **kwargs: Any) -> None:
        """Refuses what no decoder can be built from."""
        if not self.tie_word_embeddings:
            raise BasedError("tie_word_embeddings is false; the output layer is the embedding")
        self.decoder_config()
        super().__post_init__(**kwargs)

    @staticmethod
    def of(config: DecoderConfig, **others: Any) -> BasedConfig:
        """The same model's configuration; `others` are Hugging Face's own fields."""
        return BasedConfig(**config.to_dict(), **others)

    def decoder_config(self) -> DecoderConfig:
        """What our decoder is built from."""
        values = {f.name: getattr(self, f.name) for f in fields(DecoderConfig)}
        return DecoderConfig.from_dict(values)

    @property
    def num_hidden_layers(self) -> int:
        """Number of layers, one mixer each."""
        return len(self.mixers)

    @property
    def layer_types(self) -> list[str]:
        """What each layer remembers, in transformers' words; derived, and builds nothing."""
        return [_layer_type(name) for name in self.mixers]


def _layer_type(mixer: str) -> str:
    if not mixer_class(mixer).fixed_state:
        return "full_attention"
    return "sliding_attention" if mixer == WINDOW else "linear_attention"


AutoConfig.register(MODEL_TYPE, BasedConfig)
