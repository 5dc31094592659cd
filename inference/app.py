"""The app, as `t2ilib app` starts it: `python inference/app.py --help` has the options."""

import sys

from t2ilib.cli import app

if __name__ == "__main__":
    app(["app", *sys.argv[1:]])
