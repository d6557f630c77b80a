"""`based generate`: continue a text."""

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from based.errors import BasedError


@dataclass(frozen=True)
class Generate:
    """Continue a text with a trained model; the text streams to standard output.

    The prompt is --prompt, the text of --file, or standard input. An empty prompt
    begins a new document.
    """

    model: Annotated[Path, tyro.conf.Positional]
    """A run of `based train`, or a saved model's directory."""
    prompt: str | None = None
    """The text to continue."""
    file: Path | None = None
    """A file with the text to continue."""
    temperature: float = 0.8
    """Divides the logits; 0 takes the most likely token."""
    top_k: int | None = None
    """Sample among the k most likely tokens."""
    top_p: float = 0.95
    """Sample among the most likely tokens that together reach this probability."""
    seed: int = 0
    """The same seed, prompt and model give the same text."""
    max_new_tokens: int = 200
    """Stop after this many tokens."""
    stop: tuple[str, ...] = field(default_factory=tuple)
    """Strings that end the text; they are not printed."""
    max_prompt_tokens: int = 1 << 20
    """Refuse a longer prompt. Memory does not depend on it; prefill time does."""
    quantize: Literal["int8", "float8"] | None = None
    """Read the projections in eight bits, half of the bytes; needs torchao."""
    device: str = "auto"
    """cpu, cuda, or auto: a GPU if there is one."""


def run(config: Generate) -> None:
    """Prints the prompt and then its continuation, piece by piece."""
    from based.data.tokenizer import Tokenizer
    from based.generation.decoding import stream_text
    from based.generation.sampling import Sampling
    from based.models import load_model
    from based.models.checkpoint import model_folder
    from based.models.device import pick_device

    sampling = Sampling(
        temperature=config.temperature,
        top_k=config.top_k,
        top_p=config.top_p,
        seed=config.seed,
        max_new_tokens=config.max_new_tokens,
        stop=config.stop,
    )
    folder = model_folder(config.model)
    model = load_model(folder, device=pick_device(config.device))
    tokenizer = Tokenizer.load(folder / "tokenizer.json")
    prompt = _read_prompt(config)
    length = len(tokenizer.encode(prompt))
    if length > config.max_prompt_tokens:
        raise BasedError(
            f"the prompt has {length:,} tokens, over the limit of {config.max_prompt_tokens:,}; "
            "shorten it or raise --max-prompt-tokens"
        )
    sys.stdout.write(prompt)
    for piece in stream_text(model, tokenizer, prompt, sampling, config.quantize):
        sys.stdout.write(piece)
        sys.stdout.flush()
    sys.stdout.write("\n")


def _read_prompt(config: Generate) -> str:
    if config.prompt is not None and config.file is not None:
        raise BasedError("give --prompt or --file, not both")
    if config.prompt is not None:
        return config.prompt
    try:
        data = sys.stdin.buffer.read() if config.file is None else config.file.read_bytes()
        return data.decode()
    except OSError as error:
        raise BasedError(
            f"could not read the prompt from {config.file or 'standard input'}: {error}"
        ) from error
    except UnicodeDecodeError as error:
        raise BasedError(f"the prompt is not UTF-8 text (byte {error.start})") from error
