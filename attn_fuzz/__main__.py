"""``python -m attn_fuzz``."""

from attn_fuzz.cli.app import main

if __name__ == "__main__":
    main()
