"""python -m udbad."""

from udbad.cli import main

if __name__ == "__main__":
    main()
