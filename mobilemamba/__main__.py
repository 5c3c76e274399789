"""``python -m mobilemamba``."""

from mobilemamba.cli import main

main()
