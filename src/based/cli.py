"""The `based` command: verbs, each loaded only when it is used."""

import sys
from importlib import import_module

from based import __version__
from based.errors import BasedError

# verb: module, the dataclass of its options, what it does
VERBS: dict[str, tuple[str, str, str]] = {
    "data": (
        "based.data.command",
        "Data",
        "train a tokenizer and pack text files into token shards",
    ),
    "train": ("based.training.command", "Train", "train a model on token shards"),
    "generate": ("based.generation.command", "Generate", "continue a text with a trained model"),
    "eval": ("based.evaluation.command", "Evaluate", "perplexity, on recall hits and on the rest"),
    "convert": ("based.models.convert.command", "Convert", "read an official checkpoint"),
    "recall": ("based.recall.command", "Recall", "recall against the size of the state: the lab"),
    "info": ("based.models.command", "Info", "parameters, layers and state bytes of a model"),
}


def main(arguments: list[str] | None = None) -> None:
    """Runs one verb; a user's mistake is one line on standard error and exit status 1."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_help())
    elif arguments[0] == "--version":
        print(f"based {__version__}")
    elif arguments[0] not in VERBS:
        _fail(f"no verb {arguments[0]!r}; there are {', '.join(VERBS)}", status=2)
    else:
        _run(arguments[0], arguments[1:])


def _run(verb: str, arguments: list[str]) -> None:
    import tyro

    module_name, options, _ = VERBS[verb]
    module = import_module(module_name)
    try:
        if hasattr(module, "expand"):
            arguments = module.expand(arguments)
        config = tyro.cli(
            getattr(module, options), args=arguments, prog=f"based {verb}", use_underscores=False
        )
        module.run(config)
    except BasedError as error:
        _fail(str(error), status=1)
    except KeyboardInterrupt:
        _fail("interrupted", status=130)
    except BrokenPipeError:
        # The reader went away (`| head`): nothing is wrong, and nothing more can be written.
        sys.stderr.close()
        sys.exit(141)


def _fail(message: str, status: int) -> None:
    print(f"based: {message}", file=sys.stderr)
    sys.exit(status)


def _help() -> str:
    width = max(map(len, VERBS))
    verbs = "\n".join(f"  {verb:<{width}}  {text}" for verb, (_, _, text) in VERBS.items())
    return (
        "usage: based VERB [options]\n\n"
        "Language models with a fixed-size memory that recall like attention.\n\n"
        f"{verbs}\n\n"
        "`based VERB --help` lists a verb's options."
    )
