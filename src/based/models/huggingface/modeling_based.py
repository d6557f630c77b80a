"""The code that a saved model carries, for `trust_remote_code`: Based itself must be installed."""

from based.models.huggingface import BasedConfig, BasedForCausalLM

__all__ = ["BasedConfig", "BasedForCausalLM"]
