import sys

from magnification_invariant.cli import main

sys.exit(main())
