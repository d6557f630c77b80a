"""Saved models: a directory of `config.json`, `model.safetensors` and a tokenizer.

The layout is Hugging Face's, so `AutoModelForCausalLM` reads what is written
here and the other way round. A save is published whole, by rename.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import tokenizers
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from based.errors import BasedError
from based.files import published
from based.models.config import DecoderConfig
from based.models.decoder import Decoder
from based.models.skeleton import skeleton

MODEL_TYPE = "based"
PREFIX = "model."
WEIGHTS, INDEX, CONFIG = "model.safetensors", "model.safetensors.index.json", "config.json"
# Transformers runs this module, which a saved model carries, where Based was not imported.
HUB_MODULE = "based.models.huggingface.modeling_based"
HUB_CODE = Path(__file__).parent / "huggingface" / "modeling_based.py"
AUTO = {"AutoConfig": "BasedConfig", "AutoModelForCausalLM": "BasedForCausalLM"}
TOKENIZER, END_OF_TEXT = "tokenizer.json", "<|endoftext|>"


def save_model(model: Decoder, path: str | Path, tokenizer: str | Path | None = None) -> None:
    """Writes the model, and a copy of the tokenizer file, to the directory `path`.

    Replaces a model that is there. Raises `BasedError` on a full disk, and then
    leaves what was there before.
    """
    tensors = {PREFIX + name: t.detach().cpu() for name, t in model.state_dict().items()}
    with published(Path(path)) as folder:
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
        described = {"model_type": MODEL_TYPE, "architectures": ["BasedForCausalLM"]}
        described |= {"dtype": str(model.dtype).removeprefix("torch."), **model.config.to_dict()}
        described |= {"auto_map": {auto: f"{HUB_CODE.stem}.{name}" for auto, name in AUTO.items()}}
        if tokenizer is not None:
            described |= _copy_tokenizer(Path(tokenizer), folder)
        shutil.copyfile(HUB_CODE, folder / HUB_CODE.name)
        (folder / CONFIG).write_text(json.dumps(described, indent=2) + "\n")


def _copy_tokenizer(file: Path, folder: Path) -> dict[str, int]:
    """Copies it with what transformers wants to know; returns its special ids for the config."""
    shutil.copyfile(file, folder / TOKENIZER)
    try:
        end = tokenizers.Tokenizer.from_file(str(file)).token_to_id(END_OF_TEXT)
    except Exception as error:  # the library raises bare Exception
        raise BasedError(f"{file} is not a tokenizer file: {error}") from error
    if end is None:
        return {}
    special = {"eos_token": END_OF_TEXT, "pad_token": END_OF_TEXT}
    described = {"tokenizer_class": "PreTrainedTokenizerFast", **special}
    (folder / "tokenizer_config.json").write_text(json.dumps(described, indent=2) + "\n")
    return {"eos_token_id": end, "pad_token_id": end}


def load_model(
    path: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype | None = None
) -> Decoder:
    """The model saved in directory `path`, in the dtype it was saved in unless one is given."""
    folder = Path(path)
    config = read_config(folder)
    tensors = {name.removeprefix(PREFIX): t for name, t in _read_tensors(folder)}
    tensors.pop("lm_head.weight", None)
    model = decoder(config, tensors, folder)
    return model.to(device=device, dtype=dtype or model.dtype)


def decoder(config: DecoderConfig, tensors: dict[str, Tensor], source: str | Path) -> Decoder:
    """A decoder on exactly these tensors, not copied; `source` is for messages."""
    model = skeleton(config)
    check_fits(model, tensors, source)
    model.load_state_dict(tensors, assign=True)
    return model.eval()


def model_folder(path: str | Path) -> Path:
    """The saved model's directory: `path` itself, or `path/model` where `path` is a run."""
    path = Path(path)
    if not path.exists():
        raise BasedError(f"there is no {path}; give a run of `based train` or a saved model")
    inside = path / "model"
    if not (path / CONFIG).exists() and (path / "checkpoints").exists() and not inside.exists():
        raise BasedError(f"the run in {path} has not finished; train it on to export its model")
    return inside if (inside / CONFIG).exists() else path


def read_config(folder: Path) -> DecoderConfig:
    """The configuration in the directory's `config.json`."""
    if folder.is_dir() and not (folder / CONFIG).exists():
        raise BasedError(f"no model in {folder}: {CONFIG} is missing there")
    values = read_json(folder / CONFIG)
    if values.get("model_type") != MODEL_TYPE:
        raise BasedError(
            f"{folder} holds no model of ours (model_type is not {MODEL_TYPE!r}); "
            "`based convert` reads the official checkpoints"
        )
    known = DecoderConfig.__dataclass_fields__
    return DecoderConfig.from_dict({name: v for name, v in values.items() if name in known})


def _read_tensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """All tensors of one safetensors file, or of the shards that an index names."""
    files, index = [WEIGHTS], folder / INDEX
    if index.exists():
        files = shards(read_json(index), index)
    for file in files:
        if not (folder / file).exists():
            raise BasedError(f"{folder} has no weights: {file} is missing")
        yield from read_safetensors(folder / file)


def read_safetensors(path: Path) -> Iterator[tuple[str, Tensor]]:
    """The tensors of one file."""
    try:
        with safe_open(path, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118 (not a mapping)
                yield name, opened.get_tensor(name)
    except (SafetensorError, OSError) as error:
        raise BasedError(f"{path} is damaged or truncated: {error}") from error


def read_json(path: Path) -> dict[str, Any]:
    """The object that a JSON file holds."""
    try:
        values = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise BasedError(f"{path} is not a model's configuration: {error}") from error
    if not isinstance(values, dict):
        raise BasedError(f"{path} is not a model's configuration: it holds no object")
    return values


def shards(index: Mapping[str, Any], path: Path) -> list[str]:
    """The files that the index of a sharded checkpoint names; `path` is where it was read."""
    try:
        files = {str(file) for file in index["weight_map"].values()}
    except (KeyError, AttributeError) as error:
        raise BasedError(f"{path} is not an index of weights: it has no weight_map") from error
    if any(Path(file).name != file for file in files):
        raise BasedError(f"{path} names files outside its directory")
    return sorted(files)


def check_fits(model: Decoder, tensors: Mapping[str, Tensor], source: str | Path) -> None:
    """Refuses weights that are not exactly the model's."""
    wanted = {name: tuple(t.shape) for name, t in model.state_dict().items()}
    got = {name: tuple(t.shape) for name, t in tensors.items()}
    for name in sorted(wanted.keys() | got.keys()):
        if wanted.get(name) != got.get(name):
            raise BasedError(
                f"weights in {source} do not fit its config: {name} is "
                f"{got.get(name, 'missing')}, the config wants {wanted.get(name, 'no such tensor')}"
            )
