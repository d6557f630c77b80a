"""`BasedForCausalLM`: the decoder with transformers' calling convention, head and loss."""

from __future__ import annotations

from functools import partial
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import (
    AutoModelForCausalLM,
    Cache,
    GenerationConfig,
    GenerationMixin,
    PreTrainedModel,
)
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from based.errors import BasedError
from based.models.checkpoint import HUB_MODULE
from based.models.decoder import Decoder
from based.models.huggingface.cache import BasedCache
from based.models.huggingface.config import BasedConfig

# What transformers calls a cache: `past_key_values` until 5.17, `cache` later.
CACHE = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"


class BasedModel(Decoder):
    """The decoder as `BasedForCausalLM.model`: final hidden states for token ids."""

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        use_cache: bool = False,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """`input_ids` [B, T] after those in `cache`; `attention_mask` [B, >= T] is 0 on padding.

        Positions that begin again at 0 (`position_ids` [B, T]) mark documents packed
        into a row; nothing passes from one to the next. Returns hidden states
        [B, T, hidden_size] and the cache, changed in place, if there is one.
        """
        _refuse(kwargs)
        mask = _mask(attention_mask, input_ids.shape[1])
        if cache is None and not use_cache:
            hidden = self._hidden_without_cache(input_ids, mask, position_ids)
            return BaseModelOutputWithPast(last_hidden_state=hidden)
        cache = BasedCache() if cache is None else cache
        if not isinstance(cache, BasedCache):
            raise BasedError(
                f"a {type(cache).__name__} cannot hold this model's state; BasedCache can"
            )
        if cache.state is not None and cache.batch_size != input_ids.shape[0]:
            raise BasedError(
                f"the cache is of {cache.batch_size} sequences, input_ids of {input_ids.shape[0]}"
            )
        out = BaseModelOutputWithPast(last_hidden_state=self._advance(input_ids, mask, cache))
        out[CACHE] = cache
        return out

    def _hidden_without_cache(
        self, input_ids: Tensor, mask: Tensor | None, position_ids: Tensor | None
    ) -> Tensor:
        if mask is None and position_ids is not None:
            starts = position_ids.expand_as(input_ids) == 0
            starts[:, 0] = True
            if int(starts.sum()) > len(starts):
                edges = starts.flatten().nonzero()[:, 0]
                edges = torch.cat([edges, edges.new_tensor([starts.numel()])])
                packed, _ = self.hidden(input_ids.reshape(1, -1), cu_seqlens=edges)
                return packed.view(*input_ids.shape, -1)
        return self.hidden(input_ids, mask=mask)[0]

    def _advance(self, input_ids: Tensor, mask: Tensor | None, cache: BasedCache) -> Tensor:
        """Hidden states of the new tokens; the cache is then behind them."""
        rows, tokens = input_ids.shape
        state = self.init_state(rows) if cache.state is None else cache.state
        if tokens == 1 and mask is None and not torch.is_grad_enabled():
            hidden = self.step_hidden(input_ids[:, 0], state)[:, None]
        else:
            hidden, after = self.hidden(input_ids, state, mask=mask)
            assert after is not None
            state = after
        cache.advance(state, input_ids)
        return hidden


class BasedForCausalLM(PreTrainedModel, GenerationMixin):
    """A `Decoder` with the interface of every Hugging Face language model.

    Its files are those of `save_model` and `load_model`.
    """

    config_class = BasedConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _tied_weights_keys = {"lm_head.weight": "model.embedding.weight"}
    # A step does not pass through the blocks' `forward`, where placement hooks work.
    _no_split_modules = ["BasedModel"]
    _skip_keys_device_placement = ["cache", "past_key_values"]
    _is_stateful = True
    _can_compile_fullgraph = True

    def __init__(self, config: BasedConfig) -> None:
        super().__init__(config)
        self.model = BasedModel(config.decoder_config())
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.gradient_checkpointing = False
        self.post_init()

    @classmethod
    def from_pretrained(cls, *args: Any, output_loading_info: bool = False, **kwargs: Any) -> Any:
        """As in transformers, but weights that are missing are an error, not drawn at random."""
        loaded: Any = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        model, info = loaded
        if info["missing_keys"]:
            missing = ", ".join(sorted(info["missing_keys"])[:3])
            raise BasedError(f"the checkpoint lacks weights of the model: {missing}, ...")
        return (model, info) if output_loading_info else model

    def initialize_weights(self) -> None:
        """Leaves weights alone: a `Decoder` draws them when it is made."""

    def get_input_embeddings(self) -> nn.Module:
        """The embedding, whose weight the head shares."""
        return self.model.embedding

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Puts another embedding in place; `tie_weights` then gives it to the head."""
        assert isinstance(value, nn.Embedding)
        self.model.embedding = value

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        past_key_values: Cache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """Logits [B, T, vocab_size] (or of the positions to keep), loss if there are labels.

        `labels` [B, T] are the inputs themselves, -100 where nothing is to be
        predicted. `past_key_values` is `cache` by its older name. A cache is
        returned if one is given or asked for; by default, unless in training.
        """
        cache = past_key_values if cache is None else cache
        if use_cache is None:
            use_cache = bool(self.config.use_cache) and not self.training
        outputs = self.model(
            input_ids, attention_mask, position_ids, cache=cache, use_cache=use_cache, **kwargs
        )
        logits = self.lm_head(_keep(outputs.last_hidden_state, logits_to_keep))
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs
            )
        out = CausalLMOutputWithPast(loss=loss, logits=logits)
        if CACHE in outputs:
            out[CACHE] = outputs[CACHE]
        as_dict = self.config.return_dict if return_dict is None else return_dict
        return out if as_dict else out.to_tuple()

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, *args: Any, is_first_iteration: bool | None = False, **kwargs: Any
    ) -> dict[str, Any]:
        """As in transformers; positions are counted by the state, and generated tokens are real."""
        kwargs.pop("position_ids", None)
        if kwargs.get("next_sequence_length") == 1 and not is_first_iteration:
            kwargs["attention_mask"] = None
        # The mixin's methods are typed for a protocol that PreTrainedModel itself does not meet.
        return super().prepare_inputs_for_generation(  # pyright: ignore[reportAttributeAccessIssue]
            input_ids, *args, is_first_iteration=is_first_iteration, **kwargs
        )

    @staticmethod
    def create_masks_for_generate(
        config: Any, attention_mask: Tensor | None = None, **_: Any
    ) -> Tensor | None:
        """The padding mask itself: our mixers are causal by themselves."""
        return attention_mask

    def _prepare_cache_for_generation(
        self,
        generation_config: GenerationConfig,
        model_kwargs: dict[str, Any],
        generation_mode: Any,
        batch_size: int,
        max_cache_length: int,
    ) -> Any:
        """One kind of cache for every model; `static` asks for a compiled decoding step."""
        kind = generation_config.cache_implementation
        if model_kwargs.get(CACHE) is not None:
            model_kwargs[CACHE]._is_user_defined = True
        elif generation_config.use_cache:
            if kind not in (None, "dynamic", "static"):
                raise BasedError(
                    f"cache_implementation {kind!r} is for key-value caches; leave it out"
                )
            fixed = all(mixer.fixed_state for mixer in self.model.mixers())
            if kind == "static" and not fixed:
                raise BasedError("this model's state grows with length; it has no static cache")
            model_kwargs[CACHE] = BasedCache(static=kind == "static")

    def _set_gradient_checkpointing(
        self,
        enable: bool = True,
        gradient_checkpointing_func: Any = checkpoint,
        every_n_layers: int = 1,
    ) -> None:
        """Makes blocks recompute their activations in backward, or no longer."""
        self.gradient_checkpointing = enable
        for layer, block in enumerate(self.model.blocks):
            block.__dict__.pop("forward", None)
            if enable and layer % every_n_layers == 0:
                block.forward = partial(_recomputed, block.forward, gradient_checkpointing_func)


def _recomputed(forward: Any, checkpoint_function: Any, *inputs: Any) -> Any:
    return checkpoint_function(forward, *inputs) if torch.is_grad_enabled() else forward(*inputs)


def _keep(hidden: Tensor, logits_to_keep: int | Tensor) -> Tensor:
    """The last `logits_to_keep` positions (0: all), or those it lists."""
    if isinstance(logits_to_keep, Tensor):
        return hidden[:, logits_to_keep]
    return hidden[:, -logits_to_keep:] if logits_to_keep else hidden


def _mask(attention_mask: Tensor | None, tokens: int) -> Tensor | None:
    """True on real tokens among the last `tokens`; None if all are."""
    if attention_mask is None:
        return None
    if attention_mask.dim() != 2:
        raise BasedError(
            "attention_mask must be [batch, tokens], 1 on real tokens and 0 on padding"
        )
    mask = attention_mask[:, -tokens:].bool()
    return None if bool(mask.all()) else mask


def _refuse(kwargs: dict[str, Any]) -> None:
    for name in ("inputs_embeds", "output_hidden_states", "output_attentions"):
        if kwargs.get(name) is not None and kwargs[name] is not False:
            raise BasedError(f"{name} is not supported by Based models")


AutoModelForCausalLM.register(BasedConfig, BasedForCausalLM)

# A saved model carries the module that its classes name: a short one that imports these.
BasedConfig.__module__ = BasedForCausalLM.__module__ = HUB_MODULE
BasedConfig.register_for_auto_class("AutoConfig")
BasedForCausalLM.register_for_auto_class("AutoModelForCausalLM")
import_module(HUB_MODULE)
