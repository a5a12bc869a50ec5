"""`python -m l2l_lightning`."""

from l2l_lightning.cli import main

if __name__ == "__main__":
    main()
