"""`python -m l2l_lightning`, and the command `l2l`."""

from l2l_lightning.cli import main

if __name__ == "__main__":
    main()
