"""`python -m milora_init` is `milora-init`."""

from __future__ import annotations

from milora_init.cli.main import main

if __name__ == "__main__":
    main()
