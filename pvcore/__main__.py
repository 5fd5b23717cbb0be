"""`python -m pvcore` and the console script `pvcore`."""

import sys

from pvcore.cli import app
from pvcore.errors import PvcoreError


def main() -> None:
    """Run the command line; a mistake of the user's is one line on standard error and status 2."""
    try:
        app(prog_name="pvcore")
    except PvcoreError as error:
        print(f"pvcore: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
