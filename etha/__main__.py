"""``python -m etha``."""

from etha.cli import main

if __name__ == "__main__":
    main()
