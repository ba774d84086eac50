"""Exit code 0 if a URL answers with a success, else 1: for images without curl. `python3 healthcheck.py URL`"""

import sys
import urllib.request

try:
    with urllib.request.urlopen(sys.argv[1], timeout=4) as answer:
        sys.exit(0 if answer.status < 300 else 1)
except OSError as error:
    print(f"{sys.argv[1]}: {error}", file=sys.stderr)
    sys.exit(1)
