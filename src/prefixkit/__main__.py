"""`python -m prefixkit` is the command line."""

from prefixkit.cli.main import main

if __name__ == "__main__":
    main()
