"""``python -m ppexport`` is ``ppexport``."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main(prog_name="ppexport"))
