"""`python -m based` is the `based` command."""

from based.cli import main

if __name__ == "__main__":
    main()
