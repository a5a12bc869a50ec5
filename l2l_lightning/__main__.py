"""`python -m l2l_lightning`."""

import sys


def main() -> None:
    """Runs the command line, for which alone jsonargparse is needed."""
    try:
        from l2l_lightning import cli

        cli.main()
    except ModuleNotFoundError as error:
        if "jsonargparse" not in str(error):
            raise
        sys.exit("error: the command line needs a package: pip install 'jsonargparse[signatures]'")


if __name__ == "__main__":
    main()
