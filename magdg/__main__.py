import sys

from magdg import main

sys.exit(main())
