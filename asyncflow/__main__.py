"""`python -m asyncflow`."""

from asyncflow.cli import main

if __name__ == "__main__":  # simulator processes import this file under another name
    main()
