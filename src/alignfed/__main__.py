"""``python -m alignfed`` is the command line."""

from alignfed.cli import main

if __name__ == "__main__":
    main()
